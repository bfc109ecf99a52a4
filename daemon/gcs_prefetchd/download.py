"""One object on its way from GCS into the cache: room reserved, bytes in `tmp/`, then stamped and renamed."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from gcs_prefetchd.cache import Cache, Room
from gcs_prefetchd.errors import CacheFullError, CacheWriteError
from gcs_prefetchd.names import ObjectName, cache_path, name_of
from gcs_prefetchd.stamp import Stamp
from gcs_prefetchd.tree import publish
from gcs_prefetchd.versions import ObjectVersion

__all__ = ["Download"]

# Below this an object is written in one go, in the same hop to a disk thread that publishes it.
BUFFER_BYTES = 1 << 20
MOST_CHUNKS = 1024  # the kernel's IOV_MAX


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
        self._unfinished = cache.directory.temporary()
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._reserved_bytes = self._landed_bytes = 0
        self._expected = False
        # What follows belongs to the disk's thread, which does one thing after another, from the first byte there on.
        self._on_its_way = False
        self._file: int | None = None
        self._published: Stamp | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._on_its_way:
            await asyncio.shield(self._cache.hold(self._clean_up()))
        else:
            self._give_up()

    async def begin(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0."""
        self._chunks.clear()
        self._buffered = 0
        if self._on_its_way:
            await self._on_disk(self._truncate)
            self._land(-self._landed_bytes)
        if version.size != self._reserved_bytes:
            self._release()
            try:
                await self._cache.reserve(version.size, self._room)
            except (CacheFullError, CacheWriteError) as exc:
                raise type(exc)(f"cache {self._name.uri}: {exc}") from exc
            self._reserved_bytes = version.size

    async def write(self, chunk: bytes) -> None:
        """The next bytes."""
        self._chunks.append(chunk)
        self._buffered += len(chunk)
        if self._buffered >= BUFFER_BYTES:
            chunks, self._chunks, size_bytes, self._buffered = self._chunks, [], self._buffered, 0
            await self._on_disk(partial(self._append, chunks))
            self._land(size_bytes)

    async def publish(self, version: ObjectVersion) -> None:
        """Give the file its final name. `version` is what the bytes were checked to be."""
        assert version.crc32c is not None
        await self._cache.expect(self._path)
        self._expected = True
        stamp = Stamp(version.generation, version.size, version.crc32c)
        await self._on_disk(partial(self._finish, stamp))
        self._on_its_way = False
        self._admit(stamp)

    async def _clean_up(self) -> None:
        # A cancelled download's thread may still be at it: this comes after it.
        with contextlib.suppress(OSError):  # no thread or no memory: its bytes, if any, go when the next daemon starts
            await self._cache.disk.in_turn(self._discard)
        if self._published is not None:
            self._admit(self._published)  # cancelled when nothing could stop it any more
        else:
            self._give_up()

    def _admit(self, stamp: Stamp) -> None:
        """In one step, for the bytes are either reserved or in the cache, and never counted twice."""
        self._release()
        self._expected = False
        self._cache.admit(self._path, stamp)

    def _give_up(self) -> None:
        if self._expected:
            self._cache.give_up(self._path)
        self._release()

    def _land(self, size_bytes: int) -> None:
        self._landed_bytes += size_bytes
        self._cache.landed_bytes += size_bytes

    def _release(self) -> None:
        self._land(-self._landed_bytes)
        self._cache.release(self._reserved_bytes)
        self._reserved_bytes = 0

    def _append(self, chunks: list[bytes]) -> None:
        if self._file is None:
            self._file = self._cache.directory.open_temporary(self._unfinished)
        _write_all(self._file, chunks)

    def _truncate(self) -> None:
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)

    def _finish(self, stamp: Stamp) -> None:
        self._append(self._chunks)
        assert self._file is not None
        hashed_name = self._name if name_of(self._path) is None else None
        publish(self._file, self._unfinished, self._cache.folders, self._path, stamp, hashed_name)
        self._published = stamp
        self._close()

    def _discard(self) -> None:
        self._close()
        if self._published is None:
            self._cache.directory.discard_temporary(self._unfinished)

    def _close(self) -> None:
        file, self._file = self._file, None  # closed once, whatever happens: its number may be another file's by then
        if file is not None:
            with contextlib.suppress(OSError):  # bytes that have not reached the disk are a miss to whoever reads them
                os.close(file)

    async def _on_disk(self, call: Callable[[], None]) -> None:
        self._on_its_way = True
        try:
            await self._cache.disk.in_turn(call)
        except OSError as exc:
            raise CacheWriteError(f"cache {self._name.uri}: {exc.strerror} ({self._cache.directory.path})") from exc


def _write_all(file: int, chunks: list[bytes]) -> None:
    """Write the chunks, as a rule by one system call: each time a thread comes back from one it stands in line for the GIL."""
    left: list[bytes | memoryview] = list(chunks)
    while left:
        written = os.writev(file, left[:MOST_CHUNKS])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = memoryview(left[0])[written:]
