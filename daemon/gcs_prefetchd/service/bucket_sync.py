"""Keeping the plans and the cache in step with the bucket: lists each data root periodically and evicts what has changed."""

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
ADOPT_BATCH = 2000  # takes a few milliseconds, then other tasks run


class BucketSync:
    """Call `load_or_list` and then `relist_periodically` for each data root.

    Calls `on_adopted` when the planner has learnt of more cached objects.
    """

    def __init__(
        self,
        settings: Settings,
        directory: CacheDirectory,
        gcs_client: GCSClient,
        cache: Cache,
        registry: Registry,
        fetcher: Fetcher,
        on_adopted: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._gcs_client = gcs_client
        self._cache = cache
        self._registry = registry
        self._fetcher = fetcher
        self._on_adopted = on_adopted
        # Two listings that are numbered at once would give the same numbers to different items.
        self._numbering = asyncio.Lock()
        # Of two listings the one that started first must not become the newest.
        self._listing = asyncio.Lock()

    async def load_or_list(self, root: DataRoot) -> float:
        """Put the saved listing of a data root in force, or a new one. Returns in how many seconds to list it again."""
        saved = await asyncio.to_thread(load_newest_manifest, self._directory.manifests, root, self._settings.item_patterns)
        if saved is not None:
            await self._put_in_force(saved)
            log.info("%s: %d items in the saved listing; listing it again", root.uri, len(saved))
            return 0.0
        log.info("%s: listing", root.uri)
        await self._save_and_put_in_force(await list_manifest(self._gcs_client, root, self._settings.item_patterns))
        return self._settings.relist_s

    async def relist(self, root: DataRoot) -> None:
        """List a data root now. Raises what `list_manifest` raises; then the last listing stays in force."""
        await self._cache.wait_until_ready()  # changed objects can be evicted only once they are known to be cached
        async with self._listing:
            await self._save_and_put_in_force(await list_manifest(self._gcs_client, root, self._settings.item_patterns))
            await self._evict_outdated()

    async def relist_periodically(self, root: DataRoot, wait_s: float) -> None:
        """List a data root repeatedly, for the first time after `wait_s`, until cancelled."""
        await self._cache.wait_until_ready()
        if wait_s:  # `load_or_list` made the listing before the cached objects were known
            await self._evict_outdated()
        while True:
            await asyncio.sleep(wait_s)
            wait_s = self._settings.relist_s
            try:
                await self.relist(root)
            except PrefetchdError as exc:
                # Nothing is evicted: objects that cannot be listed now are still cached.
                wait_s = min(wait_s, RELIST_AFTER_FAILURE_S)
                log.warning("%s; the last listing stays in force; retry in %.0f s", exc, wait_s)

    async def load_earlier_listing(self, data_root: str, digest: str) -> None:
        """Load the listing that a plan names, if an earlier daemon saved it and this one has not used it yet.

        A job that started its epoch with it, or went back to it with a checkpoint, uses it until the epoch's end.
        """
        newest = self._registry.catalog.newest_manifest(data_root)
        if newest is None or not is_digest(digest) or self._registry.catalog.find_manifest(data_root, digest) is not None:
            return
        async with self._numbering:
            if self._registry.catalog.find_manifest(data_root, digest) is not None:
                return  # the plans of all ranks arrive together, and another rank's was first
            try:
                manifest = await asyncio.to_thread(load_manifest, self._directory.manifests / digest)
            except ManifestError:
                return  # the sender of the plan gets the error that there is no such listing
            if (manifest.data_root, manifest.item_patterns) != (newest.data_root, newest.item_patterns):
                return
            self._registry.add_earlier_manifest(await asyncio.to_thread(self._registry.catalog.assign_numbers, manifest))
            log.info("%s: %d items in the earlier listing %s, which a job uses", data_root, len(manifest), digest)
        await self._adopt_itemless()

    async def adopt(self, pages: Iterable[list[str]]) -> None:
        """Let the planner know of cached objects, least recently used first."""
        for page in pages:
            # Page by page: the garbage collector would scan a million places at once and block the event loop.
            for path, part in await asyncio.to_thread(self._registry.files.locate_all, page):
                if self._cache.stamp(path) is not None and (part is not None or path not in self._registry.eviction.itemless):
                    self._registry.files.adopt(path, part)
        self._registry.finish_adoption()
        self._on_adopted()

    async def _adopt_itemless(self) -> None:
        """Let the planner know which cached objects without an item are parts of items now."""
        itemless = list(self._registry.eviction.itemless)
        await self.adopt(itemless[start : start + ADOPT_BATCH] for start in range(0, len(itemless), ADOPT_BATCH))

    async def _save_and_put_in_force(self, manifest: Manifest) -> None:
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
                f"{manifest.data_root.uri}: cannot save its listing: {exc.strerror or exc} ({self._directory.manifests})"
            ) from exc

    async def _put_in_force(self, manifest: Manifest) -> None:
        """Plan by this listing from now on, including the objects that are cached already."""
        async with self._numbering:
            self._registry.set_manifest(await asyncio.to_thread(self._registry.catalog.assign_numbers, manifest))
            data_root = manifest.data_root.uri
            history = self._registry.catalog.history(data_root)
            if superseded := history.superseded(self._registry.manifests_in_use(data_root)):
                history.discard(superseded, await asyncio.to_thread(history.remnant, superseded))
        await self._adopt_itemless()

    async def _evict_outdated(self) -> None:
        """Evict cached objects whose generation is not the listed one, including those that are being downloaded now.

        Looks at every cached object, not only at those that this listing changed: objects disappear from the bucket and come
        back, and a daemon may exit before it has evicted what its last listing changed. For a million objects that takes a
        thread about 12 s.
        """
        downloads = self._fetcher.downloads
        evicted = 0
        for page in self._cache.pages():
            evicted += await self._evict_if_outdated(page)
        if downloads:
            await asyncio.wait(downloads.values())
            evicted += await self._evict_if_outdated(downloads)
        if evicted:
            log.info("evicted %d objects that have changed in the bucket", evicted)

    async def _evict_if_outdated(self, paths: Iterable[str]) -> int:
        evicted = 0
        for path, generation in await asyncio.to_thread(self._listed_generations, paths):
            stamp = self._cache.stamp(path)
            if stamp is not None and stamp.generation != generation:
                await self._cache.evict(path)
                evicted += 1
        return evicted

    def _listed_generations(self, paths: Iterable[str]) -> list[tuple[str, int]]:
        """The generations that the newest listings name. Runs in a thread."""
        names = ((path, self._cache.directory.object_name(path)) for path in paths)
        versions = ((path, self._registry.catalog.newest_version(name)) for path, name in names if name is not None)
        return [(path, version.generation) for path, version in versions if version is not None]
