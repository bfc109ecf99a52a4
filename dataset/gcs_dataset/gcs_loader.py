"""Images straight from GCS, one request an image: the loader of those without a daemon, and everyone's fallback."""

import base64
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from PIL import Image

from gcs_dataset.background_call import call_in_background
from gcs_dataset.decode import decode
from gcs_dataset.gcs_client import SOCKET_TIMEOUT_S, retrying, storage_client
from gcs_prefetchd.shared.checksums import crc32c_of
from gcs_prefetchd.shared.errors import WrongBytesError
from gcs_prefetchd.shared.objects import ObjectName, parse_object_uri

__all__ = ["GCSLoader", "checksum_of_base64", "gcs_pil_loader"]

DEADLINE_S = 120.0


class GCSLoader:
    """A loader of `gs://` URIs: `loader(uri)` is a PIL image. Holds settings only, so any process can have a copy.

    Follows google-cloud-storage's conventions: application default credentials, or STORAGE_EMULATOR_HOST for a stand-in. Every
    object's size and crc32c are checked. What may pass (408, 429, 5xx, lost connections, damaged bodies) is tried again
    until `deadline_s` after the start. `user_project` pays for buckets whose owner has the requester pay.
    """

    def __init__(self, deadline_s: float = DEADLINE_S, *, user_project: str | None = None) -> None:
        self.deadline_s = deadline_s
        self.user_project = user_project

    def __call__(self, uri: str, mode: str | None = "RGB") -> Image.Image:
        """The image, converted to `mode`; None keeps the stored mode.

        Raises ItemError where the object is no image, ObjectMissingError, AccessDeniedError, CredentialsError, and
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
        """The object's bytes as they are stored; raises as a call does."""
        name = parse_object_uri(uri)
        return retrying(uri, partial(_download, name, self.user_project), self.deadline_s)


gcs_pil_loader = GCSLoader()
"""Loads one image: `gcs_pil_loader("gs://bucket/images/7.jpg")`."""


def _download(name: ObjectName, user_project: str | None) -> bytes:
    # client.bucket() asks nothing; get_bucket() would be one more request, and a permission that readers often lack.
    blob = storage_client().bucket(name.bucket, user_project=user_project).blob(name.name)
    # Stored bytes, so that a hit and a miss are the same; its own retries off, for there is one around all of this.
    # Its own check off as well: it raises ValueError for a header without a "=", and takes no other hash for one that is none.
    data: bytes = blob.download_as_bytes(raw_download=True, checksum=None, retry=None, timeout=SOCKET_TIMEOUT_S)
    _check(data, blob)
    return data


def _check(data: bytes, blob: Any) -> None:
    """Raise WrongBytesError unless these are the object's bytes."""
    named = None
    with suppress(WrongBytesError):
        named = _named_checksum(blob)
    if named is None:
        # No hash in the answer: it may be a proxy's. GCS's metadata always have one.
        blob.reload(retry=None, timeout=SOCKET_TIMEOUT_S)
        named = _named_checksum(blob)
        if blob.size != len(data):
            raise WrongBytesError(f"{len(data)} of {blob.size} bytes came")
    if named is not None and crc32c_of(data) != named:
        raise WrongBytesError(f"{len(data)} bytes came whose crc32c is not {blob.crc32c}")


def _named_checksum(blob: Any) -> int | None:
    return None if blob.crc32c is None else checksum_of_base64(blob.crc32c)


def checksum_of_base64(text: str) -> int:
    """A crc32c as GCS writes it: base64 of 4 big-endian bytes. Raises WrongBytesError where it is none."""
    try:
        (checksum,) = struct.unpack(">I", base64.b64decode(text, validate=True))
    except (ValueError, struct.error) as exc:
        raise WrongBytesError(f"GCS names the crc32c {text!r}, which is none") from exc
    return int(checksum)
