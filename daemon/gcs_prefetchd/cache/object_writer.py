"""Writes one object into the cache: reserves space, buffers, writes to `tmp/`, then stamps and renames; or discards."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

from gcs_prefetchd.cache.batch_thread import BatchThread
from gcs_prefetchd.cache.temp_file import TempFile
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["BUFFER_BYTES", "ObjectWriter", "Space"]

BUFFER_BYTES = 1 << 20  # a smaller object is written in one go, by the same call that publishes it


class Space(Protocol):
    """Accounts for an object's bytes, and for the path at which it will be published."""

    async def reserve(self, size_bytes: int) -> None:
        """Reserve this many bytes in all, and the path. Raises CacheFullError or CacheWriteError, which name the object."""

    def set_written(self, size_bytes: int) -> None:
        """Record how many of the reserved bytes are on the disk now."""

    def commit(self, stamp: Stamp) -> None:
        """The file is published: its bytes are in the cache and no longer reserved."""

    def release(self) -> None:
        """The file will not be published: release the reserved bytes and the path."""


class ObjectWriter:
    """A sink of `Downloader.download`. Leaving the context without `publish` leaves nothing behind.

    The daemon and its fetch processes differ in what they pass in: `space` accounts for the bytes, and `file_thread` makes the
    blocking calls. Objects smaller than `inline_below_bytes` are written by the calling thread instead: their bytes are still
    in the processor's cache. `hold` makes a task of the clean-up, which must run to its end even if the caller is cancelled.

    Raises what `space` raises, and CacheWriteError if the disk fails. The file belongs to the thread that makes the blocking
    calls, one after another, from its first byte on.
    """

    def __init__(
        self,
        file: TempFile,
        space: Space,
        file_thread: BatchThread,
        *,
        inline_below_bytes: int = 0,
        hold: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]] = asyncio.create_task,
    ) -> None:
        self._file = file
        self._space = space
        self._file_thread = file_thread
        self._inline_below_bytes = inline_below_bytes
        self._hold = hold
        self._is_inline = False
        self._chunks: list[bytes] = []
        self._buffered_bytes = self._written_bytes = 0
        self._is_on_disk = False  # some of it is, or is on its way there
        self._is_committed = False

    @property
    def published(self) -> Stamp | None:
        """The published file's stamp, or None. Reliable after the context is left: a cancelled `publish` may succeed."""
        return self._file.published

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_committed:
            return
        if self._is_on_disk:
            await asyncio.shield(self._hold(self._clean_up()))
        else:
            self._space.release()

    async def start(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0."""
        # A fetch process, the only one to write inline, fetches one generation: the choice is the same for each attempt.
        self._is_inline = version.size < self._inline_below_bytes
        self._chunks.clear()
        self._buffered_bytes = self._written_bytes = 0
        if self._is_on_disk:
            await self._on_disk(self._file.truncate)
            self._space.set_written(0)
        await self._space.reserve(version.size)

    async def write(self, chunk: bytes) -> None:
        """Write the next bytes."""
        self._chunks.append(chunk)
        self._buffered_bytes += len(chunk)
        if self._buffered_bytes >= BUFFER_BYTES:
            chunks, self._chunks, size_bytes, self._buffered_bytes = self._chunks, [], self._buffered_bytes, 0
            await self._on_disk(partial(self._file.write, chunks))
            self._written_bytes += size_bytes
            self._space.set_written(self._written_bytes)

    async def publish(self, version: ObjectVersion) -> None:
        """Give the file its final name. `version` is what the bytes were checked to be."""
        assert version.crc32c is not None
        stamp = Stamp(version.generation, version.size, version.crc32c)
        chunks: Sequence[bytes] = self._chunks
        await self._on_disk(partial(self._file.publish, chunks, stamp))
        self._commit(stamp)

    async def _clean_up(self) -> None:
        # The thread may still be working on a cancelled download: this call runs after that work.
        with contextlib.suppress(OSError):  # no thread or no memory: the next daemon to start removes the file, if any
            await self._call(self._file.discard)
        if self._file.published is not None:
            self._commit(self._file.published)  # cancelled too late to stop it
        else:
            self._space.release()

    def _commit(self, stamp: Stamp) -> None:
        self._is_committed = True
        self._space.commit(stamp)

    async def _on_disk(self, call: Callable[[], None]) -> None:
        self._is_on_disk = True
        try:
            await self._call(call)
        except OSError as exc:
            raise self._file.write_error(exc) from exc

    async def _call(self, call: Callable[[], None]) -> None:
        """Make a blocking call, after all those before it."""
        if self._is_inline:
            call()
        else:
            await self._file_thread.submit(call)
