"""What the prefetcher learns from the cache and the slots: which files arrived and were lost, and when to look again."""

import asyncio

from gcs_prefetchd.cache.observer import EvictableFiles
from gcs_prefetchd.planning.item_refs import ItemRef
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.objects import ObjectVersion
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["PrefetchObserver"]


class PrefetchObserver:
    """Built before the cache and the slots, which report to it, and before the prefetcher, which waits for `woken`.

    It counts the prefetches that run, and the bytes of their objects that are not in the cache yet. `settled` is set while
    nothing is left to fetch.
    """

    def __init__(self, registry: Registry) -> None:
        self.woken = asyncio.Event()
        self.settled = asyncio.Event()
        self.running_prefetches = 0
        self.incoming_bytes = 0
        self._incoming: dict[str, ObjectVersion] = {}  # by path
        self._registry = registry

    def wake(self) -> None:
        """There may be something to do."""
        self.settled.clear()
        self.woken.set()

    def plan_again(self, ref: ItemRef) -> None:
        """An item was not fetched, or not kept: its readers need it all the same."""
        for reader in self._registry:
            if reader.data_root == ref.data_root:
                reader.stream.plan_again(ref.item)

    def prefetch_started(self, version: ObjectVersion) -> None:
        """Count a prefetch that starts."""
        self.running_prefetches += 1
        path = cache_path(version.name.bucket, version.name.name)
        if (other := self._incoming.get(path)) is not None:  # a version that is no longer wanted
            self._remove_incoming(path, other.generation)
        self._incoming[path] = version
        self.incoming_bytes += version.size

    def prefetch_ended(self, version: ObjectVersion) -> None:
        """Count a prefetch that has ended, successfully or not."""
        self.running_prefetches -= 1
        self._remove_incoming(cache_path(version.name.bucket, version.name.name), version.generation)

    def _remove_incoming(self, path: str, generation: int) -> None:
        version = self._incoming.get(path)
        if version is not None and version.generation == generation:
            del self._incoming[path]
            self.incoming_bytes -= version.size

    # --- What the cache and the slots call

    def arrived(self, path: str, stamp: Stamp) -> None:
        """A file was published, or found on the disk."""
        self._remove_incoming(path, stamp.generation)  # at once: the cache counts its bytes from now on
        self._registry.files.add(path)

    def used(self, path: str) -> None:
        """Another program opened the file."""
        self._registry.files.record_open(path)

    def lost(self, path: str) -> None:
        """The file was evicted, or deleted by hand."""
        part = self._registry.files.remove(path)
        if part is not None:
            self.plan_again(part.item_ref)
            self.wake()

    def choose_victims(self, short_bytes: int, files: EvictableFiles) -> list[str] | None:
        """Choose the files that are not needed soon, and then those that are needed last."""
        return self._registry.files.choose_victims(short_bytes, None, files.evictable_bytes)

    def slot_freed(self) -> None:
        """A download slot is free before its download has ended."""
        if self.running_prefetches:  # otherwise it was a demand's, and no prefetch waits for it
            self.wake()
