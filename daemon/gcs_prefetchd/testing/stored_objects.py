"""Objects as GCS stores them, and a bucket that holds them in memory."""

import base64
import hashlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import google_crc32c

from gcs_prefetchd.shared.errors import InvalidNameError

__all__ = ["Attributes", "Bucket", "MemoryBucket", "StoredObject", "check_object_name", "digests", "new_generation"]

MAX_NAME_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Attributes:
    """What an uploader declares about an object besides its bytes."""

    content_type: str = "application/octet-stream"
    content_encoding: str | None = None
    cache_control: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    composite: bool = False  # a composite object has a crc32c and no MD5


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One generation of an object: its bytes, or the file that holds them, and GCS's metadata."""

    bucket: str
    name: str
    generation: int
    size_bytes: int
    crc32c: str  # base64 of 4 big-endian bytes
    md5: str | None  # base64 of 16 bytes
    updated: datetime
    attributes: Attributes
    source: bytes | Path

    def read(self, start: int, length_bytes: int) -> bytes:
        """Return `length_bytes` from `start`; blocks if the object is a file on disk."""
        if isinstance(self.source, bytes):
            if start == 0 and length_bytes == self.size_bytes:
                return self.source
            return self.source[start : start + length_bytes]
        with self.source.open("rb") as file:
            file.seek(start)
            return file.read(length_bytes)


class Bucket(Protocol):
    """The interface of a bucket. Every call but `is_quick` may block on a disk."""

    def is_quick(self, name: str) -> bool:
        """Return whether `get(name)` needs to read no file."""

    def get(self, name: str) -> StoredObject | None:
        """Return the live generation of an object, or None."""

    def names(self) -> Sequence[str]:
        """Return the names of all objects, in the byte order of their UTF-8, as GCS lists them."""

    def put(self, name: str, data: bytes, attributes: Attributes, generation: int | None = None) -> StoredObject:
        """Store `data` as the new live generation of an object."""

    def delete(self, name: str) -> bool:
        """Delete an object; returns whether it existed."""


class MemoryBucket:
    """A bucket in memory."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._objects: dict[str, StoredObject] = {}
        self._names: list[str] | None = []

    def is_quick(self, name: str) -> bool:
        """Return True: nothing here reads a file."""
        return True

    def get(self, name: str) -> StoredObject | None:
        """Return the live generation of an object, or None."""
        return self._objects.get(name)

    def names(self) -> Sequence[str]:
        """Return all names, sorted; strings sort by code point, which is the byte order of UTF-8."""
        if self._names is None:
            self._names = sorted(self._objects)
        return self._names

    def put(self, name: str, data: bytes, attributes: Attributes, generation: int | None = None) -> StoredObject:
        """Store `data` as the new live generation of an object."""
        check_object_name(name)
        crc32c, md5 = digests([data])
        stored = StoredObject(
            bucket=self._bucket,
            name=name,
            generation=new_generation() if generation is None else generation,
            size_bytes=len(data),
            crc32c=crc32c,
            md5=None if attributes.composite else md5,
            updated=datetime.now(UTC),
            attributes=attributes,
            source=data,
        )
        if name not in self._objects:
            self._names = None
        self._objects[name] = stored
        return stored

    def delete(self, name: str) -> bool:
        """Delete an object; returns whether it existed."""
        if self._objects.pop(name, None) is None:
            return False
        self._names = None
        return True


def check_object_name(name: str) -> None:
    """Raise InvalidNameError for a name that GCS does not allow."""
    size_bytes = len(name.encode("utf-8", "surrogatepass"))
    if not 1 <= size_bytes <= MAX_NAME_BYTES:
        raise InvalidNameError(f"object name of {size_bytes:,} bytes: GCS allows 1 to {MAX_NAME_BYTES:,}")
    if name in {".", ".."} or "\r" in name or "\n" in name or name.startswith(".well-known/acme-challenge/"):
        raise InvalidNameError(f"object name {name!r}: GCS does not allow it")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise InvalidNameError(f"object name {name!r}: not valid Unicode")


def digests(chunks: Iterable[bytes]) -> tuple[str, str]:
    """Return crc32c and MD5 of the concatenated chunks, in base64 as GCS writes them."""
    crc32c, md5 = 0, hashlib.md5(usedforsecurity=False)
    for chunk in chunks:
        crc32c = google_crc32c.extend(crc32c, chunk)
        md5.update(chunk)
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode(), base64.b64encode(md5.digest()).decode()


class _Generations:
    """Generations that only grow, over all buckets of the process and all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        with self._lock:
            self._last = max(self._last + 1, time.time_ns() // 1000)
            return self._last


_generations = _Generations()


def new_generation() -> int:
    """Return a number larger than any before, in microseconds since 1970 as GCS's are."""
    return _generations.next()
