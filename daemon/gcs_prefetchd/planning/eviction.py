"""Chooses what to evict when space is needed, over all streams of the node. Pure: no clock, no files, no awaiting.

The rules are those of Cao, Felten, Karlin and Li, "A study of integrated prefetching and caching strategies" (SIGMETRICS
1995), with Belady's choice of a victim cut at what is *not soon*, so that the misses of an epoch are spread evenly over it:

- *Prefetch* what will be read next and is not cached, soonest first.
- *Evict* what is not needed soon, least recently used first; only when nothing of that kind is left, what is needed last.
- *Do no harm*: never evict for a prefetch what is needed sooner than what it fetches.

With several streams an item is needed when the first of them reads it. What is needed last is found as in Fagin's threshold
algorithm: each stream is scanned from its far end. An item that the scan finds, but that another stream needs sooner, is queued
there. So each place is scanned once an epoch, and nothing is stored for items that are not in question.
"""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable

from gcs_prefetchd.planning.item_refs import ItemRef
from gcs_prefetchd.planning.next_use import CachedItems
from gcs_prefetchd.planning.stream import Stream

__all__ = ["EvictionPolicy", "Victim"]

# Items of a queue that is not sorted yet that one choice passes over; after that, what is needed last is evicted instead.
MAX_PASSED_OVER = 4096

Victim = ItemRef | str  # an item, or the path of an object that belongs to no item


class EvictionPolicy:
    """Knows what is cached and when it is needed.

    `cached` holds the cached items of each data root; the owner fills it, and calls `start_sorting` when streams have changed.
    `itemless` holds the paths of objects that belong to no item and their last uses, least recently used first. `lru` ignores
    the future, for comparison.
    """

    def __init__(self, *, lru: bool = False) -> None:
        self.cached: dict[str, CachedItems] = {}
        self.itemless: OrderedDict[str, float] = OrderedDict()
        self._lru = lru

    def start_sorting(self) -> None:
        """A stream was added or removed or has started an epoch: sort again what is needed. `sort_more` finishes that."""
        for cached in self.cached.values():
            cached.start_sorting(lru=self._lru)

    def sort_more(self) -> bool:
        """Sort for at most 2 ms; False if nothing is left to sort. Victims can be chosen between two calls."""
        unsorted = [cached for cached in self.cached.values() if not cached.is_sorted]
        return bool(unsorted) and (unsorted[0].sort_more(lru=self._lru) or len(unsorted) > 1)

    def add_part(self, data_root: str, item: int, part: int, now_s: float) -> None:
        """A part of an item was cached."""
        cached = self.cached[data_root]
        parts = cached.parts_of(item)
        cached.set_parts(item, parts | 1 << part)
        cached.evicted_while_needed[item] = False
        if not self._queue_if_unneeded(cached, item, now_s) and not parts:
            cached.queue_next_use(item, now_s)

    def adopt_part(self, data_root: str, item: int, part: int) -> None:
        """Add a part that was cached before. Call it for the least recently used part first, then `start_sorting`."""
        cached = self.cached[data_root]
        cached.set_parts(item, cached.parts_of(item) | 1 << part)
        cached.unneeded.use(item, 0.0)

    def remove_part(self, data_root: str, item: int, part: int) -> None:
        """A part of an item is no longer cached."""
        cached = self.cached[data_root]
        parts = cached.parts_of(item) & ~(1 << part)
        cached.set_parts(item, parts)
        if not parts:
            cached.unneeded.remove(item)
            if cached.is_needed(item):
                cached.evicted_while_needed[item] = True

    def record_use(self, data_root: str, item: int, now_s: float) -> None:
        """The item was used, or a reader will use it soon."""
        cached = self.cached[data_root]
        if cached.parts_of(item):
            self._queue_if_unneeded(cached, item, now_s)

    def record_planned(self, data_root: str, item: int, now_s: float) -> None:
        """A window has reached the item. Without knowledge of the future, that counts as a use."""
        if self._lru:
            self.record_use(data_root, item, now_s)

    def use_itemless(self, path: str, now_s: float) -> None:
        """An object that belongs to no item was cached or used."""
        self.itemless[path] = now_s
        self.itemless.move_to_end(path)

    def mark_read(self, data_root: str, stream: Stream, item: int, now_s: float) -> bool:
        """The stream's reader has read the item; False if the stream has no unread place of it."""
        if not stream.mark_read(item):
            return False
        cached = self.cached[data_root]
        if cached.parts_of(item) and not self._queue_if_unneeded(cached, item, now_s):
            cached.queue_next_use(item, now_s)
        return True

    def extend_known(self, data_root: str, stream: Stream, window: int, now_s: float) -> None:
        """The stream's reader has advanced: extend what is known of its future."""
        cached = self.cached[data_root]
        for item in cached.extend_known(stream, window):
            if cached.parts_of(item) and not self._lru:
                cached.unneeded.remove(item)
                cached.queue_next_use(item, now_s)

    def choose_victims(
        self, short_bytes: int, due_s: float, size_of: Callable[[Victim], int], now_s: float
    ) -> list[Victim] | None:
        """What to evict so that `short_bytes` become free for what is needed in `due_s` seconds; None if that is impossible.

        The caller must evict all of it, and call `remove_part` for each part.
        """
        unneeded: list[tuple[Victim, float]] = []
        needed: dict[ItemRef, None] = {}
        while short_bytes > 0:
            if (oldest := self._pop_least_recently_used(now_s)) is not None:
                unneeded.append(oldest)
                short_bytes -= size_of(oldest[0])
            elif (farthest := self._pop_needed_last(due_s, now_s, needed)) is not None:
                needed[farthest] = None
                short_bytes -= size_of(farthest)
            else:
                self._put_back(unneeded, needed, now_s)
                return None
        return [*(victim for victim, _ in unneeded), *needed]

    def _queue_if_unneeded(self, cached: CachedItems, item: int, now_s: float) -> bool:
        """Queue a cached item that was used, if it is not needed soon; returns whether it was queued."""
        if not self._lru and cached.is_needed(item):
            return False
        cached.unneeded.use(item, now_s)
        return True

    def _oldest_unneeded(self, cached: CachedItems, now_s: float) -> tuple[int, float] | None:
        """The least recently used of the unneeded items; None if there is none, or sorting has far to go."""
        for _ in range(MAX_PASSED_OVER):
            oldest = cached.unneeded.oldest()
            if oldest is None or self._lru or cached.is_sorted or not cached.is_needed(oldest[0]):
                return oldest
            cached.unneeded.remove(oldest[0])
            cached.queue_next_use(oldest[0], now_s)
        return None

    def _pop_least_recently_used(self, now_s: float) -> tuple[Victim, float] | None:
        """Remove from its queue what was used least recently of all that is not needed soon; returns it and its last use."""
        oldest: tuple[Victim, float] | None = next(iter(self.itemless.items()), None)
        for data_root, cached in self.cached.items():
            candidate = self._oldest_unneeded(cached, now_s)
            if candidate is not None and (oldest is None or candidate[1] < oldest[1]):
                oldest = (ItemRef(data_root, candidate[0]), candidate[1])
        if oldest is not None:
            victim = oldest[0]
            if isinstance(victim, str):
                del self.itemless[victim]
            else:
                self.cached[victim.data_root].unneeded.remove(victim.item)
        return oldest

    def _pop_needed_last(self, due_s: float, now_s: float, chosen: Container[ItemRef]) -> ItemRef | None:
        """Remove from its queue what is needed last; None if that is needed in `due_s` seconds or sooner."""
        while (farthest := self._farthest_next_use(now_s)) is not None and farthest[0] > due_s:
            in_s, data_root, stream, place = farthest
            cached, item = self.cached[data_root], stream.item_at(place)
            cached.remove_next_use(stream, place)
            if (data_root, item) in chosen:
                continue
            if cached.next_use_s(item, now_s) == in_s:
                return ItemRef(data_root, item)
            cached.queue_next_use(item, now_s)  # another stream reads it sooner
        return None

    def _farthest_next_use(self, now_s: float) -> tuple[float, str, Stream, int] | None:
        last: tuple[float, str, Stream, int] | None = None
        for data_root, cached in self.cached.items():
            farthest = cached.farthest_next_use(now_s)
            if farthest is not None and (last is None or farthest[0] > last[0]):
                last = (farthest[0], data_root, *farthest[1:])
        return last

    def _put_back(self, unneeded: list[tuple[Victim, float]], needed: Iterable[ItemRef], now_s: float) -> None:
        """Undo the removals of a choice that failed."""
        for data_root, item in needed:
            self.cached[data_root].queue_next_use(item, now_s)
        by_data_root: dict[str, list[tuple[int, float]]] = {}
        for victim, when_s in reversed(unneeded):
            if isinstance(victim, str):
                self.itemless[victim] = when_s
                self.itemless.move_to_end(victim, last=False)
            else:
                by_data_root.setdefault(victim.data_root, []).insert(0, (victim.item, when_s))
        for data_root, uses in by_data_root.items():
            self.cached[data_root].unneeded.put_back(uses)
