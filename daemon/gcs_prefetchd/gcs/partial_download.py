"""A download that broke: what was received of it, and how the next attempt resumes it with a Range request. No I/O."""

from collections.abc import Mapping

import google_crc32c

from gcs_prefetchd.gcs.responses import UnusableResponseError
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["PartialDownload"]


class PartialDownload:
    """The received bytes of one generation, from byte 0 on: their count and crc32c. The sink stores the bytes themselves.

    Damage is found only when all bytes have arrived, because the crc32c covers the complete object. Then the next attempt
    starts again at byte 0.
    """

    def __init__(self) -> None:
        self.version: ObjectVersion | None = None
        self.received_bytes = 0
        self._crc32c = 0

    def start(self, version: ObjectVersion | None) -> None:
        """Start again at byte 0, of this version; None: which version is not known until the next response."""
        self.version = version
        self.received_bytes = self._crc32c = 0

    def add(self, chunk: bytes) -> None:
        """Add the next bytes. Raises UnusableResponseError if they exceed the object's size."""
        assert self.version is not None
        size = self.version.size
        self.received_bytes += len(chunk)
        if self.received_bytes > size:
            self.start(None)
            raise UnusableResponseError("size", f"received more than the object's {size} bytes")
        self._crc32c = google_crc32c.extend(self._crc32c, chunk)

    def finish(self) -> ObjectVersion:
        """Check and return the received version after a response ended normally. Raises UnusableResponseError if it differs."""
        version, received_bytes, crc32c = self.version, self.received_bytes, self._crc32c
        assert version is not None
        self.start(None)
        if received_bytes != version.size:
            raise UnusableResponseError("size", f"received {received_bytes} of {version.size} bytes")
        if version.crc32c is not None and crc32c != version.crc32c:
            raise UnusableResponseError("crc32c", f"received crc32c {crc32c:08x}, expected {version.crc32c:08x}")
        return ObjectVersion(version.name, version.generation, version.size, crc32c)

    def resumable_version(self) -> ObjectVersion | None:
        """The version whose remaining bytes to request; None if the download must start at byte 0.

        Without a crc32c the received part could belong to any object.
        """
        version = self.version
        is_partial = version is not None and version.crc32c is not None and 0 < self.received_bytes < version.size
        return version if is_partial else None

    @property
    def range_header(self) -> str:
        """The Range header that requests the missing bytes."""
        return f"bytes={self.received_bytes}-"

    def is_continued_by(self, headers: Mapping[str, str]) -> bool:
        """Whether a 206 response with these headers holds exactly the missing bytes."""
        assert self.version is not None
        size, generation = self.version.size, str(self.version.generation)
        expected = f"bytes {self.received_bytes}-{size - 1}/{size}"
        return headers.get("Content-Range") == expected and headers.get("x-goog-generation", generation) == generation
