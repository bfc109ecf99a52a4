"""The space and the path that the daemon reserves for one object on its way into the cache."""

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.object_writer import ObjectWriter
from gcs_prefetchd.cache.observer import ChooseVictims
from gcs_prefetchd.cache.temp_file import TempFile
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.errors import CacheFullError, CacheWriteError
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Reservation"]


class Reservation:
    """Every reservation ends in `commit` or `release`. `choose_victims` chooses what to evict for it (default: the observer).

    The daemon's `Space` of an `ObjectWriter`, in the daemon itself or in one of its fetch processes.
    """

    def __init__(self, cache: Cache, name: ObjectName, choose_victims: ChooseVictims | None = None) -> None:
        self.path = cache_path(name.bucket, name.name)
        self.temp_path = cache.directory.new_temp_path()
        self.is_committed = False
        self._cache = cache
        self._name = name
        self._choose_victims = choose_victims
        self._reserved_bytes = self._written_bytes = 0
        self._has_path = False

    async def reserve(self, size_bytes: int) -> None:
        """Reserve this many bytes in all, and then the path. Raises CacheFullError or CacheWriteError, which name the object.

        In this order: the file that the object replaces may be evicted for it.
        """
        if self._has_path and size_bytes == self._reserved_bytes:
            return
        self.release()
        try:
            if size_bytes:  # an empty object needs no space: it neither waits for recovery nor evicts anything
                await self._cache.reserve(size_bytes, self._choose_victims)
        except (CacheFullError, CacheWriteError) as exc:
            raise type(exc)(f"cache {self._name.uri}: {exc}") from exc
        self._reserved_bytes = size_bytes
        try:
            await self._cache.paths.claim(self.path)
        except BaseException:
            self.release()
            raise
        self._has_path = True

    def use_new_temp_path(self) -> None:
        """Write to another temporary file from now on."""
        self.temp_path = self._cache.directory.new_temp_path()

    def set_written(self, size_bytes: int) -> None:
        """Record how many of the reserved bytes are on the disk now."""
        self._cache.capacity.written_bytes += size_bytes - self._written_bytes
        self._written_bytes = size_bytes

    def commit(self, stamp: Stamp) -> None:
        """The file is published. In one step: its bytes are either reserved or cached, and never counted twice."""
        self._release_bytes()
        self._has_path = False
        self.is_committed = True
        self._cache.paths.commit(self.path, stamp)

    def release(self) -> None:
        """The file will not be published: release the reserved bytes and the path."""
        if self._has_path:
            self._cache.paths.abandon(self.path)
            self._has_path = False
        self._release_bytes()

    def writer(self) -> ObjectWriter:
        """The daemon's own writer of the object: the cache's file thread writes it, and the writer ends this reservation."""
        file = TempFile(self._cache.directory, self._cache.folders, self.temp_path, self._name, self.path)
        return ObjectWriter(file, self, self._cache.io.files, hold=self._cache.paths.hold)

    def _release_bytes(self) -> None:
        self.set_written(0)
        self._cache.capacity.release(self._reserved_bytes)
        self._reserved_bytes = 0
