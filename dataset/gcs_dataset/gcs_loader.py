"""Reads images directly from GCS, one request an image: the loader without a daemon, and the fallback with one."""

import base64
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from PIL import Image

from gcs_dataset.background_call import call_in_background
from gcs_dataset.decode import decode
from gcs_dataset.gcs_client import SOCKET_TIMEOUT_S, call_with_retries, storage_client
from gcs_prefetchd.shared.checked_read import crc32c_of
from gcs_prefetchd.shared.errors import WrongBytesError
from gcs_prefetchd.shared.objects import ObjectName, parse_object_uri

__all__ = ["GCSLoader", "checksum_of_base64", "gcs_pil_loader"]

DEADLINE_S = 120.0


class GCSLoader:
    """A loader of `gs://` URIs: `loader(uri)` is a PIL image. Holds settings only, so any process can have a copy.

    Follows google-cloud-storage's conventions: application default credentials, or STORAGE_EMULATOR_HOST for an emulator. Every
    object's size and crc32c are checked. Transient errors (408, 429, 5xx, lost connections, damaged bodies) are retried until
    `deadline_s` after the start. `user_project` is billed for requester-pays buckets.
    """

    def __init__(self, deadline_s: float = DEADLINE_S, *, user_project: str | None = None) -> None:
        self.deadline_s = deadline_s
        self.user_project = user_project

    def __call__(self, uri: str, mode: str | None = "RGB") -> Image.Image:
        """The image, converted to `mode`; None keeps the stored mode.

        Raises ItemError if the object is not an image, ObjectMissingError, AccessDeniedError, CredentialsError, and
        OriginUnavailableError at the deadline.
        """
        return decode(self.read(uri), uri, mode)

    def load_many(self, uris: Sequence[str], modes: Sequence[str | None]) -> list[Image.Image]:
        """The images of several URIs, fetched at the same time."""
        if not uris:
            return []
        others = [call_in_background(partial(self.read, uri)) for uri in uris[1:]]
        data = [self.read(uris[0]), *(fetch.result() for fetch in others)]
        return [decode(one, uri, mode) for one, uri, mode in zip(data, uris, modes, strict=True)]

    def read(self, uri: str) -> bytes:
        """The object's bytes as stored; raises as a call does, except for ItemError."""
        name = parse_object_uri(uri)
        return call_with_retries(uri, partial(_download, name, self.user_project), self.deadline_s)


gcs_pil_loader = GCSLoader()
"""Loads one image: `gcs_pil_loader("gs://bucket/images/7.jpg")`."""


def _download(name: ObjectName, user_project: str | None) -> bytes:
    # client.bucket() sends no request; get_bucket() would send one, and needs a permission that readers often lack.
    blob = storage_client().bucket(name.bucket, user_project=user_project).blob(name.name)
    # Stored bytes, so that a hit and a miss are the same. The library's own retries are off: call_with_retries has its own. Its
    # check is off as well: it raises ValueError for a header without a "=", and finds no other hash for an invalid one.
    data: bytes = blob.download_as_bytes(raw_download=True, checksum=None, retry=None, timeout=SOCKET_TIMEOUT_S)
    _check(data, blob)
    return data


def _check(data: bytes, blob: Any) -> None:
    """Raise WrongBytesError unless these are the object's bytes."""
    expected = None
    with suppress(WrongBytesError):
        expected = _checksum_of(blob)
    if expected is None:
        # No hash in the response: it may be a proxy's. GCS's metadata always has one.
        blob.reload(retry=None, timeout=SOCKET_TIMEOUT_S)
        expected = _checksum_of(blob)
        if blob.size != len(data):
            raise WrongBytesError(f"received {len(data)} of {blob.size} bytes")
    if expected is not None and crc32c_of(data) != expected:
        raise WrongBytesError(f"received {len(data)} bytes whose crc32c is not {blob.crc32c}")


def _checksum_of(blob: Any) -> int | None:
    return None if blob.crc32c is None else checksum_of_base64(blob.crc32c)


def checksum_of_base64(text: str) -> int:
    """A crc32c as GCS writes it: base64 of 4 big-endian bytes. Raises WrongBytesError if it is not one."""
    try:
        (checksum,) = struct.unpack(">I", base64.b64decode(text, validate=True))
    except (ValueError, struct.error) as exc:
        raise WrongBytesError(f"GCS sent {text!r}, which is not a valid crc32c") from exc
    return int(checksum)
