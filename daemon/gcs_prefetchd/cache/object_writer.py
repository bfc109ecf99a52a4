"""One object on its way from GCS into the cache: room reserved, bytes in `tmp/`, then stamped and renamed."""

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

from gcs_prefetchd.cache.cache import Cache, Room
from gcs_prefetchd.cache.reservation import Place
from gcs_prefetchd.cache.temp_file import FileSink, UnfinishedFile
from gcs_prefetchd.shared.checksums import Stamp
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = ["Download"]


class Download(FileSink):
    """A sink for `Origin.download` that ends in `publish`. Leaving the context without it leaves nothing behind.

    `room` says what may be dropped for it. Raises CacheFullError where there is no room and CacheWriteError where the disk
    refuses. The file belongs to the disk's thread, which does one thing after another, from the first byte there on.
    """

    def __init__(self, cache: Cache, name: ObjectName, room: Room | None = None) -> None:
        self._cache = cache
        self._place = Place(cache, name, room)
        super().__init__(UnfinishedFile(cache.directory, cache.folders, self._place.temporary, name, self._place.path))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._place.is_admitted:
            return
        if self._is_on_disk:
            await asyncio.shield(self._cache.hold(self._clean_up()))
        else:
            self._place.give_up()

    async def begin(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0."""
        await super().begin(version)
        await self._place.reserve(version.size)

    async def publish(self, version: ObjectVersion) -> None:
        """Give the file its final name. `version` is what the bytes were checked to be."""
        assert version.crc32c is not None
        await self._place.expect()
        stamp = Stamp(version.generation, version.size, version.crc32c)
        await self._finish(stamp)
        self._place.admit(stamp)

    async def _clean_up(self) -> None:
        # A cancelled download's thread may still be at it: this comes after it.
        with contextlib.suppress(OSError):  # no thread or no memory: its bytes, if any, go when the next daemon starts
            await self._make(self._file.discard)
        if self._file.published is not None:
            self._place.admit(self._file.published)  # cancelled when nothing could stop it any more
        else:
            self._place.give_up()

    async def _make(self, call: Callable[[], None]) -> None:
        await self._cache.disk.in_turn(call)

    def _landed(self, size_bytes: int) -> None:
        self._place.land(size_bytes)
