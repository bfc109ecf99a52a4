"""The listings by which the daemon plans: each data root is listed again and again, and what has changed is dropped."""

import asyncio
import logging
from collections.abc import Callable, Iterable

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.service.manifest_store import list_manifest, load_newest_manifest, remove_old_manifests
from gcs_prefetchd.settings import Settings
from gcs_prefetchd.shared.errors import CacheWriteError, ManifestError, PrefetchdError
from gcs_prefetchd.shared.manifest import Manifest, is_digest, load_manifest
from gcs_prefetchd.shared.objects import DataRoot

__all__ = ["BucketSync"]

log = logging.getLogger(__name__)

RELIST_AFTER_FAILURE_S = 60.0
ADOPTED_AT_A_TIME = 2000  # a few milliseconds, then others have their turn


class BucketSync:
    """`first` and then `follow` for each data root. `on_adopted` is called when the planner knows of more that is here."""

    def __init__(
        self,
        settings: Settings,
        directory: CacheDirectory,
        origin: GCSClient,
        cache: Cache,
        registry: Registry,
        fetcher: Fetcher,
    ) -> None:
        self.on_adopted: Callable[[], None] = lambda: None
        self._settings = settings
        self._directory = directory
        self._origin = origin
        self._cache = cache
        self._registry = registry
        self._fetcher = fetcher
        # Two listings that are numbered at once would give the same numbers to different items.
        self._numbering = asyncio.Lock()
        self._listing = asyncio.Lock()  # of two listings the one that began first must not come last

    async def first(self, root: DataRoot) -> float:
        """Have a manifest of the data root; returns after how many seconds it is to be listed again."""
        saved = await asyncio.to_thread(load_newest_manifest, self._directory.manifests, root, self._settings.item_patterns)
        if saved is not None:
            await self._put_in_force(saved)
            log.info("%s: %d items as listed before; being listed again", root.uri, len(saved))
            return 0.0
        log.info("%s: being listed", root.uri)
        await self._take(await list_manifest(self._origin, root, self._settings.item_patterns))
        return self._settings.relist_s

    async def relist(self, root: DataRoot) -> None:
        """List a data root now, once all that is here is known; raises what `list_manifest` raises, and the last one stays."""
        await self._cache.whole()  # what has changed in the bucket must be known to be here to be dropped
        async with self._listing:
            await self._take(await list_manifest(self._origin, root, self._settings.item_patterns))
            await self._drop_outdated()

    async def follow(self, root: DataRoot, wait_s: float) -> None:
        """List a data root again and again, first after `wait_s`, until cancelled."""
        await self._cache.whole()
        if wait_s:  # listed at the start, before anybody knew what is here
            await self._drop_outdated()
        while True:
            await asyncio.sleep(wait_s)
            wait_s = self._settings.relist_s
            try:
                await self.relist(root)
            except PrefetchdError as exc:
                # What cannot be listed now is still cached: an origin out of reach removes nothing.
                wait_s = min(wait_s, RELIST_AFTER_FAILURE_S)
                log.warning("%s; the last listing stays in force, tried again in %.0f s", exc, wait_s)

    async def _take(self, manifest: Manifest) -> None:
        before = self._registry.catalog.newest_manifest(manifest.data_root.uri)
        if before is not None and before.digest == manifest.digest:
            return
        await asyncio.to_thread(self._save, manifest)
        await self._put_in_force(manifest)
        log.info("%s: %d items", manifest.data_root.uri, len(manifest))

    def _save(self, manifest: Manifest) -> None:
        try:
            self._directory.check_ours()
            manifest.save(self._directory.manifests)
            remove_old_manifests(self._directory.manifests, manifest.data_root)
        except OSError as exc:
            raise CacheWriteError(
                f"{manifest.data_root.uri}: its listing cannot be kept: {exc.strerror or exc} ({self._directory.manifests})"
            ) from exc

    async def _drop_outdated(self) -> None:
        """Drop what is here in another generation than is listed, once what is under way has come, too.

        All of it is looked at and not only what this listing changed: objects go from the bucket and come back, and a daemon
        may end before it has dropped what its last listing told. That takes a thread about 12 s for a million.
        """
        under_way = self._fetcher.under_way
        dropped = 0
        for page in self._cache.pages():
            dropped += await self._drop_where_outdated(page)
        if under_way:
            await asyncio.wait(under_way.values())
            dropped += await self._drop_where_outdated(under_way)
        if dropped:
            log.info("%d objects dropped that have changed in the bucket", dropped)

    async def _drop_where_outdated(self, paths: Iterable[str]) -> int:
        dropped = 0
        for path, generation in await asyncio.to_thread(self._listed, paths):
            stamp = self._cache.stamp(path)
            if stamp is not None and stamp.generation != generation:
                await self._cache.drop(path)
                dropped += 1
        return dropped

    def _listed(self, paths: Iterable[str]) -> list[tuple[str, int]]:
        """The generations that the newest listings name. For a thread."""
        names = ((path, self._cache.name_at(path)) for path in paths)
        versions = ((path, self._registry.catalog.newest_version(name)) for path, name in names if name is not None)
        return [(path, version.generation) for path, version in versions if version is not None]

    async def recall(self, data_root: str, digest: str) -> None:
        """Have the listing that a plan names, where only an earlier daemon had it in memory.

        A job that began its epoch with it, or went back to it with a checkpoint, goes by it to the epoch's end.
        """
        newest = self._registry.catalog.newest_manifest(data_root)
        if newest is None or not is_digest(digest) or self._registry.catalog.find_manifest(data_root, digest) is not None:
            return
        async with self._numbering:
            if self._registry.catalog.find_manifest(data_root, digest) is not None:
                return  # the plans of all ranks come at once, and another one's was first
            try:
                manifest = await asyncio.to_thread(load_manifest, self._directory.manifests / digest)
            except ManifestError:
                return  # whoever sent the plan is told that there is no such listing
            if (manifest.data_root, manifest.item_patterns) != (newest.data_root, newest.item_patterns):
                return
            self._registry.add_earlier_manifest(await asyncio.to_thread(self._registry.catalog.assign_numbers, manifest))
            log.info("%s: %d items as listed in %s, for a job that goes by it", data_root, len(manifest), digest)
        await self._adopt_strangers()

    async def _put_in_force(self, manifest: Manifest) -> None:
        """Plan by this listing from now on, over what is here already."""
        async with self._numbering:
            self._registry.set_manifest(await asyncio.to_thread(self._registry.catalog.assign_numbers, manifest))
            data_root = manifest.data_root.uri
            history = self._registry.catalog.history(data_root)
            if superseded := history.superseded(self._registry.manifests_in_use(data_root)):
                history.discard(superseded, await asyncio.to_thread(history.remnant, superseded))
        await self._adopt_strangers()

    async def _adopt_strangers(self) -> None:
        """Have the planner know which of what it knew as no item's are parts of items now."""
        strangers = list(self._registry.eviction.itemless)
        await self.adopt(strangers[start : start + ADOPTED_AT_A_TIME] for start in range(0, len(strangers), ADOPTED_AT_A_TIME))

    async def adopt(self, pages: Iterable[list[str]]) -> None:
        """Have the planner know of what is here, least recently used first."""
        for page in pages:
            # Not all at once: the garbage collector would look through a million places, and hold everything up for it.
            for path, part in await asyncio.to_thread(self._registry.files.locate_all, page):
                if self._cache.stamp(path) is not None and (part is not None or path not in self._registry.eviction.itemless):
                    self._registry.files.adopt(path, part)
        self._registry.finish_adoption()
        self.on_adopted()
