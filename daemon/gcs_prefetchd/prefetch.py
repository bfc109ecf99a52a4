"""Joins streams, planner and fetcher: keeps the window ahead of every stream on disk."""

import asyncio
import logging

from gcs_prefetchd.cache import Cache
from gcs_prefetchd.errors import CacheFullError, CacheWriteError, OriginUnavailableError, PrefetchdError
from gcs_prefetchd.fetcher import Fetcher
from gcs_prefetchd.manifest import ObjectVersion
from gcs_prefetchd.names import name_of
from gcs_prefetchd.planner import next_items
from gcs_prefetchd.registry import Registry
from gcs_prefetchd.streams import Stream, path_of

__all__ = ["Prefetcher"]

log = logging.getLogger(__name__)

TRY_AGAIN_S = 5.0


class Prefetcher:
    """`run` prefetches until it is cancelled. Whatever changes the streams or the cache calls `wake`."""

    def __init__(self, registry: Registry, cache: Cache, fetcher: Fetcher, window_items: int) -> None:
        self._registry = registry
        self._cache = cache
        self._fetcher = fetcher
        self._window = window_items
        self._waiting_for_room = False
        self._failing: set[str] = set()
        self._woken = asyncio.Event()
        self._items: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()
        cache.on_lost = self._lost

    async def run(self) -> None:
        """Prefetch until cancelled."""
        try:
            while True:
                await self._woken.wait()
                self._woken.clear()
                self._start_downloads()
                if not self._items:
                    self._settled.set()
        finally:
            for task in self._items:
                task.cancel()
            await asyncio.gather(*self._items, return_exceptions=True)

    def wake(self) -> None:
        """A plan has come, something was read, or a download has ended: look again."""
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

    def _start_downloads(self) -> None:
        if self._waiting_for_room:
            return
        planned = next_items(self._registry, self._window)
        while self._fetcher.slots.free > len(self._items):
            step = next(planned, None)
            if step is None:
                return
            self._start(*step)

    def _start(self, stream: Stream, item: int) -> None:
        absent = []
        for version in stream.manifest.versions(item):
            if self._fetcher.is_cached(version):
                self._cache.touch(path_of(version))  # the window it has come into keeps it from being the oldest
            else:
                absent.append(version)
        if absent:
            task = asyncio.create_task(self._bring(stream, item, absent), name=f"prefetch {absent[0].name.uri}")
            self._items.add(task)
            task.add_done_callback(self._ended)

    async def _bring(self, stream: Stream, item: int, versions: list[ObjectVersion]) -> None:
        fetches = (self._fetcher.prefetch(version, self._registry) for version in versions)
        for version, result in zip(versions, await asyncio.gather(*fetches, return_exceptions=True), strict=True):
            if isinstance(result, PrefetchdError):
                self._failed(stream, item, version, result)
            elif isinstance(result, BaseException):
                raise result

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._items.discard(task)
        self._look_again()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %r", task.get_name(), error, exc_info=error)

    def _failed(self, stream: Stream, item: int, version: ObjectVersion, error: PrefetchdError) -> None:
        if isinstance(error, CacheFullError):
            self._waiting_for_room = True
            stream.plan_again(item)
        elif isinstance(error, OriginUnavailableError | CacheWriteError):
            log.warning("%s; planned again in %g s", error, TRY_AGAIN_S)
            asyncio.get_running_loop().call_later(TRY_AGAIN_S, self._again, stream, item)
        elif version.name.uri not in self._failing:
            self._failing.add(version.name.uri)
            log.warning("%s; not prefetched", error)

    def _again(self, stream: Stream, item: int) -> None:
        stream.plan_again(item)
        self._look_again()

    def _look_again(self) -> None:
        self._settled.clear()
        self._woken.set()

    def _lost(self, path: str) -> None:
        name = name_of(path)
        for stream in self._registry:
            if name is not None and path in stream.held and (place := stream.manifest.find(name)) is not None:
                self._again(stream, place[0])
