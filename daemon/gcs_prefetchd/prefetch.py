"""Joins streams, planner and fetcher: keeps the window ahead of every stream on disk."""

import asyncio
import logging
from dataclasses import dataclass
from functools import partial

from gcs_prefetchd.cache import Cache
from gcs_prefetchd.errors import (
    CacheFullError,
    CacheWriteError,
    DaemonUnavailableError,
    OriginUnavailableError,
    PrefetchdError,
)
from gcs_prefetchd.fetcher import Fetcher
from gcs_prefetchd.manifest import ObjectVersion
from gcs_prefetchd.names import name_of
from gcs_prefetchd.planner import next_items
from gcs_prefetchd.registry import Registry
from gcs_prefetchd.streams import Stream, path_of

__all__ = ["Prefetcher"]

log = logging.getLogger(__name__)

TRY_AGAIN_S = 5.0
# Items that are looked at before others on the event loop have their turn: about 5 ms.
BURST_ITEMS = 256

Item = tuple[Stream, int]


@dataclass(slots=True)
class _Bringing:
    """An item under way: how many of its objects, whether one failed, and whether it was planned once more meanwhile."""

    objects: int
    failed: bool = False
    planned_again: bool = False


class Prefetcher:
    """`run` prefetches until it is cancelled. Whatever changes the streams or the cache calls `wake`.

    What could not be fetched because GCS or the disk failed is planned again every `try_again_s`.
    """

    def __init__(
        self, registry: Registry, cache: Cache, fetcher: Fetcher, window_items: int, try_again_s: float = TRY_AGAIN_S
    ) -> None:
        self._registry = registry
        self._cache = cache
        self._fetcher = fetcher
        self._window = window_items
        self._try_again_s = try_again_s
        self._waiting_for_room = False
        self._not_there: set[ObjectVersion] = set()
        self._woken = asyncio.Event()
        self._bringing: dict[Item, _Bringing] = {}
        self._objects = 0  # of all that is being brought
        self._tasks: set[asyncio.Task[None]] = set()
        self._later: set[Item] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._settled = asyncio.Event()
        cache.on_lost = self._lost

    async def run(self) -> None:
        """Prefetch until cancelled."""
        try:
            while True:
                await self._woken.wait()
                self._woken.clear()
                if self._start_downloads():
                    self._woken.set()
                    await asyncio.sleep(0)
                elif not self._tasks and not self._later:
                    self._settled.set()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """A plan has come, something was read, or something left the cache: look again."""
        self._waiting_for_room = False
        self._look_again()

    async def settled(self) -> None:
        """Wait until nothing is left to fetch that the windows want and the cache has room for."""
        await self._settled.wait()

    def runway_items(self, stream: Stream) -> int:
        """How many of the stream's next items are on disk without a gap, as far as its window reaches."""
        runway = 0
        for item in stream.window():
            if not all(self._fetcher.is_cached(version) for version in stream.manifest.versions(item)):
                break
            runway += 1
        return runway

    def _start_downloads(self) -> bool:
        """Start what there are slots for; True where there may be more to start."""
        if self._waiting_for_room:
            return False
        planned = next_items(self._registry, self._window)
        for _ in range(BURST_ITEMS):
            # Every slot is worth an object that waits for it; more would only stand in line before items nearer to a reader.
            if self._objects >= self._fetcher.slots.count:
                return False
            step = next(planned, None)
            if step is None:
                return False
            self._start(*step)
        return True

    def _start(self, stream: Stream, item: int) -> None:
        if (stream, item) in self._bringing:
            self._bringing[stream, item].planned_again = True
            return
        absent = []
        for version in stream.manifest.versions(item):
            if self._fetcher.is_cached(version):
                self._cache.touch(path_of(version))  # the window it has come into keeps it from being the oldest
            else:
                absent.append(version)
        if absent:
            self._bringing[stream, item] = _Bringing(len(absent))
            self._objects += len(absent)
            task = asyncio.create_task(self._bring(stream, item, absent), name=f"prefetch {absent[0].name.uri}")
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, stream, item))

    async def _bring(self, stream: Stream, item: int, versions: list[ObjectVersion]) -> None:
        fetches = (self._fetcher.prefetch(version, self._registry) for version in versions)
        for version, result in zip(versions, await asyncio.gather(*fetches, return_exceptions=True), strict=True):
            if isinstance(result, PrefetchdError):
                self._bringing[stream, item].failed = True
                self._failed(stream, item, version, result)
            elif isinstance(result, BaseException):
                raise result

    def _ended(self, stream: Stream, item: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        brought = self._bringing.pop((stream, item))
        self._objects -= brought.objects
        if brought.planned_again and not brought.failed:
            stream.plan_again(item)
        self._look_again()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %r", task.get_name(), error, exc_info=error)

    def _failed(self, stream: Stream, item: int, version: ObjectVersion, error: PrefetchdError) -> None:
        if isinstance(error, CacheFullError):
            self._waiting_for_room = True
            stream.plan_again(item)
            return
        self._waiting_for_room = False  # what was set aside for it is free again
        if isinstance(error, OriginUnavailableError | CacheWriteError):
            self._later.add((stream, item))
            if self._timer is None:  # one line for all that fail together
                log.warning("%s; planned again in %g s", error, self._try_again_s)
                self._timer = asyncio.get_running_loop().call_later(self._try_again_s, self._try_again)
        elif not isinstance(error, DaemonUnavailableError) and version not in self._not_there:
            self._not_there.add(version)
            log.warning("%s; not prefetched", error)

    def _try_again(self) -> None:
        self._timer = None
        for stream, item in self._later:
            stream.plan_again(item)
        self._later.clear()
        self.wake()

    def _look_again(self) -> None:
        self._settled.clear()
        self._woken.set()

    def _lost(self, path: str) -> None:
        holding = [stream for stream in self._registry if path in stream.held]
        name = name_of(path) if holding else None
        for stream in holding:
            if name is not None and (place := stream.manifest.find(name)) is not None:
                stream.plan_again(place[0])
                self.wake()
