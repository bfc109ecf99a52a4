"""Objects and data roots: their names, URIs and generations."""

import re
from dataclasses import dataclass
from functools import lru_cache

from gcs_prefetchd.shared.errors import InvalidNameError

__all__ = [
    "MAX_NAME_BYTES",
    "DataRoot",
    "ObjectName",
    "ObjectVersion",
    "parse_object_uri",
    "validate_bucket",
    "validate_object_name",
]

MAX_NAME_BYTES = 1024  # https://cloud.google.com/storage/docs/objects#naming
MAX_SHOWN_LENGTH = 200  # of a name in an error

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_IP_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")


@dataclass(frozen=True, slots=True, order=True)
class ObjectName:
    """An object in a bucket, whatever its generation."""

    bucket: str
    name: str

    @property
    def uri(self) -> str:
        """`gs://bucket/name`."""
        return f"gs://{self.bucket}/{self.name}"


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One generation of an object, as named by a listing or a response. `crc32c` is None if GCS named none."""

    name: ObjectName
    generation: int
    size: int
    crc32c: int | None


@dataclass(frozen=True, slots=True, order=True)
class DataRoot:
    """`gs://bucket/prefix`: the location of one dataset's images and labels. The prefix has no trailing slash."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> "DataRoot":
        """Parse `gs://bucket[/prefix]`. Raises InvalidNameError."""
        bucket, name = _split_uri(uri)
        prefix = name.strip("/")
        if prefix:
            validate_object_name(prefix, uri)
        return cls(bucket, prefix)

    @property
    def uri(self) -> str:
        """`gs://bucket/prefix`, or `gs://bucket` without a prefix."""
        return f"gs://{self.bucket}/{self.prefix}" if self.prefix else f"gs://{self.bucket}"

    @property
    def folder(self) -> str:
        """The start of all its objects' names: `prefix/`, or nothing."""
        return f"{self.prefix}/" if self.prefix else ""

    def __contains__(self, name: ObjectName) -> bool:
        return name.bucket == self.bucket and name.name.startswith(self.folder)


def parse_object_uri(uri: str) -> ObjectName:
    """Parse `gs://bucket/name`. Raises InvalidNameError."""
    bucket, name = _split_uri(uri)
    validate_object_name(name, uri)
    return ObjectName(bucket, name)


def _split_uri(uri: str) -> tuple[str, str]:
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme != "gs":
        raise InvalidNameError(f"{_shown(uri)} is not a gs:// URI; write gs://bucket/prefix")
    bucket, _, name = rest.partition("/")
    validate_bucket(bucket)
    return bucket, name


@lru_cache  # a process reads from few buckets, many times
def validate_bucket(bucket: str) -> None:
    """Raise InvalidNameError unless GCS allows the bucket's name. Clients do not quote it, so any other name is refused.

    Rules: https://cloud.google.com/storage/docs/buckets#naming
    """
    if (
        not _BUCKET.fullmatch(bucket)
        or any(not part or len(part) > 63 for part in bucket.split("."))
        or _IP_ADDRESS.fullmatch(bucket)
    ):
        raise InvalidNameError(
            f"{_shown(bucket)} is not a valid bucket name: use 3 to 63 lowercase letters, digits, '-', '_' and '.', "
            "a letter or digit at both ends"
        )


def validate_object_name(name: str, shown: str) -> None:
    """Raise InvalidNameError unless GCS allows the object's name. The message shows `shown`."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidNameError(f"{_shown(shown)} is not a valid object name: it is not valid Unicode") from None
    if not 1 <= size <= MAX_NAME_BYTES:
        raise InvalidNameError(
            f"{_shown(shown)} is not a valid object name: it has {size} bytes; GCS allows 1 to {MAX_NAME_BYTES}"
        )


def _shown(name: str) -> str:
    return repr(name if len(name) <= MAX_SHOWN_LENGTH else name[:MAX_SHOWN_LENGTH] + "...")
