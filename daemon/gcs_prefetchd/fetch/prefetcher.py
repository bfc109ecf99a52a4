"""Joins readers, planner, cache and fetcher: keeps what each reader will read next on disk, just ahead of it."""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.observer import ChooseVictims
from gcs_prefetchd.cache.page_cache import ReadAhead
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.fetch.log_throttle import LogThrottle
from gcs_prefetchd.fetch.prefetch_observer import PrefetchObserver
from gcs_prefetchd.planning.item_refs import ItemRef
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.planning.stream import Epoch
from gcs_prefetchd.planning.wait_reasons import wait_reason
from gcs_prefetchd.shared.byte_sizes import format_size
from gcs_prefetchd.shared.errors import (
    CacheFullError,
    CacheWriteError,
    CredentialsError,
    OriginUnavailableError,
    PrefetchdError,
)
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Prefetcher"]

log = logging.getLogger(__name__)

TRY_AGAIN_S = 5.0
SAY_AGAIN_S = 60.0
# Items that are looked at before others on the event loop have their turn: about 5 ms.
BURST_ITEMS = 256
LOOKED_AT_ONCE = 2048  # places that need nothing done take a microsecond or two each


@dataclass(slots=True)
class _Bringing:
    """An item under way: for whom and with what room, how many of its objects are left, which of them failed and how, and
    whether it was planned once more meanwhile."""

    reader: Reader
    room: ChooseVictims
    left: int
    failures: list[tuple[ObjectVersion, BaseException]] = field(default_factory=list)
    planned_again: bool = False


@dataclass(slots=True)
class _Ahead:
    """How far one turn looks ahead of a reader: its window, and how many places beside those that are fetched."""

    reader: Reader
    window: int
    looks_left: int = LOOKED_AT_ONCE

    @property
    def window_end(self) -> int:
        """The first place beyond the window."""
        return self.reader.stream.window_start(self.window) + self.window


class Prefetcher:
    """`run` prefetches until it is cancelled. Whatever changes the readers or the cache calls `wake`.

    `observer` is the cache's.

    What could not be fetched because GCS, the credentials or the disk failed is planned again every `try_again_s`. `waits`
    counts the objects that readers waited for, by reason (`wait_reasons.WAIT_REASONS`).
    """

    def __init__(
        self,
        registry: Registry,
        cache: Cache,
        fetcher: Fetcher,
        observer: PrefetchObserver,
        read_ahead: ReadAhead | None = None,
        *,
        try_again_s: float = TRY_AGAIN_S,
    ) -> None:
        self.waits: Counter[str] = Counter()
        self._registry = registry
        self._cache = cache
        self._fetcher = fetcher
        self._observer = observer
        self._read_ahead = read_ahead
        self._try_again_s = try_again_s
        self._waiting_for_room = False
        self._refused = False
        self._filled: set[str] = set()  # streams beyond whose windows there is no room that is free
        self._named: set[ObjectVersion] = set()  # those that the log has named, of which it says no more
        self._log_throttle = LogThrottle(log, SAY_AGAIN_S)
        self._ahead_of: dict[str, Epoch] = {}  # the epochs whose next one is being worked out, by their streams
        self._bringing: dict[tuple[str, int], _Bringing] = {}
        self._objects = 0  # that are being brought
        self._tasks: set[asyncio.Task[None]] = set()
        self._later: set[ItemRef] = set()
        self._timer: asyncio.TimerHandle | None = None
        fetcher.slots.on_free = self._slot_is_free

    async def run(self) -> None:
        """Prefetch until cancelled."""
        try:
            while True:
                await self._observer.woken.wait()
                self._observer.woken.clear()
                self._work_ahead()
                is_sorting = self._registry.eviction.sort_more()
                if self._start_downloads() or is_sorting:
                    self._observer.woken.set()
                    await asyncio.sleep(0)
                elif not self._tasks and not self._bringing and not self._later:
                    self._observer.settled.set()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._log_throttle.close()

    def wake(self) -> None:
        """A plan has come, something was read, or something left the cache: look again."""
        self._waiting_for_room = False
        self._observer.wake()

    async def settled(self) -> None:
        """Wait until nothing is left to fetch that the windows want and the cache has room for."""
        await self._observer.settled.wait()

    def begin(self) -> None:
        """An epoch has begun: fetch for it, and look anew how much room is free."""
        self._filled.clear()
        self.wake()

    async def demand(self, name: ObjectName) -> None:
        """Have the object in the cache now, for a reader waits; raises what `Fetcher.demand` raises."""
        await self._cache.find_file(cache_path(name.bucket, name.name))
        version = self._registry.catalog.newest_version(name)
        stamp = self._cache.stamp(cache_path(name.bucket, name.name))
        if stamp is None or (version is not None and stamp.generation != version.generation):
            self._count_wait(cache_path(name.bucket, name.name), other_generation=stamp is not None)
        await self._fetcher.demand(name, version)

    def _work_ahead(self) -> None:
        """Have the orders worked out that will be needed, in threads: meanwhile a reader goes on with what is known."""
        for data_root, number in self._registry.seeded.pop_due():
            self._keep(asyncio.create_task(self._begin_seeded(data_root, number), name=f"epoch {number} of {data_root}"))
        for reader in self._registry:
            stream = reader.stream
            is_open = reader.indices is not None and stream.next_epoch is None
            if is_open and self._ahead_of.get(stream.id) is not stream.epoch:
                self._ahead_of[stream.id] = stream.epoch
                self._keep(asyncio.create_task(self._tell_next_epoch(reader), name=f"next epoch of {stream.id}"))

    async def _begin_seeded(self, data_root: str, number: int) -> None:
        self._registry.start_seeded(await asyncio.to_thread(self._registry.seeded.prepare, data_root, number))
        self.begin()

    async def _tell_next_epoch(self, reader: Reader) -> None:
        current = reader.stream.epoch
        epoch = await asyncio.to_thread(reader.prepare_next_epoch)
        if self._ahead_of.get(reader.stream.id) is current:
            del self._ahead_of[reader.stream.id]
        if epoch is not None and reader.stream.epoch is current:
            reader.stream.set_next_epoch(epoch)
            self.wake()

    def _count_wait(self, path: str, *, other_generation: bool) -> None:
        blocked = self._waiting_for_room or self._fetcher.slots.free == 0
        part = self._registry.lookup.locate(path)
        cached = self._registry.eviction.cached
        reason = wait_reason(part, cached, is_blocked=blocked, is_other_generation=other_generation)
        self.waits[reason] += 1
        reader = None if part is None else self._registry.waiting_reader(part)
        if reader is not None:
            reader.waits[reason] += 1
            reader.demanded_objects += 1

    def _start_downloads(self) -> bool:
        """Start what there are slots for; True where there may be more to start."""
        if self._waiting_for_room or self._refused:
            return False
        ahead = [_Ahead(reader, self._registry.window_items(reader)) for reader in self._registry]
        for one in ahead:
            self._advise(one)
        for _ in range(BURST_ITEMS):
            # Every slot is worth an object that waits for it; more would only stand in line before items nearer to a reader.
            if self._objects >= self._fetcher.slots.prefetch_capacity:
                return False
            soonest: tuple[float, _Ahead, int] | None = None
            for one in ahead:
                place = self._next_place(one)
                if place is not None:
                    due_s = one.reader.stream.time_until_s(place, self._registry.clock())
                    if soonest is None or due_s < soonest[0]:
                        soonest = (due_s, one, place)
            if soonest is None:
                return any(one.looks_left <= 0 for one in ahead)
            self._start(*soonest[1:])
        return True

    def _advise(self, ahead: _Ahead) -> None:
        """Have what is here and has come into the reader's window read into memory."""
        reader, stream = ahead.reader, ahead.reader.stream
        if self._read_ahead is None or reader.is_seeded:
            return
        place = max(stream.first_unread, stream.read_ahead_end)
        end = min(stream.known_end, ahead.window_end)
        for item in map(stream.item_at, range(place, end)):
            if reader.is_item_ready(item):
                self._read_ahead.enqueue(self._registry.lookup.paths(reader.data_root, item))
        stream.read_ahead_end = max(place, end)

    def _next_place(self, ahead: _Ahead) -> int | None:
        """The nearest place whose item is to be here, but is not and is not being brought; None where none is found yet."""
        reader, stream = ahead.reader, ahead.reader.stream
        end = min(stream.known_end, ahead.window_end)
        if stream.id not in self._filled and (reader.is_seeded or self._registry.fills_free_space):
            end = stream.known_end
        place = first = max(stream.planned_end, stream.first_unread)
        end = min(end, first + ahead.looks_left)
        while place < end:
            item = stream.item_at(place)
            if stream.next_place(item) <= place:
                if (reader.data_root, item) in self._bringing:
                    self._bringing[reader.data_root, item].planned_again = True
                elif not reader.is_item_ready(item):
                    break
                else:
                    self._registry.eviction.note_planned(reader.data_root, item, self._registry.clock())
            place += 1
        ahead.looks_left -= place - first
        stream.planned_end = max(stream.planned_end, place)
        return place if place < end else None

    def _start(self, ahead: _Ahead, place: int) -> None:
        reader, stream = ahead.reader, ahead.reader.stream
        item = stream.item_at(place)
        stream.planned_end = place + 1
        absent = [version for version in self._versions(reader, item) if not self._fetcher.is_cached(version)]
        if not absent or self._is_too_large(absent):
            return
        room: ChooseVictims = partial(self._choose, ItemRef(reader.data_root, item))
        size_bytes = sum(version.size for version in absent)
        if place >= ahead.window_end:
            room = _nothing
            if not self._cache.fits(self._observer.incoming_bytes + size_bytes):
                # As one: an image that fits where its label does not would be of no use to anybody.
                self._filled.add(stream.id)
                stream.planned_end = place
                return
        self._bring(item, absent, _Bringing(reader, room, len(absent)))

    def _is_too_large(self, versions: list[ObjectVersion]) -> bool:
        size_bytes = sum(version.size for version in versions)
        if size_bytes <= self._cache.capacity.limit_bytes:
            return False
        self._say_once(
            "too large",
            versions[0],
            f"{versions[0].name.uri}: with its label {format_size(size_bytes)}, more than the whole cache; its readers "
            "fetch it from GCS themselves",
        )
        return True

    def _versions(self, reader: Reader, item: int) -> list[ObjectVersion]:
        return self._registry.lookup.versions(reader.data_root, item, newest_manifest_only=reader.is_seeded)

    def _choose(self, wanted: ItemRef, short_bytes: int) -> list[str] | None:
        """What to drop for an item."""
        return self._registry.files.choose_victims(short_bytes, wanted, self._cache.evictable_bytes)

    def _bring(self, item: int, versions: list[ObjectVersion], bringing: _Bringing) -> None:
        self._bringing[bringing.reader.data_root, item] = bringing
        for version in versions:
            self._objects += 1
            self._observer.add_incoming(version)
            download = self._fetcher.prefetch(version, bringing.room)
            download.add_done_callback(partial(self._one_ended, item, version, bringing))

    def _one_ended(self, item: int, version: ObjectVersion, bringing: _Bringing, download: asyncio.Task[None]) -> None:
        self._objects -= 1
        self._observer.remove_incoming(cache_path(version.name.bucket, version.name.name), version.generation)
        error = asyncio.CancelledError() if download.cancelled() else download.exception()
        if error is not None:
            bringing.failures.append((version, error))
        bringing.left -= 1
        if not bringing.left:
            self._all_ended(item, bringing)
        self._observer.wake()

    def _all_ended(self, item: int, bringing: _Bringing) -> None:
        reader = bringing.reader
        del self._bringing[reader.data_root, item]
        for version, error in bringing.failures:
            self._failed(reader, item, version, bringing.room, error)
        if not bringing.failures:
            reader.prefetched_items += 1
            if bringing.planned_again and not reader.is_item_ready(item):
                self._observer.plan_again(ItemRef(reader.data_root, item))

    def _failed(self, reader: Reader, item: int, version: ObjectVersion, room: ChooseVictims, error: BaseException) -> None:
        if isinstance(error, CacheFullError):
            if room is _nothing:
                self._filled.add(reader.stream.id)
            else:
                self._waiting_for_room = True
            self._observer.plan_again(ItemRef(reader.data_root, item))
            return
        self._waiting_for_room = False  # what was set aside for it is free again
        if isinstance(error, OriginUnavailableError | CacheWriteError | CredentialsError):
            # Every other object would be refused at once, and each cost a request and a line in the log.
            self._refused |= isinstance(error, CredentialsError)
            self._later.add(ItemRef(reader.data_root, item))
            if self._timer is None:  # one line for all that fail together
                log.warning("%s; planned again in %g s", error, self._try_again_s)
                self._timer = asyncio.get_running_loop().call_later(self._try_again_s, self._try_again)
        elif isinstance(error, PrefetchdError) and version not in self._versions(reader, item):
            self._observer.plan_again(ItemRef(reader.data_root, item))  # it has been listed anew meanwhile
        elif isinstance(error, PrefetchdError):
            self._say_once(type(error).__name__, version, f"{error}; not prefetched")
        elif not isinstance(error, asyncio.CancelledError):  # the daemon is stopping
            log.error("prefetch %s: %r", version.name.uri, error, exc_info=error)

    def _say_once(self, kind: str, version: ObjectVersion, line: str) -> None:
        # Only those that were named are remembered: a bucket can refuse millions.
        if version not in self._named and self._log_throttle.warn(kind, line):
            self._named.add(version)

    def _try_again(self) -> None:
        self._timer = None
        self._refused = False
        for item in self._later:
            self._observer.plan_again(item)
        self._later.clear()
        self.wake()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._observer.wake())

    def _slot_is_free(self) -> None:
        if self._objects:  # else it was a demand's, and nothing of ours waits for it
            self._observer.wake()


def _nothing(short_bytes: int) -> list[str] | None:
    """Room only where it is free: nothing is dropped."""
    return None
