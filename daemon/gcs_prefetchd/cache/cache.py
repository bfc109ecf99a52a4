"""The cache: ordinary files under `objects/`, bounded in bytes, with an index of what is cached and when it was last used.

Its state lives on the event loop; threads do everything that touches the disk. A file appears under its final name only when it
is complete and checked, and is never rewritten, only unlinked. Space is reserved before a byte is written.

After a start the cache recovers: it loads the index, and after a crash, when the index lacks the latest files, it compares the
index with the files. Until that is done the cache is not ready, and reserves no space, so that the size limit holds; files that
readers need are looked up on the disk.
"""

import asyncio
import logging
from collections.abc import Iterator
from functools import partial

from gcs_prefetchd.cache.capacity import Capacity
from gcs_prefetchd.cache.consistency_check import find_disagreements
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.disk_index import INDEX_ERRORS, DiskIndex
from gcs_prefetchd.cache.index_writer import IndexWriter
from gcs_prefetchd.cache.io_threads import IOThreads, free_bytes
from gcs_prefetchd.cache.memory_index import MemoryIndex
from gcs_prefetchd.cache.observer import CacheObserver, ChooseVictims, LeastRecentlyUsed
from gcs_prefetchd.cache.path_lifecycle import PathLifecycle
from gcs_prefetchd.cache.recovery import PAGE_ENTRIES, Recovery, index_pages
from gcs_prefetchd.cache.safe_folders import SafeFolders
from gcs_prefetchd.shared.byte_sizes import format_size
from gcs_prefetchd.shared.checked_read import Stamp, is_intact
from gcs_prefetchd.shared.errors import CacheFullError, CacheWriteError

__all__ = ["Cache"]

log = logging.getLogger(__name__)


class Cache:
    """The objects of one claimed directory. `open` it before use and `close` it after; the directory stays its owner's.

    The size limit and the free-space floor hold at every moment: downloads in progress count with the bytes they reserved.
    `observer` is notified of every change, except of what recovery finds, and chooses what to evict.
    """

    def __init__(
        self, directory: CacheDirectory, limit_bytes: int, min_free_bytes: int = 0, observer: CacheObserver | None = None
    ) -> None:
        self.directory = directory
        self.folders = SafeFolders(directory.objects, directory.check_ours)
        self.io = IOThreads(before_batch=self.folders.forget)
        self.capacity = Capacity(limit_bytes, min_free_bytes)
        self.observer = observer or LeastRecentlyUsed()
        self.choose_victims: ChooseVictims = partial(self.observer.choose_victims, files=self)
        self.evictions = 0
        self.damaged = 0
        self._index: DiskIndex | None = None
        self._writer = IndexWriter(self.io.run_on_index)
        self._memory_index = MemoryIndex(self._writer.note)
        self.paths = PathLifecycle(self._memory_index, self.observer, self.io, self.folders)
        self._recovery = Recovery(directory, self._memory_index, self.paths, self.io, self._writer, self.observer, self.shrink)
        self._closing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start to recover; `wait_until_ready` waits for the end. Raises CacheWriteError if no index can be created."""
        try:
            self._index = await self.io.run_on_index(DiskIndex, self.directory.index)
        except BaseException:
            await self.close()
            raise
        self._recovery.start(self._index)

    async def wait_until_ready(self) -> None:
        """Wait until every cached file is known. Raises the CacheWriteError that prevented it."""
        await self._recovery.wait()

    @property
    def is_ready(self) -> bool:
        """Whether every cached file is known."""
        return self._recovery.is_complete

    async def close(self) -> None:
        """Write what the index lacks and stop the threads. A cancelled caller does not stop it."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="close cache")
        await asyncio.shield(self._closing)

    def __len__(self) -> int:
        return len(self._memory_index)

    @property
    def bytes(self) -> int:
        """The bytes of all cached objects."""
        return self._memory_index.bytes

    def stamp(self, path: str) -> Stamp | None:
        """The stamp of the file cached at this path (`paths.cache_path`), or None. Does not count as a use."""
        return self._memory_index.get(path)

    def pages(self) -> Iterator[list[str]]:
        """The cached paths, least recently used first; the event loop can handle one page at a time.

        Paths that change between two pages may appear, or not, or twice.
        """
        return self._memory_index.pages(PAGE_ENTRIES)

    def touch(self, path: str) -> None:
        """Count a use."""
        self._memory_index.touch(path)

    def record_open(self, path: str) -> None:
        """Another program opened the file: count a use that no reader reports."""
        if self._memory_index.touch(path):
            self.observer.used(path)

    def evictable_bytes(self, path: str) -> int:
        """Bytes freed by evicting `path`; 0 if it is not cached or is being replaced."""
        return self.paths.evictable_bytes(path)

    def fits(self, size_bytes: int) -> bool:
        """Whether this many bytes fit beside what is cached, with nothing evicted. Downloads in progress do not count."""
        return self.capacity.fits(size_bytes, self.bytes)

    async def reserve(self, size_bytes: int, choose_victims: ChooseVictims | None = None) -> None:
        """Reserve space, evicting what `choose_victims` chooses (by default, the observer); returns when the space is free.

        Waits until the cache is ready. Raises CacheFullError, with nothing evicted, if there is not enough space, or
        CacheWriteError. Every `reserve` must be paired with `capacity.release`.
        """
        capacity, paths = self.capacity, self.paths
        await self.wait_until_ready()
        while paths.is_unlinking and capacity.under_floor(size_bytes, self._free_bytes()) > max(
            0, capacity.over_limit(size_bytes, self.bytes)
        ):
            await paths.wait_for_unlinks()  # they may free enough: the disk has not counted those bytes as free yet
        short_bytes = self._short_of(size_bytes)
        victims = (choose_victims or self.choose_victims)(short_bytes) if short_bytes > 0 else []
        if victims is None:
            raise CacheFullError(capacity.refusal(size_bytes, self.bytes))
        self.evictions += paths.evict_all(victims)
        capacity.reserve(size_bytes)
        try:
            await paths.wait_for_unlinks()  # this reservation may count on bytes that another one frees
            stuck = [path for path in victims if path in self._memory_index]
            if stuck and self._short_of(0) > 0:
                raise CacheWriteError(f"no space for {format_size(size_bytes)}: {stuck[0]} cannot be unlinked")
        except BaseException:
            capacity.release(size_bytes)
            raise

    async def evict(self, path: str) -> None:
        """Remove an object; if it is being replaced, the replacement removes it; if that fails, it is evicted then."""
        await self.paths.evict(path)

    async def shrink(self) -> None:
        """Evict the least recently used files until the size limit and the free-space floor hold again."""
        try:
            short_bytes = self._short_of(0)
        except CacheWriteError as exc:
            log.warning("%s", exc)
            return
        if short_bytes > 0:
            self.evictions += self.paths.evict_all(self.choose_victims(min(short_bytes, self.bytes)) or [])
            await self.paths.wait_for_unlinks()

    async def verify(self, path: str) -> bool:
        """Read the complete file and compare it with its stamp; a damaged file is evicted and counted.

        A file that cannot be read stays: its reader will see the error.
        """
        while (stamp := self._memory_index.get(path)) is not None:
            with self._memory_index.watching(path) as is_same:
                if await self.io.run(is_intact, self.directory.objects, path, stamp):
                    return True
                if not is_same():
                    continue  # it was evicted or replaced meanwhile
            self.damaged += 1
            log.warning("cached %s: its bytes are not the object's any more; fetched again when next needed", path)
            await self.evict(path)
            return False
        return False

    async def find_file(self, path: str) -> None:
        """A reader needs the object: if the cache is not ready yet, see whether its file is on the disk."""
        await self._recovery.find_file(path)

    async def check_file(self, path: str) -> None:
        """Something may have happened to the file: forget it if it is gone."""
        await self._recovery.check_file(path)

    async def rescan(self) -> tuple[int, int]:
        """Compare the index with the files: adopt files without entries, forget entries without files. Returns both counts."""
        return await self._recovery.rescan()

    async def check(self) -> list[str]:
        """Return what is wrong: in the index compared with memory, files with stamps, sums with limits. Empty is good."""
        await self.wait_until_ready()
        await self._writer.flush()
        assert self._index is not None
        try:
            index = {path: record.stamp async for page in index_pages(self.io, self._index) for path, record in page}
        except INDEX_ERRORS as exc:
            return [f"the index cannot be read: {exc}"]
        problems = await find_disagreements(self._memory_index, index, self.directory.objects, self.io.run)
        reserved_bytes = self.capacity.reserved_bytes
        if self.capacity.over_limit(0, self.bytes) > 0:
            problems.append(f"{self.bytes} bytes and {reserved_bytes} reserved exceed {self.capacity.limit_bytes}")
        if not reserved_bytes and len(await self.io.run(self.directory.leftover_files)):
            problems.append("leftovers in tmp/")
        return problems

    async def _close(self) -> None:
        await self._recovery.stop()
        await self._writer.stop()
        await self.paths.close()
        if self._index is not None:
            await self._writer.flush()
            # What was not loaded is still in the index, which is as complete as it was before.
            complete = (self.is_ready or self._index.complete) and not self._writer.pending
            await self.io.run_on_index(self._index.close, complete=complete)
        await self.io.close()

    def _short_of(self, size_bytes: int) -> int:
        return self.capacity.short_of(size_bytes, self.bytes, self._free_bytes())

    def _free_bytes(self) -> int:
        return free_bytes(self.directory.objects) if self.capacity.has_floor else 0
