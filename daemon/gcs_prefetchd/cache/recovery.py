"""What a cache does after a start, to know its files: loads the index, and after a crash compares it with the files.

A periodic rescan makes the same comparison, for files that other programs deleted or moved.
"""

import asyncio
import contextlib
import logging
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.disk_index import INDEX_ERRORS, DiskIndex, IndexRecord
from gcs_prefetchd.cache.file_scan import FoundFile, find_each, find_files
from gcs_prefetchd.cache.index_writer import IndexWriter
from gcs_prefetchd.cache.io_threads import IOThreads
from gcs_prefetchd.cache.lru_table import LRUTable
from gcs_prefetchd.cache.memory_index import MemoryIndex
from gcs_prefetchd.cache.observer import CacheObserver
from gcs_prefetchd.cache.path_lifecycle import PathLifecycle
from gcs_prefetchd.cache.safe_folders import SafeFolders
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.malloc import return_freed_memory

__all__ = ["PAGE_ENTRIES", "Comparison", "Differences", "Recovery", "index_pages"]

log = logging.getLogger(__name__)

PAGE_ENTRIES = 500  # handled before other tasks on the event loop have their turn: a few milliseconds
NO_FILES: list[FoundFile] = []


class Recovery:
    """`start` it once, `stop` it at the end. `shrink` restores the size limit and the free-space floor.

    While it is not complete, `find_file` looks for single files on the disk. The observer is not notified of files found then.
    """

    def __init__(
        self,
        directory: CacheDirectory,
        memory_index: MemoryIndex,
        paths: PathLifecycle,
        io: IOThreads,
        writer: IndexWriter,
        observer: CacheObserver,
        shrink: Callable[[], Awaitable[None]],
    ) -> None:
        self._directory = directory
        self._memory_index = memory_index
        self._paths = paths
        self._io = io
        self._writer = writer
        self._observer = observer
        self._shrink = shrink
        self._comparing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self, index: DiskIndex) -> None:
        """Start to load the index. Its end is what `wait` waits for."""
        self._task = asyncio.create_task(self._recover(index), name="recovery")

    async def wait(self) -> None:
        """Wait until every file is known. Raises the CacheWriteError that prevented it."""
        if not self.is_complete:
            assert self._task is not None, "the cache is not open"
            await asyncio.shield(self._task)

    @property
    def is_complete(self) -> bool:
        """Whether every file is known."""
        return self._task is not None and self._task.done() and not self._task.cancelled() and not self._task.exception()

    async def stop(self) -> None:
        """Stop loading, if that is still running."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    async def rescan(self) -> tuple[int, int]:
        """Compare the index with the files: adopt files without entries, forget entries without files. Returns both counts.

        Files that arrive or disappear meanwhile are left alone.
        """
        async with self._comparing:
            try:
                counts = await self._compare()
            except OSError as exc:
                log.warning("%s: not compared with the index: %s (%s)", self._directory.objects, exc.strerror, exc.filename)
                return 0, 0
        await self._shrink()
        await self._paths.wait_for_unlinks()
        return counts

    async def find_file(self, path: str) -> None:
        """A reader needs the file: unless every file is known, see whether it is on the disk."""
        if self.is_complete or path in self._memory_index:
            return
        with self._comparison() as comparison, contextlib.suppress(OSError):
            self._adopt(comparison, filter(None, await self._find([path])))

    async def check_file(self, path: str) -> None:
        """Something may have happened to the file: forget it if it is gone."""
        if path in self._memory_index:
            with self._memory_index.watching(path) as is_same, contextlib.suppress(OSError):
                if await self._find([path]) == [None] and is_same():
                    self._paths.forget(path)

    async def _recover(self, index: DiskIndex) -> None:
        try:
            with self._memory_index.recording_changes() as changed:
                await _load_index(self._memory_index, index_pages(self._io, index), changed)
        except INDEX_ERRORS as exc:
            await self._io.run_on_index(index.replace_by_empty, exc)
            self._memory_index.clear()
        self._writer.start(index)
        await (self._shrink() if index.complete else self.rescan())

    async def _compare(self) -> tuple[int, int]:
        with self._comparison() as comparison:
            adopted = gone = 0
            pages = find_files(self._directory.objects, PAGE_ENTRIES)
            while page := await self._io.run(next, pages, NO_FILES):
                adopted += self._adopt(comparison, page)
            for paths in comparison.unseen(PAGE_ENTRIES):
                for path in comparison.gone(paths, await self._find(paths)):
                    self._paths.forget(path)
                    gone += 1
        return adopted, gone

    @contextlib.contextmanager
    def _comparison(self) -> Iterator["Comparison"]:
        states = self._paths.states
        with self._memory_index.recording_changes(states.unlinking()) as changed:
            yield Comparison(self._memory_index.entries, lambda path: path in changed or states.is_in_transition(path))

    async def _find(self, paths: list[str]) -> list[FoundFile | None]:
        return await self._io.run(find_each, SafeFolders(self._directory.objects, self._directory.check_ours), paths)

    def _adopt(self, comparison: "Comparison", page: Iterable[FoundFile]) -> int:
        """Make the entries match some files, and unlink the damaged ones; returns how many files are new."""
        differences = comparison.compare(page)
        for path, stamp in differences.new:
            comparison.mark_seen(self._memory_index.adopt(path, stamp))
            if self.is_complete:
                self._observer.arrived(path, stamp)
        self._paths.unlink(differences.damaged)
        return len(differences.new)


@dataclass(frozen=True, slots=True)
class Differences:
    """How some files differ from the entries: those without an entry or with another stamp, and those of a wrong length."""

    new: list[tuple[str, Stamp]]
    damaged: list[str]


class Comparison:
    """Compares files with entries, a page at a time, while the entries keep changing. Pure.

    Paths for which `is_changing` is true are left alone: those that change now, or have changed since the comparison started.
    """

    def __init__(self, entries: LRUTable, is_changing: Callable[[str], bool]) -> None:
        self._entries = entries
        self._is_changing = is_changing
        self._seen = bytearray(entries.slot_limit)

    def compare(self, page: Iterable[FoundFile]) -> Differences:
        """Compare some files. The caller adopts the new ones, and calls `mark_seen` with their slots, before the next page."""
        differences = Differences([], [])
        for found in page:
            if found.stamp is None or self._is_changing(found.path):
                continue
            slot = self._entries.slot(found.path)
            if found.stamp.size != found.size:
                differences.damaged.append(found.path)
            elif slot and self._entries.stamp_at(slot) == found.stamp:
                self.mark_seen(slot)
            else:
                differences.new.append((found.path, found.stamp))
        return differences

    def mark_seen(self, slot: int) -> None:
        """The file of the entry in this slot exists."""
        if slot < len(self._seen):
            self._seen[slot] = 1

    def unseen(self, max_paths: int) -> Iterator[list[str]]:
        """The entries that existed when the comparison started and whose files were not found, `max_paths` at a time."""
        slots = self._entries.unmarked(self._seen)
        for start in range(0, len(slots), max_paths):
            held = [slot for slot in slots[start : start + max_paths] if self._entries.has_entry(slot)]
            yield [path for path in map(self._entries.path_at, held) if not self._is_changing(path)]

    def gone(self, paths: Iterable[str], found: Iterable[FoundFile | None]) -> list[str]:
        """Of the unseen paths, those that a second look did not find either, and that still have an entry."""
        pairs = zip(paths, found, strict=True)
        absent = [path for path, one in pairs if one is None or one.stamp is None]
        return [path for path in absent if path in self._entries and not self._is_changing(path)]


async def index_pages(io: IOThreads, index: DiskIndex) -> AsyncIterator[list[tuple[str, IndexRecord]]]:
    """The records of the index on disk, a page at a time."""
    after: int | None = 0
    while after is not None:
        page, after = await io.run_on_index(index.page, after, PAGE_ENTRIES)
        yield page


async def _load_index(
    memory_index: MemoryIndex, pages: AsyncIterator[list[tuple[str, IndexRecord]]], changed: Container[str]
) -> None:
    """Load the pages, least recently used first; paths that are `changed` or have an entry already are left as they are.

    The index has its rows in the order in which they were first inserted: to sort them, SQLite would need files outside the
    cache directory, or a hundred bytes of memory for each.
    """
    slots, used_s = array("I"), array("d")
    async for page in pages:
        for path, record in page:
            if path not in changed and path not in memory_index:
                slots.append(memory_index.load(path, record))
                used_s.append(record.used_s)
    order = array("I", await asyncio.to_thread(_order_of_use, used_s))
    for start in range(0, len(order), PAGE_ENTRIES):
        for number in order[start : start + PAGE_ENTRIES]:
            memory_index.entries.use(slots[number])
        await asyncio.sleep(0)
    del slots, used_s, order
    await asyncio.to_thread(return_freed_memory)  # a start needs lists as long as the cache, and nothing after it does


def _order_of_use(used_s: "array[float]") -> bytes:
    return np.argsort(np.frombuffer(used_s), kind="stable").astype(np.uint32).tobytes()
