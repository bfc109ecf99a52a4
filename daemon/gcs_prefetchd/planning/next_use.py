"""The cached items of one data root, and when each of them will be read next. Pure."""

import heapq
import math
from dataclasses import dataclass, field

import numpy as np

from gcs_prefetchd.planning.lru_queue import LRUQueue
from gcs_prefetchd.planning.stream import NEVER, Stream

__all__ = ["CachedItems"]

PLACES_PER_SCAN = 1024
ITEMS_PER_SORT_STEP = 4096  # some 2 ms if every one of them enters or leaves the queue


class CachedItems:
    """The cached parts of items, the streams that read the items, and the queue of the unneeded ones.

    An item is needed if some stream is known to read it. `unneeded` queues the cached items that are not needed, least recently
    used first. `evicted_while_needed` marks the items that a reader will wait for. `streams` is set by the owner, who calls
    `start_sorting` afterwards.
    """

    def __init__(self, items: int) -> None:
        self.parts = np.zeros(items, dtype=np.uint8)  # for each item the bit set of its cached parts
        self.evicted_while_needed = np.zeros(items, dtype=np.bool_)
        self.unneeded = LRUQueue(items)
        self.streams: list[Stream] = []
        self._parts = self.parts.data
        self._scans: dict[str, _Scan] = {}
        self._sorted_items = items  # the items below are in the queue if they should be

    def grow(self, items: int) -> None:
        """Make space for more items."""
        more = items - len(self.parts)
        self.parts = np.concatenate([self.parts, np.zeros(more, dtype=np.uint8)])
        self.evicted_while_needed = np.concatenate([self.evicted_while_needed, np.zeros(more, dtype=np.bool_)])
        self._parts = self.parts.data
        self.unneeded.grow(items)

    def parts_of(self, item: int) -> int:
        """The bit set of the item's cached parts."""
        return self._parts[item]

    def set_parts(self, item: int, parts: int) -> None:
        """Set which parts of the item are cached."""
        self._parts[item] = parts

    def is_needed(self, item: int) -> bool:
        """Whether some stream is known to read the item."""
        for stream in self.streams:  # noqa: SIM110  # called several times for each read: any() takes three times as long
            if stream.next_place(item) != NEVER:
                return True
        return False

    def next_use_s(self, item: int, now_s: float) -> float:
        """In how many seconds some stream will read the item; infinity if none is known to."""
        soonest = math.inf
        for stream in self.streams:
            place = stream.next_place(item)
            if place != NEVER and (in_s := stream.time_until_s(place, now_s)) < soonest:
                soonest = in_s
        return soonest

    def start_sorting(self, *, lru: bool) -> None:
        """The streams have changed: start to scan them from their far ends, and to queue the unneeded items, again."""
        self._scans = {stream.id: _Scan(stream.known_end) for stream in self.streams}
        self._sorted_items = 0
        self.sort_more(lru=lru)

    def sort_more(self, *, lru: bool) -> bool:
        """Sort some more items; False when all are sorted. All other methods may be called between two calls.

        Until then the queue may hold some items that are needed by now, and lack some that are not.
        """
        first, end = self._sorted_items, min(self._sorted_items + ITEMS_PER_SORT_STEP, len(self.parts))
        is_unneeded = self.parts[first:end] != 0
        if not lru:
            for stream in self.streams:
                is_unneeded &= stream.next_places[first:end] == NEVER
        self.unneeded.set_members(is_unneeded, first)
        self._sorted_items = end
        return not self.is_sorted

    @property
    def is_sorted(self) -> bool:
        """Whether the queue holds exactly the cached items that are not needed."""
        return self._sorted_items == len(self.parts)

    def extend_known(self, stream: Stream, window: int) -> list[int]:
        """Extend what is known of the stream's future; returns the items that are needed because of it."""
        scan = self._scans[stream.id]
        is_unscanned = scan.below == stream.known_end
        revealed = stream.extend_known(window)
        if is_unscanned:
            scan.below = stream.known_end
        return revealed

    def queue_next_use(self, item: int, now_s: float) -> None:
        """The item is cached, and its next use has changed: make `farthest_next_use` find it there.

        It is queued for one of the streams that read it; not at all if the scan of a stream will reach its place anyway.
        """
        soonest: tuple[float, int, _Scan] | None = None
        for stream in self.streams:
            place = stream.next_place(item)
            if place != NEVER:
                scan = self._scans[stream.id]
                if place < scan.below:
                    return
                in_s = stream.time_until_s(place, now_s)
                if soonest is None or in_s < soonest[0]:
                    soonest = (in_s, place, scan)
        if soonest is not None:
            heapq.heappush(soonest[2].queued, -soonest[1])

    def farthest_next_use(self, now_s: float) -> tuple[float, Stream, int] | None:
        """The cached item that some stream reads last: in how many seconds, the stream, and the place.

        No other cached item is needed later, of those that were not removed. This one may be needed sooner by another stream.
        """
        farthest = None
        for stream in self.streams:
            place = self._scans[stream.id].farthest(self, stream)
            if place is not None:
                in_s = stream.time_until_s(place, now_s)
                if farthest is None or in_s > farthest[0]:
                    farthest = (in_s, stream, place)
        return farthest

    def remove_next_use(self, stream: Stream, place: int) -> None:
        """Remove what `farthest_next_use` returned; `queue_next_use` puts it back."""
        self._scans[stream.id].remove(place)


@dataclass(slots=True)
class _Scan:
    """How far a stream has been scanned for cached items, from its far end down, and the places that were found.

    `found` and `queued` hold places above `below`: `found` those that the scan found, in rising order; `queued` a heap of the
    negated places that became an item's next use after the scan had passed. They hold places and not times, because times
    change with the reader's speed, but their order does not. Both may hold places that have become invalid.
    """

    below: int
    found: list[int] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)

    def farthest(self, cached: CachedItems, stream: Stream) -> int | None:
        while self.queued and not _is_valid(cached, stream, -self.queued[0]):
            heapq.heappop(self.queued)
        while True:
            while self.found and not _is_valid(cached, stream, self.found[-1]):
                self.found.pop()
            if self.found or self.queued or self.below <= stream.first_unread:
                break
            self._scan_more(cached, stream)
        if not self.queued:
            return self.found[-1] if self.found else None
        return max(self.found[-1], -self.queued[0]) if self.found else -self.queued[0]

    def remove(self, place: int) -> None:
        while self.found and self.found[-1] == place:
            self.found.pop()
        while self.queued and -self.queued[0] == place:
            heapq.heappop(self.queued)

    def _scan_more(self, cached: CachedItems, stream: Stream) -> None:
        first, next_epoch = max(stream.first_unread, self.below - PLACES_PER_SCAN), len(stream.epoch)
        if first < next_epoch < self.below:
            first = next_epoch
        self.found = stream.cached_places(first, self.below, cached.parts)
        self.below = first


def _is_valid(cached: CachedItems, stream: Stream, place: int) -> bool:
    item = stream.item_at(place)
    return stream.next_place(item) == place and cached.parts_of(item) != 0
