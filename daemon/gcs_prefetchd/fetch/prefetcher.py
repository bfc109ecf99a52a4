"""Keeps in the cache what each reader will read next, just ahead of it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection
from functools import partial

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.observer import ChooseVictims
from gcs_prefetchd.cache.page_cache import ReadAhead
from gcs_prefetchd.fetch.epoch_preparation import EpochPreparation
from gcs_prefetchd.fetch.failed_prefetches import FailedPrefetches
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.fetch.next_items import ItemPrefetch, Lookahead, NextItem, NextItems
from gcs_prefetchd.fetch.prefetch_observer import PrefetchObserver
from gcs_prefetchd.planning.item_refs import ItemRef
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
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

RETRY_AFTER_S = 5.0
MAX_STARTS = 256  # items that one turn starts before others on the event loop run: about 5 ms


class Prefetcher:
    """`run` prefetches until it is cancelled. Call `wake` after every change of the readers.

    `observer` is the observer of the cache and of the slots. If GCS, the credentials or the disk fail, items are planned again
    after `retry_after_s`. `waits` counts the objects that readers waited for, by reason (`wait_reasons.WAIT_REASONS`).
    """

    def __init__(
        self,
        registry: Registry,
        cache: Cache,
        fetcher: Fetcher,
        observer: PrefetchObserver,
        read_ahead: ReadAhead | None = None,
        *,
        retry_after_s: float = RETRY_AFTER_S,
    ) -> None:
        self.waits: Counter[str] = Counter()
        self._registry = registry
        self._cache = cache
        self._fetcher = fetcher
        self._observer = observer
        self._read_ahead = read_ahead
        self._epochs = EpochPreparation(registry, on_started=self.start_epoch, on_known=self.wake, on_idle=observer.wake)
        self._failed = FailedPrefetches(retry_after_s, self._retry)
        self._active: dict[tuple[str, int], ItemPrefetch] = {}
        self._waits_for_space = False  # an item of a window does not fit: nothing starts until something changes
        self._full_streams: set[str] = set()  # for which no space is free beyond their windows

    async def run(self) -> None:
        """Prefetch until cancelled."""
        try:
            while True:
                await self._observer.woken.wait()
                self._observer.woken.clear()
                self._epochs.start_due()
                is_sorting = self._registry.eviction.sort_more()
                if self._start_downloads() or is_sorting:
                    self._observer.woken.set()
                    await asyncio.sleep(0)
                elif not self._epochs.is_busy and not self._active and not self._failed.is_waiting:
                    self._observer.settled.set()
        finally:
            self._failed.close()
            await self._epochs.close()

    def wake(self) -> None:
        """Look again: a plan has arrived, something was read, or space may be free."""
        self._waits_for_space = False
        self._observer.wake()

    def start_epoch(self) -> None:
        """Look again after an epoch has started, also for free space beyond the windows."""
        self._full_streams.clear()
        self.wake()

    async def settled(self) -> None:
        """Wait until everything that the windows need, and for which the cache has space, is cached."""
        await self._observer.settled.wait()

    async def demand(self, name: ObjectName) -> None:
        """Return when the object is in the cache: a reader waits for it. Raises what `Fetcher.demand` raises."""
        path = cache_path(name.bucket, name.name)
        await self._cache.find_file(path)
        version = self._registry.catalog.newest_version(name)
        stamp = self._cache.stamp(path)
        if stamp is None or (version is not None and stamp.generation != version.generation):
            self._count_wait(path, is_other_generation=stamp is not None)
        await self._fetcher.demand(name, version)

    def _count_wait(self, path: str, *, is_other_generation: bool) -> None:
        is_blocked = self._waits_for_space or self._fetcher.slots.free == 0
        part = self._registry.lookup.locate(path)
        cached = self._registry.eviction.cached
        reason = wait_reason(part, cached, is_blocked=is_blocked, is_other_generation=is_other_generation)
        self.waits[reason] += 1
        reader = None if part is None else self._registry.waiting_reader(part)
        if reader is not None:
            reader.waits[reason] += 1
            reader.demanded_objects += 1

    # --- Starting

    def _start_downloads(self) -> bool:
        """Start downloads while there are slots for them; returns whether there may be more to start."""
        if self._waits_for_space or self._failed.are_credentials_refused:
            return False
        items = NextItems(self._registry, self._active, self._full_streams)
        for lookahead in items.lookaheads:
            self._read_window_ahead(lookahead)
        for _ in range(MAX_STARTS):
            # One object may wait for each slot. More would only queue in front of items that are needed sooner.
            if self._observer.running_prefetches >= self._fetcher.slots.prefetch_capacity:
                return False
            next_item = items.soonest()
            if next_item is None:
                return items.has_unseen_places
            self._start(next_item)
        return True

    def _read_window_ahead(self, lookahead: Lookahead) -> None:
        """Queue the cached items that the window has reached, to be read into memory."""
        reader, stream = lookahead.reader, lookahead.reader.stream
        if self._read_ahead is None or reader.is_seeded:
            return
        place = max(stream.first_unread, stream.read_ahead_end)
        end = min(stream.known_end, lookahead.window_end)
        for item in map(stream.item_at, range(place, end)):
            if reader.is_item_ready(item):
                self._read_ahead.enqueue(self._registry.lookup.paths(reader.data_root, item))
        stream.read_ahead_end = max(place, end)

    def _start(self, next_item: NextItem) -> None:
        reader, item, place, is_in_window = next_item
        missing = [version for version in self._versions(reader, item) if not self._fetcher.is_cached(version)]
        if not missing or self._is_too_large(missing):
            return
        choose_victims: ChooseVictims = partial(self._choose_victims, ItemRef(reader.data_root, item))
        if not is_in_window:
            choose_victims = _evict_nothing
            # All of its objects or none: an image is of no use without its label.
            if not self._cache.fits(self._observer.incoming_bytes + sum(version.size for version in missing)):
                self._full_streams.add(reader.stream.id)
                reader.stream.planned_end = place
                return
        prefetch = self._active[reader.data_root, item] = ItemPrefetch(reader, choose_victims, len(missing))
        for version in missing:
            self._observer.prefetch_started(version)
            download = self._fetcher.prefetch(version, choose_victims)
            download.add_done_callback(partial(self._object_ended, item, version, prefetch))

    def _is_too_large(self, versions: list[ObjectVersion]) -> bool:
        size_bytes = sum(version.size for version in versions)
        if size_bytes <= self._cache.capacity.limit_bytes:
            return False
        uri, size = versions[0].name.uri, format_size(size_bytes)
        line = f"{uri}: with its label {size}, more than the whole cache; its readers fetch it from GCS themselves"
        self._failed.log_once("too large", versions[0], line)
        return True

    def _versions(self, reader: Reader, item: int) -> list[ObjectVersion]:
        return self._registry.lookup.versions(reader.data_root, item, newest_manifest_only=reader.is_seeded)

    def _choose_victims(self, wanted: ItemRef, short_bytes: int) -> list[str] | None:
        return self._registry.files.choose_victims(short_bytes, wanted, self._cache.evictable_bytes)

    # --- Ending

    def _object_ended(self, item: int, version: ObjectVersion, prefetch: ItemPrefetch, download: asyncio.Task[None]) -> None:
        self._observer.prefetch_ended(version)
        error = asyncio.CancelledError() if download.cancelled() else download.exception()
        if error is not None:
            prefetch.failures.append((version, error))
        prefetch.objects_left -= 1
        if not prefetch.objects_left:
            self._item_ended(item, prefetch)
        self._observer.wake()

    def _item_ended(self, item: int, prefetch: ItemPrefetch) -> None:
        reader = prefetch.reader
        del self._active[reader.data_root, item]
        for version, error in prefetch.failures:
            self._object_failed(item, version, prefetch, error)
        if not prefetch.failures:
            reader.prefetched_items += 1
            if prefetch.is_planned_again and not reader.is_item_ready(item):
                self._observer.plan_again(ItemRef(reader.data_root, item))

    def _object_failed(self, item: int, version: ObjectVersion, prefetch: ItemPrefetch, error: BaseException) -> None:
        reader, ref = prefetch.reader, ItemRef(prefetch.reader.data_root, item)
        if isinstance(error, CacheFullError):
            if prefetch.choose_victims is _evict_nothing:
                self._full_streams.add(reader.stream.id)
            else:
                self._waits_for_space = True
            self._observer.plan_again(ref)
            return
        self._waits_for_space = False  # the space that was reserved for it is free again
        if isinstance(error, OriginUnavailableError | CacheWriteError | CredentialsError):
            self._failed.retry_later(ref, error)
        elif isinstance(error, PrefetchdError) and version not in self._versions(reader, item):
            self._observer.plan_again(ref)  # a newer listing names another version
        elif isinstance(error, PrefetchdError):
            self._failed.log_once(type(error).__name__, version, f"{error}; not prefetched")
        elif not isinstance(error, asyncio.CancelledError):  # which means that the daemon is stopping
            log.error("prefetch %s: %r", version.name.uri, error, exc_info=error)

    def _retry(self, items: Collection[ItemRef]) -> None:
        for item in items:
            self._observer.plan_again(item)
        self.wake()


def _evict_nothing(short_bytes: int) -> list[str] | None:
    """Use only space that is free."""
    return None
