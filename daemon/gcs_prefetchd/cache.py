"""The cache: ordinary files under `objects/`, bounded in bytes, with an index of what is here and when it was used.

Its state lives on the event loop; everything that touches the disk runs in its threads. A file appears under its final name
only when it is whole and checked, and is never rewritten, only unlinked. Space is reserved before a byte is written.
"""

import asyncio
import functools
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from gcs_prefetchd.batches import Batches
from gcs_prefetchd.directory import CacheDirectory
from gcs_prefetchd.errors import CacheFullError
from gcs_prefetchd.index import INDEX_ERRORS, Index, Record
from gcs_prefetchd.indexer import IndexWriter
from gcs_prefetchd.names import ObjectName, name_of
from gcs_prefetchd.sizes import format_size
from gcs_prefetchd.stamp import Stamp, read_checked
from gcs_prefetchd.tree import Found, find_files, read_object_name, unlink_all

__all__ = ["Cache", "Room"]

log = logging.getLogger(__name__)

DISK_THREADS = 8

# Given how many bytes are short, the paths to drop so that they come free, or None where nothing may be dropped for it.
Room = Callable[[int], list[str] | None]

P = ParamSpec("P")
T = TypeVar("T")


class Cache:
    """The objects of one claimed directory. `open` it before use and `close` it after; the directory stays its owner's.

    The size bound and the free-space floor hold at every moment: downloads under way count with the bytes they reserved.
    """

    def __init__(self, directory: CacheDirectory, limit_bytes: int, min_free_bytes: int = 0) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self.min_free_bytes = min_free_bytes
        self.bytes = 0
        self.evictions = 0
        self.damaged = 0
        self.reserved_bytes = 0
        self.on_arrived: Callable[[str], None] = lambda path: None
        self.on_used: Callable[[str], None] = lambda path: None
        self.on_lost: Callable[[str], None] = lambda path: None
        self.choose: Room = self._least_recent
        self._entries: OrderedDict[str, Stamp] = OrderedDict()
        self._rescans: list[set[str]] = []  # for each under way, what has changed since it began
        self._unlinking: set[asyncio.Task[None]] = set()
        self._leaving: set[str] = set()
        self._arriving: set[str] = set()
        self._held: set[asyncio.Task[None]] = set()
        self._last_use_s = 0.0
        self._disk = ThreadPoolExecutor(DISK_THREADS, "disk")
        self._files = Batches("files")
        self._index_thread = ThreadPoolExecutor(1, "index")
        self._index: Index | None = None
        self._writer = IndexWriter(self._on_index)
        self._closing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Load the index, and compare it with the files first where the last process did not close it: after a crash it
        lacks the latest files, whose bytes count too. Raises CacheWriteError where no index can be made."""
        try:
            index_is_complete = await self._load_index()
            assert self._index is not None
            self._writer.start(self._index)
            if index_is_complete:
                await self.shrink()
            else:
                await self.rescan()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Write what the index lacks and end the threads. A caller that is cancelled does not keep it from ending."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="close cache")
        await asyncio.shield(self._closing)

    def __len__(self) -> int:
        return len(self._entries)

    def stamp(self, path: str) -> Stamp | None:
        """What the cache holds at this path (`names.cache_path`), or None. Does not count as a use."""
        return self._entries.get(path)

    def names(self) -> Iterator[ObjectName]:
        """The objects in the cache, least recently used first."""
        for path in list(self._entries):
            name = name_of(path) or read_object_name(self.directory.objects / path)
            if name is not None:
                yield name

    def touch(self, path: str) -> None:
        """Count a use."""
        stamp = self._entries.get(path)
        if stamp is not None:
            self._entries.move_to_end(path)
            self._note(path, stamp)

    def opened(self, path: str) -> None:
        """Another program opened the file: a use that nobody else tells of."""
        if path in self._entries:
            self.touch(path)
            self.on_used(path)

    def paths(self) -> list[str]:
        """Where the objects in the cache lie, least recently used first."""
        return list(self._entries)

    def size_of(self, path: str) -> int:
        """The bytes that come free when the path is dropped: none where it is not here, or is being replaced."""
        stamp = self._entries.get(path)
        return 0 if stamp is None or path in self._arriving else stamp.size

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether so much would fit, beside what is here and without what is under way, with nothing dropped."""
        return self.bytes + size_bytes <= self.limit_bytes

    async def reserve(self, size_bytes: int, room: Room | None = None) -> None:
        """Set room aside, dropping what `room` says (`choose` where none is given); returns when the room is there.

        Raises CacheFullError, with nothing dropped, where that is impossible. The caller calls `release`.
        """
        while self._unlinking and self._under_floor(size_bytes) > max(0, self._over_limit(size_bytes)):
            await asyncio.wait(self._unlinking)  # what goes already may be enough; the disk tells when it has gone
        short_bytes = self._short_of(size_bytes)
        if short_bytes > 0:
            self._drop_for(size_bytes, (room or self.choose)(short_bytes))
        self.reserved_bytes += size_bytes
        try:
            if self._unlinking:  # bytes that another reservation frees may be the ones we count on
                await asyncio.wait(self._unlinking)
        except asyncio.CancelledError:
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

    def admit(self, path: str, stamp: Stamp) -> None:
        """A file has been published at this path."""
        self._arriving.discard(path)
        self._insert(path, stamp)
        self._note(path, stamp)
        self.on_arrived(path)

    async def drop(self, path: str) -> None:
        """Remove an object; one that is being replaced at this moment goes by that."""
        if path in self._entries and path not in self._arriving:
            self._unlink([path])
        if self._unlinking:
            await asyncio.wait(self._unlinking)

    def forget(self, path: str) -> None:
        """The file is gone: somebody deleted it."""
        stamp = self._entries.pop(path, None)
        if stamp is not None:
            self.bytes -= stamp.size
            self._note(path, None)
            self.on_lost(path)

    async def verify(self, path: str) -> bool:
        """Read the object's file whole and compare it with its stamp; a damaged one is dropped and counted."""
        while (stamp := self._entries.get(path)) is not None:
            if await self.on_disk(read_checked, self.directory.objects, path, stamp) is not None:
                return True
            if self._entries.get(path) is stamp:  # else it was dropped meanwhile, or has been published anew
                self.damaged += 1
                log.warning("cached %s: its bytes are not the object's any more; fetched again when next needed", path)
                await self.drop(path)
                return False
        return False

    async def shrink(self) -> None:
        """Drop the least recently used until the bound and the floor hold again."""
        short_bytes = self._short_of(0)
        if short_bytes > 0:
            self._drop(self.choose(min(short_bytes, sum(map(self.size_of, self._entries)))) or [])
            if self._unlinking:
                await asyncio.wait(self._unlinking)

    async def rescan(self) -> tuple[int, int]:
        """Compare the index with the files: adopt what a crash left unindexed, forget what is gone. Returns both numbers.

        Files that came or went while it ran are left to those who moved them.
        """
        changed = self._leaving | self._arriving
        self._rescans.append(changed)
        try:
            found = await self.on_disk(find_files, self.directory.objects, dict(self._entries))
        except OSError as exc:
            log.warning("%s: not compared with the index: %s (%s)", self.directory.objects, exc.strerror, exc.filename)
            return 0, 0
        finally:
            self._rescans = [one for one in self._rescans if one is not changed]
        changed |= self._arriving
        gone = [path for path in found.missing if path not in changed]
        new = {path: stamp for path, stamp in found.unknown.items() if path not in changed}
        for path in gone:
            self.forget(path)
        for path, stamp in reversed(new.items()):
            self._insert(path, stamp)
            self._entries.move_to_end(path, last=False)
        for path, stamp in new.items():
            self._note(path, stamp, used_s=0.0)
            self.on_arrived(path)
        self._unlink([path for path in found.damaged if path not in changed])
        await self.shrink()
        if self._unlinking:
            await asyncio.wait(self._unlinking)
        return len(new), len(gone)

    async def check(self) -> list[str]:
        """Everything that is wrong: index against entries, files against their stamps, sums against bounds. Empty is good."""
        assert self._index is not None
        await self._writer.flush()
        try:
            index = await self._on_index(self._index.load)
        except INDEX_ERRORS as exc:
            return [f"the index cannot be read: {exc}"]
        problems = [f"{path}: in the index only" for path in index if path not in self._entries]
        problems += [f"{path}: not in the index" for path in self._entries if path not in index]
        problems += [
            f"{path}: index and memory differ" for path, r in index.items() if r.stamp != self._entries.get(path, r.stamp)
        ]
        for path, stamp in list(self._entries.items()):
            if await self.on_disk(read_checked, self.directory.objects, path, stamp) is None:
                problems.append(f"{path}: the file is not what the index says")
        found: Found = await self.on_disk(find_files, self.directory.objects, dict(self._entries))
        unindexed = [path for path in [*found.unknown, *found.damaged] if path not in self._entries]
        problems += [f"{path}: a file that the index lacks" for path in unindexed]
        if self.bytes != sum(stamp.size for stamp in self._entries.values()):
            problems.append(f"the sum of sizes is not {self.bytes}")
        if self.bytes + self.reserved_bytes > self.limit_bytes:
            problems.append(f"{self.bytes} bytes and {self.reserved_bytes} reserved exceed {self.limit_bytes}")
        if not self.reserved_bytes and len(await self.on_disk(self.directory.leftovers)):
            problems.append("leftovers in tmp/")
        return problems

    async def on_disk(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in one of the disk threads."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, functools.partial(call, *args, **kwargs))

    def in_turn(self, call: Callable[[], None]) -> asyncio.Future[None]:
        """Have a short call made that creates or removes files, after all those that came before it."""
        return self._files.do(call)

    def hold(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends even where whoever waits for it is cancelled, at the latest within `close`."""
        return _kept(asyncio.create_task(work), self._held)

    async def _load_index(self) -> bool:
        self._index = await self._on_index(Index, self.directory.index)
        try:
            records = await self._on_index(self._index.load)
        except INDEX_ERRORS as exc:
            await self._on_index(self._index.start_afresh, exc)
            records = {}
        for path, record in records.items():
            self._insert(path, record.stamp)
            self._last_use_s = record.used_s
        return self._index.complete

    async def _close(self) -> None:
        await self._writer.stop()
        while self._unlinking or self._held:
            await asyncio.wait(self._unlinking | self._held)
        if self._index is not None:
            await self._writer.flush()
            await self._on_index(self._index.close, complete=not self._writer.pending)
        # Not here: a thread that is stuck in the disk must not stop the loop, and with it the deadline for stopping.
        await asyncio.to_thread(self._files.close)
        await asyncio.to_thread(self._disk.shutdown)
        await asyncio.to_thread(self._index_thread.shutdown)

    def _least_recent(self, short_bytes: int) -> list[str] | None:
        """Plain LRU: what is dropped as long as nobody knows better."""
        victims = []
        for path in self._entries:
            if short_bytes <= 0:
                break
            if (size := self.size_of(path)) > 0:
                victims.append(path)
                short_bytes -= size
        return victims if short_bytes <= 0 else None

    def _drop_for(self, size_bytes: int, victims: list[str] | None) -> None:
        if victims is None:
            raise CacheFullError(self._no_room_for(size_bytes))
        self._drop(victims)

    def _drop(self, victims: list[str]) -> None:
        victims = [path for path in victims if path in self._entries and path not in self._arriving]
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
        about = os.statvfs(self.directory.objects)
        return self.min_free_bytes + self.reserved_bytes + size_bytes - about.f_bavail * about.f_frsize

    def _no_room_for(self, size_bytes: int) -> str:
        if size_bytes > self.limit_bytes:
            return f"no room for {format_size(size_bytes)}: the whole cache is {format_size(self.limit_bytes)}"
        return (
            f"no room for {format_size(size_bytes)}: the cache holds {format_size(self.bytes)} of "
            f"{format_size(self.limit_bytes)}, has {format_size(self.reserved_bytes)} set aside for downloads, keeps "
            f"{format_size(self.min_free_bytes)} of the disk free, and what it holds is needed sooner"
        )

    def _insert(self, path: str, stamp: Stamp) -> None:
        before = self._entries.pop(path, None)
        self.bytes += stamp.size - (before.size if before else 0)
        self._entries[path] = stamp

    def _unlink(self, paths: list[str]) -> None:
        for path in paths:
            stamp = self._entries.pop(path, None)
            if stamp is not None:
                self.bytes -= stamp.size
                self._note(path, None)
                self.on_lost(path)
        if paths:
            self._leaving.update(paths)
            _kept(asyncio.create_task(self._unlink_files(paths), name="unlink"), self._unlinking)

    async def _unlink_files(self, paths: list[str]) -> None:
        try:
            await self.in_turn(functools.partial(unlink_all, [f"{self.directory.objects}/{path}" for path in paths]))
        finally:
            self._leaving.difference_update(paths)

    def _note(self, path: str, stamp: Stamp | None, used_s: float | None = None) -> None:
        if used_s is None:
            # Never twice the same and never back, whatever the clock does: a restart sorts by it.
            used_s = self._last_use_s = max(time.time(), self._last_use_s + 1e-6)
        self._writer.note(path, None if stamp is None else Record(stamp, used_s))
        for changed in self._rescans:
            changed.add(path)

    async def _on_index(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._index_thread, functools.partial(call, *args, **kwargs))


def _kept(task: asyncio.Task[None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
