"""An object's place in the cache while it comes: its room, its path, and the moment in which it is there."""

from gcs_prefetchd.cache.cache import Cache, Room
from gcs_prefetchd.shared.checksums import Stamp
from gcs_prefetchd.shared.errors import CacheFullError, CacheWriteError
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Place"]


class Place:
    """Ends in `admit` or in `give_up`. `room` says what may be dropped for it."""

    def __init__(self, cache: Cache, name: ObjectName, room: Room | None = None) -> None:
        self.path = cache_path(name.bucket, name.name)
        self.temporary = cache.directory.temporary()
        self._cache = cache
        self._name = name
        self._room = room
        self._reserved_bytes = self._landed_bytes = 0
        self._expected = False
        self.is_admitted = False

    async def reserve(self, size_bytes: int) -> None:
        """Have so much room in all. Raises CacheFullError or CacheWriteError, that name the object."""
        if size_bytes == self._reserved_bytes:
            return
        self._release()
        try:
            await self._cache.reserve(size_bytes, self._room)
        except (CacheFullError, CacheWriteError) as exc:
            raise type(exc)(f"cache {self._name.uri}: {exc}") from exc
        self._reserved_bytes = size_bytes

    def land(self, size_bytes: int) -> None:
        """So many of the bytes are on the disk now."""
        self._cache.landed_bytes += size_bytes - self._landed_bytes
        self._landed_bytes = size_bytes

    async def expect(self) -> None:
        """Returns when the file may be published."""
        await self._cache.expect(self.path)
        self._expected = True

    def admit(self, stamp: Stamp) -> None:
        """It has been. In one step, for the bytes are either reserved or in the cache, and never counted twice."""
        self._release()
        self._expected = False
        self.is_admitted = True
        self._cache.admit(self.path, stamp)

    def give_up(self) -> None:
        """It will not be."""
        if self._expected:
            self._cache.give_up(self.path)
            self._expected = False
        self._release()

    def _release(self) -> None:
        self.land(0)
        self._cache.release(self._reserved_bytes)
        self._reserved_bytes = 0
