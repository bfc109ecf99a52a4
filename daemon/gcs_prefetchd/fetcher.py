"""Brings objects into the cache: one download for any number of askers, demand before prefetch."""

import asyncio
import logging
from collections.abc import Container
from dataclasses import dataclass

from gcs_prefetchd.cache import Cache
from gcs_prefetchd.download import Download
from gcs_prefetchd.errors import CacheFullError, ObjectChangedError
from gcs_prefetchd.manifest import ObjectVersion
from gcs_prefetchd.names import ObjectName, cache_path
from gcs_prefetchd.origin import Origin
from gcs_prefetchd.slots import Slots

__all__ = ["Fetched", "Fetcher"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Fetched:
    """Objects brought into the cache since the start, by what asked for them."""

    demand: int = 0
    prefetch: int = 0


class Fetcher:
    """Downloads into the cache, at most `concurrency` at a time. `close` ends what is under way."""

    def __init__(self, cache: Cache, origin: Origin, concurrency: int) -> None:
        self.slots = Slots(concurrency)
        self.fetched = Fetched()
        self._cache = cache
        self._origin = origin
        self._under_way: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Cancel every download and wait until nothing of them is left."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def is_under_way(self, path: str) -> bool:
        """Whether somebody asked for it already."""
        return path in self._under_way

    def is_cached(self, version: ObjectVersion) -> bool:
        """Whether this generation of the object is in the cache."""
        stamp = self._cache.stamp(cache_path(version.name.bucket, version.name.name))
        return stamp is not None and stamp.generation == version.generation

    async def prefetch(self, version: ObjectVersion, keep: Container[str]) -> None:
        """Have this generation in the cache, dropping nothing that is in `keep` for it. Raises what the download raises."""
        if not self.is_cached(version):
            await self._join(version.name, version, keep, demand=False)

    async def demand(self, name: ObjectName, version: ObjectVersion | None, keep: Container[str]) -> None:
        """Have the object in the cache now; what is in `keep` goes only where nothing else can.

        A reader asks because its own look at the disk failed, so a file that is here is read and checked first.
        """
        path = cache_path(name.bucket, name.name)
        if version is not None and not self.is_cached(version):
            pass  # an older generation lies here, or nothing
        elif await self._cache.verify(path):
            self._cache.touch(path)
            return
        try:
            await self._join(name, version, keep, demand=True)
        except CacheFullError:
            await self._join(name, version, (), demand=True)
        except ObjectChangedError:
            await self._join(name, None, keep, demand=True)

    async def _join(self, name: ObjectName, version: ObjectVersion | None, keep: Container[str], *, demand: bool) -> None:
        path = cache_path(name.bucket, name.name)
        task = self._under_way.get(path)
        if task is None:
            task = asyncio.create_task(self._bring(name, version, keep, demand=demand), name=f"fetch {name.uri}")
            self._under_way[path] = task
            task.add_done_callback(lambda done: self._ended(path, done))
        # Shielded: an asker that goes away must not take the download from the others, nor waste its bytes.
        await asyncio.shield(task)

    async def _bring(self, name: ObjectName, version: ObjectVersion | None, keep: Container[str], *, demand: bool) -> None:
        await self.slots.acquire(demand=demand)
        try:
            async with Download(self._cache, name, keep) as download:
                await download.publish(await self._origin.download(name, version, download))
        finally:
            self.slots.release()
        if demand:
            self.fetched.demand += 1
        else:
            self.fetched.prefetch += 1

    def _ended(self, path: str, task: asyncio.Task[None]) -> None:
        del self._under_way[path]
        if not task.cancelled():
            task.exception()  # every asker has it; without askers left nobody needs it
