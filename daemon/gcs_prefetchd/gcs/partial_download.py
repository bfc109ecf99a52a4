"""What has come of an object over all tries, so that a download goes on where a connection broke off. No I/O."""

from collections.abc import Mapping

import google_crc32c

from gcs_prefetchd.gcs.responses import UnusableResponseError
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["PartialDownload"]


class PartialDownload:
    """The bytes of one generation from byte 0 on: how many, and their crc32c. Where they are is the sink's business.

    What is wrong is found when all have come, for the crc32c is the whole object's, and all is forgotten then: the next try
    begins at byte 0.
    """

    def __init__(self) -> None:
        self.version: ObjectVersion | None = None
        self.bytes = 0
        self._crc32c = 0

    def start(self, version: ObjectVersion | None) -> None:
        """Nothing has come of this version; None: it is not known of which the next byte will be."""
        self.version = version
        self.bytes = self._crc32c = 0

    def add(self, chunk: bytes) -> None:
        """The next bytes; raises UnusableResponseError where they are more than the object has."""
        assert self.version is not None
        size = self.version.size
        self.bytes += len(chunk)
        if self.bytes > size:
            self.start(None)
            raise UnusableResponseError("size", f"received more than the object's {size} bytes")
        self._crc32c = google_crc32c.extend(self._crc32c, chunk)

    def whole(self) -> ObjectVersion:
        """What came, now that an answer has ended in order; raises UnusableResponseError where that is not the object."""
        version, received, crc32c = self.version, self.bytes, self._crc32c
        assert version is not None
        self.start(None)
        if received != version.size:
            raise UnusableResponseError("size", f"received {received} of {version.size} bytes")
        if version.crc32c is not None and crc32c != version.crc32c:
            raise UnusableResponseError("crc32c", f"received crc32c {crc32c:08x}, expected {version.crc32c:08x}")
        return ObjectVersion(version.name, version.generation, version.size, crc32c)

    def started(self) -> ObjectVersion | None:
        """The version whose rest is worth asking for; None where a download begins at byte 0.

        Without a crc32c the first part might be of anything.
        """
        version = self.version
        is_begun = version is not None and version.crc32c is not None and 0 < self.bytes < version.size
        return version if is_begun else None

    def is_followed_by(self, headers: Mapping[str, str]) -> bool:
        """Whether a 206 with these headers holds just what is missing."""
        assert self.version is not None
        size, generation = self.version.size, str(self.version.generation)
        asked = f"bytes {self.bytes}-{size - 1}/{size}"
        return headers.get("Content-Range") == asked and headers.get("x-goog-generation", generation) == generation
