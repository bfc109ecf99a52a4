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
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from gcs_prefetchd.directory import CacheDirectory
from gcs_prefetchd.errors import CacheFullError
from gcs_prefetchd.index import INDEX_ERRORS, Index, Record
from gcs_prefetchd.names import ObjectName, name_of
from gcs_prefetchd.planner import choose_victims
from gcs_prefetchd.sizes import format_size
from gcs_prefetchd.stamp import Stamp, read_checked
from gcs_prefetchd.tree import Found, find_files, read_object_name, unlink_all

__all__ = ["Cache"]

log = logging.getLogger(__name__)

DISK_THREADS = 8
INDEX_TICK_S = 0.25

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
        self.on_lost: Callable[[str], None] = lambda path: None
        self._entries: OrderedDict[str, Stamp] = OrderedDict()
        self._changed: dict[str, Record | None] = {}
        self._touched_by_rescan: set[str] | None = None
        self._unlinking: set[asyncio.Future[None]] = set()
        self._disk = ThreadPoolExecutor(DISK_THREADS, "disk")
        self._index_thread = ThreadPoolExecutor(1, "index")
        self._index: Index
        self._something_changed = asyncio.Event()
        self._index_writer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Load the index. What it says is believed until `rescan` has compared it with the files."""
        self._index = await self._on_index(Index, self.directory.index)
        for path, record in (await self._on_index(self._index.load)).items():
            self._entries[path] = record.stamp
            self.bytes += record.stamp.size
        self._index_writer = asyncio.create_task(self._write_index(), name="index writer")
        await self.shrink()

    async def close(self) -> None:
        """Write what the index lacks and end the threads."""
        if self._index_writer is not None:
            self._index_writer.cancel()
            await asyncio.gather(self._index_writer, return_exceptions=True)
            await self._flush_index()
            await self._on_index(self._index.close)
        await asyncio.gather(*self._unlinking, return_exceptions=True)
        self._disk.shutdown()
        self._index_thread.shutdown()

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

    async def reserve(self, size_bytes: int, keep: Container[str] = ()) -> None:
        """Set room aside, dropping what was least recently used and is not in `keep`; returns when the room is there.

        Raises CacheFullError, with nothing dropped, where that is impossible. The caller calls `release`.
        """
        short_bytes = self._short_of(size_bytes)
        if short_bytes > 0:
            sizes = ((path, stamp.size) for path, stamp in self._entries.items())
            victims = choose_victims(sizes, short_bytes, keep)
            if victims is None:
                raise CacheFullError(
                    f"no room for {format_size(size_bytes)}: the cache holds {format_size(self.bytes)} of "
                    f"{format_size(self.limit_bytes)}, keeps {format_size(self.min_free_bytes)} of the disk free, and what it "
                    "holds is needed sooner"
                )
            self.evictions += len(victims)
            self._unlink(victims)
        self.reserved_bytes += size_bytes
        try:
            while self._unlinking:  # bytes that another reservation frees may be the ones we count on
                await asyncio.wait(self._unlinking)
        except asyncio.CancelledError:
            self.release(size_bytes)
            raise

    def release(self, size_bytes: int) -> None:
        """Give reserved room back."""
        self.reserved_bytes -= size_bytes

    def admit(self, path: str, stamp: Stamp) -> None:
        """A file has been published at this path."""
        before = self._entries.pop(path, None)
        self.bytes += stamp.size - (before.size if before else 0)
        self._entries[path] = stamp
        self._note(path, stamp)

    async def drop(self, path: str) -> None:
        """Remove an object."""
        if path in self._entries:
            self._unlink([path])
        await asyncio.gather(*self._unlinking)

    def forget(self, path: str) -> None:
        """The file is gone: somebody deleted it."""
        stamp = self._entries.pop(path, None)
        if stamp is not None:
            self.bytes -= stamp.size
            self._note(path, None)
            self.on_lost(path)

    async def verify(self, path: str) -> bool:
        """Read the object's file whole and compare it with its stamp; a damaged one is dropped and counted."""
        stamp = self._entries.get(path)
        if stamp is None:
            return False
        if await self.on_disk(read_checked, self.directory.objects / path, stamp) is not None:
            return True
        if self._entries.get(path) == stamp:
            self.damaged += 1
            log.warning("cached %s: its bytes are not the object's any more; fetched again when next needed", path)
            await self.drop(path)
        return False

    async def shrink(self) -> None:
        """Drop the least recently used until the bound and the floor hold again."""
        short_bytes = self._short_of(0)
        if short_bytes > 0:
            sizes = [(path, stamp.size) for path, stamp in self._entries.items()]
            victims = choose_victims(sizes, min(short_bytes, self.bytes), ()) or []
            self.evictions += len(victims)
            self._unlink(victims)
            await asyncio.gather(*self._unlinking)

    async def rescan(self) -> tuple[int, int]:
        """Compare the index with the files: adopt what a crash left unindexed, forget what is gone. Returns both numbers."""
        self._touched_by_rescan = set()
        try:
            known = dict(self._entries)
            found = await self.on_disk(find_files, self.directory.objects, known)
            meanwhile = self._touched_by_rescan
        finally:
            self._touched_by_rescan = None
        gone = [path for path in found.missing if path not in meanwhile]
        new = {path: stamp for path, stamp in found.unknown.items() if path not in meanwhile and path not in self._entries}
        for path in gone:
            self.forget(path)
        for path, stamp in new.items():
            self.admit(path, stamp)
            self._entries.move_to_end(path, last=False)
        self._unlink([path for path in found.damaged if path not in meanwhile])
        await self.shrink()
        return len(new), len(gone)

    async def check(self) -> list[str]:
        """Everything that is wrong: index against entries, files against their stamps, sums against bounds. Empty is good."""
        await self._flush_index()
        index = await self._on_index(self._index.load)
        problems = [f"{path}: in the index only" for path in index if path not in self._entries]
        problems += [f"{path}: not in the index" for path in self._entries if path not in index]
        problems += [
            f"{path}: index and memory differ" for path, r in index.items() if r.stamp != self._entries.get(path, r.stamp)
        ]
        for path, stamp in list(self._entries.items()):
            if await self.on_disk(read_checked, self.directory.objects / path, stamp) is None:
                problems.append(f"{path}: the file is not what the index says")
        found: Found = await self.on_disk(find_files, self.directory.objects, dict(self._entries))
        problems += [f"{path}: a file that the index lacks" for path in [*found.unknown, *found.damaged]]
        if self.bytes != sum(stamp.size for stamp in self._entries.values()):
            problems.append(f"the sum of sizes is not {self.bytes}")
        if self.bytes + self.reserved_bytes > self.limit_bytes:
            problems.append(f"{self.bytes} bytes and {self.reserved_bytes} reserved exceed {self.limit_bytes}")
        if not self.reserved_bytes and any(self.directory.tmp.iterdir()):
            problems.append("leftovers in tmp/")
        return problems

    async def on_disk(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in one of the disk threads."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, functools.partial(call, *args, **kwargs))

    def _short_of(self, size_bytes: int) -> int:
        """How many bytes must go before `size_bytes` more fit within the bound and above the floor."""
        wanted = self.reserved_bytes + size_bytes
        over_limit = self.bytes + wanted - self.limit_bytes
        if not self.min_free_bytes:
            return over_limit
        about = os.statvfs(self.directory.objects)
        under_floor = self.min_free_bytes + wanted - about.f_bavail * about.f_frsize
        return max(over_limit, under_floor)

    def _unlink(self, paths: list[str]) -> None:
        for path in paths:
            stamp = self._entries.pop(path, None)
            if stamp is not None:
                self.bytes -= stamp.size
                self._note(path, None)
                self.on_lost(path)
        if paths:
            files = [self.directory.objects / path for path in paths]
            future = asyncio.ensure_future(self.on_disk(unlink_all, files))
            self._unlinking.add(future)
            future.add_done_callback(self._unlinking.discard)

    def _note(self, path: str, stamp: Stamp | None) -> None:
        self._changed[path] = None if stamp is None else Record(stamp, time.time())
        self._something_changed.set()
        if self._touched_by_rescan is not None:
            self._touched_by_rescan.add(path)

    async def _write_index(self) -> None:
        while True:
            await self._something_changed.wait()
            await asyncio.sleep(INDEX_TICK_S)  # what changes within a tick shares one transaction
            await self._flush_index()

    async def _flush_index(self) -> None:
        changes, self._changed = self._changed, {}
        self._something_changed.clear()
        try:
            await asyncio.shield(asyncio.ensure_future(self._on_index(self._index.apply, changes)))
        except INDEX_ERRORS as exc:
            # Degraded, not lost: the files carry their stamps, and the next change tries again.
            self._changed = changes | self._changed
            log.warning("index: %d changes not written (%s); tried again with the next", len(changes), exc)

    async def _on_index(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._index_thread, functools.partial(call, *args, **kwargs))
