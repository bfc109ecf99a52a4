"""One object on its way from GCS into the cache: room reserved, bytes in `tmp/`, then stamped and renamed."""

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self

from gcs_prefetchd.cache import Cache, Room
from gcs_prefetchd.errors import CacheWriteError
from gcs_prefetchd.manifest import ObjectVersion
from gcs_prefetchd.names import ObjectName, cache_path, name_of
from gcs_prefetchd.stamp import Stamp
from gcs_prefetchd.tree import publish, unlink_all

__all__ = ["Download"]

# Below this an object is written in one go, in the same hop to a disk thread that publishes it.
BUFFER_BYTES = 1 << 20

P = ParamSpec("P")


class Download:
    """A sink for `Origin.download` that ends in `publish`. Leaving the context without it leaves nothing behind.

    `room` says what may be dropped for it. Raises CacheFullError where there is no room and CacheWriteError where the disk
    refuses.
    """

    def __init__(self, cache: Cache, name: ObjectName, room: Room | None = None) -> None:
        self._cache = cache
        self._name = name
        self._room = room
        self._path = cache_path(name.bucket, name.name)
        self._unfinished: Path = cache.directory.tmp / uuid.uuid4().hex
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._reserved_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._stamp: Stamp | None = None  # once the file is on its way to its final name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writing is None:
            self._release()
        else:
            await asyncio.shield(self._cache.hold(self._clean_up(self._writing)))

    async def begin(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0."""
        self._chunks.clear()
        self._buffered = 0
        if self._writing is not None:
            await self._on_disk(_truncate, self._unfinished)
        if version.size != self._reserved_bytes:
            self._release()
            await self._cache.reserve(version.size, self._room)
            self._reserved_bytes = version.size

    async def write(self, chunk: bytes) -> None:
        """The next bytes."""
        self._chunks.append(chunk)
        self._buffered += len(chunk)
        if self._buffered >= BUFFER_BYTES:
            chunks, self._chunks, self._buffered = self._chunks, [], 0
            await self._on_disk(_append, self._unfinished, chunks)

    async def publish(self, version: ObjectVersion) -> None:
        """Give the file its final name. `version` is what the bytes were checked to be."""
        assert version.crc32c is not None
        await self._cache.expect(self._path)
        self._stamp = Stamp(version.generation, version.size, version.crc32c)
        await self._on_disk(self._finish, self._stamp)
        self._admit(self._stamp)

    async def _clean_up(self, writing: asyncio.Task[None]) -> None:
        # A cancelled download's thread may still be at it, and would write into what is removed here.
        await asyncio.wait([writing])
        if self._stamp is not None and writing.exception() is None:
            self._admit(self._stamp)  # cancelled when nothing could stop it any more
            return
        self._cache.give_up(self._path)
        await self._cache.on_disk(unlink_all, [self._unfinished])
        self._release()

    def _admit(self, stamp: Stamp) -> None:
        """In one step, for the bytes are either reserved or in the cache, and never counted twice."""
        self._writing = None
        self._release()
        self._cache.admit(self._path, stamp)

    def _release(self) -> None:
        self._cache.release(self._reserved_bytes)
        self._reserved_bytes = 0

    def _finish(self, stamp: Stamp) -> None:
        _append(self._unfinished, self._chunks)
        hashed_name = self._name if name_of(self._path) is None else None
        publish(self._unfinished, self._cache.directory.objects, self._path, stamp, hashed_name)

    async def _on_disk(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        self._writing = asyncio.create_task(self._cache.on_disk(call, *args, **kwargs))
        try:
            await asyncio.shield(self._writing)
        except OSError as exc:
            raise CacheWriteError(f"cache {self._name.uri}: {exc.strerror} ({self._cache.directory.path})") from exc


def _truncate(file: Path) -> None:
    with file.open("wb"):
        pass


def _append(file: Path, chunks: list[bytes]) -> None:
    with file.open("ab", buffering=0) as stream:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[stream.write(view) :]
