"""One object on its way from GCS into the cache: room reserved, bytes in `tmp/`, then stamped and renamed."""

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from gcs_prefetchd.cache import Cache, Room
from gcs_prefetchd.errors import CacheWriteError
from gcs_prefetchd.names import ObjectName
from gcs_prefetchd.place import Place
from gcs_prefetchd.stamp import Stamp
from gcs_prefetchd.unfinished import UnfinishedFile
from gcs_prefetchd.versions import ObjectVersion

__all__ = ["Download"]

# Below this an object is written in one go, in the same hop to a disk thread that publishes it.
BUFFER_BYTES = 1 << 20


class Download:
    """A sink for `Origin.download` that ends in `publish`. Leaving the context without it leaves nothing behind.

    `room` says what may be dropped for it. Raises CacheFullError where there is no room and CacheWriteError where the disk
    refuses.
    """

    def __init__(self, cache: Cache, name: ObjectName, room: Room | None = None) -> None:
        self._cache = cache
        self._name = name
        self._place = Place(cache, name, room)
        self._chunks: list[bytes] = []
        self._buffered = 0
        # Belongs to the disk's thread, which does one thing after another, from the first byte there on.
        self._file = UnfinishedFile(cache.directory, cache.folders, self._place.temporary, name, self._place.path)
        self._on_its_way = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._on_its_way:
            await asyncio.shield(self._cache.hold(self._clean_up()))
        elif self._file.published is None:
            self._place.give_up()

    async def begin(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0."""
        self._chunks.clear()
        self._buffered = 0
        if self._on_its_way:
            await self._on_disk(self._file.truncate)
            self._place.lift()
        await self._place.reserve(version.size)

    async def write(self, chunk: bytes) -> None:
        """The next bytes."""
        self._chunks.append(chunk)
        self._buffered += len(chunk)
        if self._buffered >= BUFFER_BYTES:
            chunks, self._chunks, size_bytes, self._buffered = self._chunks, [], self._buffered, 0
            await self._on_disk(partial(self._file.append, chunks))
            self._place.land(size_bytes)

    async def publish(self, version: ObjectVersion) -> None:
        """Give the file its final name. `version` is what the bytes were checked to be."""
        assert version.crc32c is not None
        await self._place.expect()
        stamp = Stamp(version.generation, version.size, version.crc32c)
        await self._on_disk(partial(self._finish, stamp))
        self._on_its_way = False
        self._place.admit(stamp)

    def _finish(self, stamp: Stamp) -> None:
        self._file.append(self._chunks)
        self._file.publish(stamp)

    async def _clean_up(self) -> None:
        # A cancelled download's thread may still be at it: this comes after it.
        with contextlib.suppress(OSError):  # no thread or no memory: its bytes, if any, go when the next daemon starts
            await self._cache.disk.in_turn(self._file.discard)
        if self._file.published is not None:
            self._place.admit(self._file.published)  # cancelled when nothing could stop it any more
        else:
            self._place.give_up()

    async def _on_disk(self, call: Callable[[], None]) -> None:
        self._on_its_way = True
        try:
            await self._cache.disk.in_turn(call)
        except OSError as exc:
            raise CacheWriteError(f"cache {self._name.uri}: {exc.strerror} ({self._cache.directory.path})") from exc
