"""The cache: ordinary files under `objects/`, bounded in bytes, with an index of what is here and when it was used.

Its state lives on the event loop; everything that touches the disk runs in its threads. A file appears under its final name
only when it is whole and checked, and is never rewritten, only unlinked. Space is reserved before a byte is written.

After a start the cache takes stock: it reads the index, and after a crash, when that lacks the latest files, looks at every
file. Until it knows what is here it gives no room, so that the bound holds; what is asked for is looked for on the disk.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from gcs_prefetchd.cache.consistency_check import disagreements
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.disk_index import INDEX_ERRORS, Index, Record
from gcs_prefetchd.cache.file_comparison import Comparison, Found
from gcs_prefetchd.cache.file_scan import find_each, find_files, unlink_all
from gcs_prefetchd.cache.index_loading import load_index
from gcs_prefetchd.cache.index_writer import IndexWriter
from gcs_prefetchd.cache.io_threads import Disk, free_bytes
from gcs_prefetchd.cache.memory_index import Contents
from gcs_prefetchd.cache.observer import CacheObserver, ChooseVictims, LeastRecentlyUsed
from gcs_prefetchd.cache.safe_folders import Folders
from gcs_prefetchd.shared.byte_sizes import format_size
from gcs_prefetchd.shared.checksums import Stamp, is_intact, read_object_name
from gcs_prefetchd.shared.errors import CacheFullError, CacheWriteError
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.shared.paths import object_at_path

__all__ = ["Cache"]

log = logging.getLogger(__name__)

AT_A_TIME = 500  # entries that are dealt with before others on the event loop have their turn: a few milliseconds

NOTHING: list[Found] = []


class Cache:
    """The objects of one claimed directory. `open` it before use and `close` it after; the directory stays its owner's.

    The size bound and the free-space floor hold at every moment: downloads under way count with the bytes they reserved.
    `observer` hears of every change, but for what taking stock brings to light, and chooses what to evict.
    """

    def __init__(
        self, directory: CacheDirectory, limit_bytes: int, min_free_bytes: int = 0, observer: CacheObserver | None = None
    ) -> None:
        self.directory = directory
        self.folders = Folders(directory.objects, directory.check_ours)
        self.disk = Disk(self.folders.forget)
        self.limit_bytes = limit_bytes
        self.min_free_bytes = min_free_bytes
        self.evictions = 0
        self.damaged = 0
        self.reserved_bytes = 0
        self.landed_bytes = 0  # of the reserved ones, those that are on the disk already
        self.observer = observer or LeastRecentlyUsed()
        self.choose_victims: ChooseVictims = partial(self.observer.choose_victims, files=self)
        self._comparing = asyncio.Lock()
        self._unlinking: set[asyncio.Task[None]] = set()
        self._leaving: set[str] = set()
        self._arriving: set[str] = set()
        self._unwanted: set[str] = set()  # of what is arriving, where the older file was to go
        self._held: set[asyncio.Task[None]] = set()
        self._index: Index | None = None
        self._writer = IndexWriter(self.disk.on_index)
        self._contents = Contents(self._writer.note)
        self._stock: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to take stock, whose end `whole` waits for. Raises CacheWriteError where no index can be made."""
        try:
            self._index = await self.disk.on_index(Index, self.directory.index)
        except BaseException:
            await self.close()
            raise
        self._stock = asyncio.create_task(self._take_stock(self._index), name="take stock")

    async def whole(self) -> None:
        """Wait until everything that is here is known. Raises what kept the cache from it, as CacheWriteError."""
        if not self.is_whole:
            assert self._stock is not None, "the cache is not open"
            await asyncio.shield(self._stock)

    @property
    def is_whole(self) -> bool:
        """Whether everything that is here is known."""
        return self._stock is not None and self._stock.done() and not self._stock.cancelled() and not self._stock.exception()

    async def close(self) -> None:
        """Write what the index lacks and end the threads. A caller that is cancelled does not keep it from ending."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="close cache")
        await asyncio.shield(self._closing)

    def __len__(self) -> int:
        return len(self._contents.entries)

    @property
    def bytes(self) -> int:
        """Of all objects in the cache."""
        return self._contents.bytes

    def stamp(self, path: str) -> Stamp | None:
        """What the cache holds at this path (`names.cache_path`), or None. Does not count as a use."""
        return self._contents.entries.get(path)

    def names(self) -> Iterator[ObjectName]:
        """The objects in the cache, least recently used first."""
        return filter(None, map(self.name_at, chain.from_iterable(self.pages())))

    def name_at(self, path: str) -> ObjectName | None:
        """The object that lies at a path."""
        return object_at_path(path) or read_object_name(self.directory.objects / path)

    def pages(self) -> Iterator[list[str]]:
        """Where the objects lie, least recently used first, as many at a time as can be dealt with on the event loop at once.
        What changes between two pages may be told of, or not, or twice."""
        return self._contents.entries.pages(AT_A_TIME)

    def touch(self, path: str) -> None:
        """Count a use."""
        self._contents.touch(path)

    def opened(self, path: str) -> None:
        """Another program opened the file: a use that nobody else tells of."""
        if self._contents.touch(path):
            self.observer.used(path)

    def evictable_bytes(self, path: str) -> int:
        """Bytes freed by evicting `path`; 0 if it is not cached or is being replaced."""
        return 0 if path in self._arriving else self._contents.entries.size(path)

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether so much would fit, beside what is here and without what is under way, with nothing dropped."""
        return self.bytes + size_bytes <= self.limit_bytes

    async def reserve(self, size_bytes: int, choose_victims: ChooseVictims | None = None) -> None:
        """Reserve space, evicting what `choose_victims` chooses (by default, the observer); returns when the space is free.

        Waits until the cache is ready. Raises CacheFullError, with nothing evicted, if there is not enough space, or
        CacheWriteError. Every `reserve` must be paired with `release`.
        """
        await self.whole()
        while self._unlinking and self._under_floor(size_bytes) > max(0, self._over_limit(size_bytes)):
            await asyncio.wait(self._unlinking)  # what goes already may be enough; the disk tells when it has gone
        short_bytes = self._short_of(size_bytes)
        victims = (choose_victims or self.choose_victims)(short_bytes) if short_bytes > 0 else []
        if victims is None:
            raise CacheFullError(self._no_room_for(size_bytes))
        self._drop(victims)
        self.reserved_bytes += size_bytes
        try:
            if self._unlinking:  # bytes that another reservation frees may be the ones we count on
                await asyncio.wait(self._unlinking)
            stuck = [path for path in victims if path in self._contents.entries]
            if stuck and self._short_of(0) > 0:
                raise CacheWriteError(f"no room for {format_size(size_bytes)}: {stuck[0]} cannot be unlinked")
        except BaseException:
            self.release(size_bytes)
            raise

    def release(self, size_bytes: int) -> None:
        """Give reserved room back."""
        self.reserved_bytes -= size_bytes

    async def expect(self, path: str) -> None:
        """A file is about to be published at this path: returns when no older one is being unlinked there.

        Until `admit` or `give_up` the path is left alone, so that no unlink meant for the older file meets the new one.
        """
        while path in self._leaving:
            await asyncio.wait(self._unlinking)
        self._arriving.add(path)

    def give_up(self, path: str) -> None:
        """The file that was expected does not come."""
        self._arriving.discard(path)
        if path in self._unwanted and path in self._contents.entries:
            self._unlink([path])
        self._unwanted.discard(path)

    def admit(self, path: str, stamp: Stamp) -> None:
        """A file has been published at this path."""
        self._arriving.discard(path)
        self._unwanted.discard(path)
        self._contents.put(path, stamp)
        self.observer.arrived(path, stamp)

    async def drop(self, path: str) -> None:
        """Remove an object; one that is being replaced goes by that, or when it turns out that it is not replaced."""
        if path in self._arriving:
            self._unwanted.add(path)
        elif path in self._contents.entries:
            self._unlink([path])
        if self._unlinking:
            await asyncio.wait(self._unlinking)

    def forget(self, path: str) -> None:
        """The file is gone: somebody deleted it."""
        if self._contents.remove(path):
            self.observer.lost(path)

    async def look_after(self, path: str) -> None:
        """Something may have happened to the file: forget it if it is gone."""
        if path in self._contents.entries:
            with self._contents.watching(path) as is_same, contextlib.suppress(OSError):
                if await self._find([path]) == [None] and is_same():
                    self.forget(path)

    async def look_for(self, path: str) -> None:
        """Somebody wants the object: where the cache is not whole yet, see whether its file is here."""
        if self.is_whole or path in self._contents.entries:
            return
        with self._contents.changes(self._leaving) as changed, contextlib.suppress(OSError):
            comparison = Comparison(self._contents.entries, changed, self._arriving)
            self._settle(comparison, filter(None, await self._find([path])))

    async def verify(self, path: str) -> bool:
        """Read the object's file whole and compare it with its stamp; a damaged one is dropped and counted.

        One that cannot be looked at stays: whoever asks will see.
        """
        while (stamp := self._contents.entries.get(path)) is not None:
            with self._contents.watching(path) as is_same:
                if await self.disk.call(is_intact, self.directory.objects, path, stamp):
                    return True
                if not is_same():
                    continue  # it was dropped meanwhile, or has been published anew
            self.damaged += 1
            log.warning("cached %s: its bytes are not the object's any more; fetched again when next needed", path)
            await self.drop(path)
            return False
        return False

    async def shrink(self) -> None:
        """Drop the least recently used until the bound and the floor hold again."""
        try:
            short_bytes = self._short_of(0)
        except CacheWriteError as exc:
            log.warning("%s", exc)
            return
        if short_bytes > 0:
            self._drop(self.choose_victims(min(short_bytes, self.bytes)) or [])
            if self._unlinking:
                await asyncio.wait(self._unlinking)

    async def rescan(self) -> tuple[int, int]:
        """Compare the index with the files: adopt what a crash left unindexed, forget what is gone. Returns both numbers.

        Files that came or went while it ran are left to those who moved them.
        """
        async with self._comparing:
            try:
                counts = await self._compare()
            except OSError as exc:
                log.warning("%s: not compared with the index: %s (%s)", self.directory.objects, exc.strerror, exc.filename)
                return 0, 0
        await self.shrink()
        if self._unlinking:
            await asyncio.wait(self._unlinking)
        return counts

    async def check(self) -> list[str]:
        """Everything that is wrong: index against entries, files against their stamps, sums against bounds. Empty is good."""
        await self.whole()
        await self._writer.flush()
        try:
            index = {path: record.stamp async for page in self._index_pages() for path, record in page}
        except INDEX_ERRORS as exc:
            return [f"the index cannot be read: {exc}"]
        problems = await disagreements(self._contents, index, self.directory.objects, self.disk.call)
        if self.bytes + self.reserved_bytes > self.limit_bytes:
            problems.append(f"{self.bytes} bytes and {self.reserved_bytes} reserved exceed {self.limit_bytes}")
        if not self.reserved_bytes and len(await self.disk.call(self.directory.leftovers)):
            problems.append("leftovers in tmp/")
        return problems

    def hold(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends even where whoever waits for it is cancelled, at the latest within `close`."""
        return _kept(asyncio.create_task(work), self._held)

    async def _take_stock(self, index: Index) -> None:
        try:
            with self._contents.changes() as changed:
                await load_index(self._contents, self._index_pages(), changed, AT_A_TIME)
        except INDEX_ERRORS as exc:
            await self.disk.on_index(index.start_afresh, exc)
            self._contents.clear()
        self._writer.start(index)
        await (self.shrink() if index.complete else self.rescan())

    async def _index_pages(self) -> AsyncIterator[list[tuple[str, Record]]]:
        assert self._index is not None
        after: int | None = 0
        while after is not None:
            page, after = await self.disk.on_index(self._index.page, after, AT_A_TIME)
            yield page

    async def _compare(self) -> tuple[int, int]:
        with self._contents.changes(self._leaving) as changed:
            comparison = Comparison(self._contents.entries, changed, self._arriving)
            adopted = gone = 0
            pages = find_files(self.directory.objects, AT_A_TIME)
            while page := await self.disk.call(next, pages, NOTHING):
                adopted += self._settle(comparison, page)
            for paths in comparison.unseen(AT_A_TIME):
                for path in comparison.gone(paths, await self._find(paths)):
                    self.forget(path)
                    gone += 1
        return adopted, gone

    async def _find(self, paths: list[str]) -> list[Found | None]:
        return await self.disk.call(find_each, Folders(self.directory.objects, self.directory.check_ours), paths)

    def _settle(self, comparison: Comparison, page: Iterable[Found]) -> int:
        """Take over what some files differ in from what is held; returns how many are new."""
        differences = comparison.take(page)
        for path, stamp in differences.new:
            comparison.see(self._contents.adopt(path, stamp))
            if self.is_whole:
                self.observer.arrived(path, stamp)
        self._unlink(differences.damaged)
        return len(differences.new)

    async def _close(self) -> None:
        if self._stock is not None and not self._stock.done():
            self._stock.cancel()
            await asyncio.wait([self._stock])
        await self._writer.stop()
        while self._unlinking or self._held:
            await asyncio.wait(self._unlinking | self._held)
        if self._index is not None:
            await self._writer.flush()
            # What stock was not taken of is in the index still, where that was complete before.
            complete = (self.is_whole or self._index.complete) and not self._writer.pending
            await self.disk.on_index(self._index.close, complete=complete)
        await self.disk.close()

    def _drop(self, victims: list[str]) -> None:
        victims = [path for path in victims if path in self._contents.entries and path not in self._arriving]
        self.evictions += len(victims)
        self._unlink(victims)

    def _short_of(self, size_bytes: int) -> int:
        """How many bytes must go before `size_bytes` more fit within the bound and above the floor."""
        return max(self._over_limit(size_bytes), self._under_floor(size_bytes))

    def _over_limit(self, size_bytes: int) -> int:
        return self.bytes + self.reserved_bytes + size_bytes - self.limit_bytes

    def _under_floor(self, size_bytes: int) -> int:
        if not self.min_free_bytes:
            return -self.limit_bytes
        to_come = self.reserved_bytes - self.landed_bytes + size_bytes
        return self.min_free_bytes + to_come - free_bytes(self.directory.objects)

    def _no_room_for(self, size_bytes: int) -> str:
        if size_bytes > self.limit_bytes:
            return f"no room for {format_size(size_bytes)}: the whole cache is {format_size(self.limit_bytes)}"
        return (
            f"no room for {format_size(size_bytes)}: the cache holds {format_size(self.bytes)} of "
            f"{format_size(self.limit_bytes)}, has {format_size(self.reserved_bytes)} set aside for downloads, keeps "
            f"{format_size(self.min_free_bytes)} of the disk free, and what it holds is needed sooner"
        )

    def _unlink(self, paths: list[str]) -> None:
        stamps = {path: self._contents.entries.get(path) for path in paths}
        for path in paths:
            self.forget(path)
        if paths:
            self._leaving.update(paths)
            _kept(asyncio.create_task(self._unlink_files(stamps), name="unlink"), self._unlinking)

    async def _unlink_files(self, stamps: dict[str, Stamp | None]) -> None:
        stuck: dict[str, str] = {}
        try:
            await self.disk.files.submit(lambda: stuck.update(unlink_all(self.folders, stamps)))
        except OSError as exc:
            log.warning("%d cached files: cannot be unlinked: %s", len(stamps), exc.strerror)
            stuck = dict.fromkeys(stamps, str(exc.strerror))
        finally:
            self._leaving.difference_update(stamps)
        for path in stuck:  # it is on the disk still, and counts
            if (stamp := stamps[path]) is not None:
                self.admit(path, stamp)


def _kept(task: asyncio.Task[None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
