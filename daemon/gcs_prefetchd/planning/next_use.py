"""What is here of one data root, by the numbers of its items, and which of it is needed when. Pure."""

import heapq
import math
from dataclasses import dataclass, field

import numpy as np

from gcs_prefetchd.planning.lru_queue import Recency
from gcs_prefetchd.planning.stream import NEVER, Stream

__all__ = ["Shelf"]

SCANNED_AT_ONCE = 1024
SORTED_AT_ONCE = 4096  # items; some 2 ms where every one of them comes or goes


class Shelf:
    """Parts of items that are here, the streams that read them, and the queue of what is here and not needed soon."""

    def __init__(self, items: int) -> None:
        self.present = np.zeros(items, dtype=np.uint8)  # a bit for each part that is here
        self.dropped = np.zeros(items, dtype=np.bool_)  # gone although needed: the reader will wait for these
        self.idle = Recency(items)
        self.streams: list[Stream] = []
        self._here = self.present.data
        self._scans: dict[str, _Scan] = {}
        self._sorted = items  # the items up to here are in the queue if they are to be

    def grow(self, items: int) -> None:
        """Make room for more items."""
        more = items - len(self.present)
        self.present = np.concatenate([self.present, np.zeros(more, dtype=np.uint8)])
        self.dropped = np.concatenate([self.dropped, np.zeros(more, dtype=np.bool_)])
        self._here = self.present.data
        self.idle.grow(items)

    def parts(self, item: int) -> int:
        """The parts of the item that are here, a bit each."""
        return self._here[item]

    def set_parts(self, item: int, parts: int) -> None:
        """Note which parts are here now."""
        self._here[item] = parts

    def is_needed(self, item: int) -> bool:
        """Whether some stream is known to read the item."""
        for stream in self.streams:  # noqa: SIM110  # asked several times for each read: any() takes three times as long
            if stream.place_of(item) != NEVER:
                return True
        return False

    def soonest_s(self, item: int, now_s: float) -> float:
        """In how many seconds some stream will read the item; infinity where none is known to."""
        soonest = math.inf
        for stream in self.streams:
            place = stream.place_of(item)
            if place != NEVER and (in_s := stream.in_s(place, now_s)) < soonest:
                soonest = in_s
        return soonest

    def sort_anew(self, *, lru: bool) -> None:
        """The streams have changed: scan them from their far ends again, and begin to queue what is here and needed by none."""
        self._scans = {stream.id: _Scan(stream.known) for stream in self.streams}
        self._sorted = 0
        self.sort_on(lru=lru)

    def sort_on(self, *, lru: bool) -> bool:
        """Go on with some more items; False when all are sorted. Whatever happens between two calls may happen.

        Until then the queue may hold some that are needed by now, and lack some that are not.
        """
        first, end = self._sorted, min(self._sorted + SORTED_AT_ONCE, len(self.present))
        idle = self.present[first:end] != 0
        if not lru:
            for stream in self.streams:
                idle &= stream.place[first:end] == NEVER
        self.idle.hold_to(idle, first)
        self._sorted = end
        return not self.is_sorted

    @property
    def is_sorted(self) -> bool:
        """Whether the queue holds just what is here and needed by none."""
        return self._sorted == len(self.present)

    def reveal(self, stream: Stream, window: int) -> list[int]:
        """Let what is known of the stream's future move on; returns the items that have a next place with it."""
        scan = self._scans[stream.id]
        unscanned = scan.below == stream.known
        revealed = stream.reveal(window)
        if unscanned:
            scan.below = stream.known
        return revealed

    def note(self, item: int, now_s: float) -> None:
        """The item is here, and a stream will read it at another place than before: have `farthest` come to it.

        It does so by one of the streams that read the item; where a scan has that place before it, by itself.
        """
        soonest: tuple[float, int, _Scan] | None = None
        for stream in self.streams:
            place = stream.place_of(item)
            if place != NEVER:
                scan = self._scans[stream.id]
                if place < scan.below:
                    return
                in_s = stream.in_s(place, now_s)
                if soonest is None or in_s < soonest[0]:
                    soonest = (in_s, place, scan)
        if soonest is not None:
            heapq.heappush(soonest[2].noted, -soonest[1])

    def farthest(self, now_s: float) -> tuple[float, Stream, int] | None:
        """Of what is here, what some stream reads last: in how many seconds, the stream, and the place.

        No other item here, of those not taken, is needed later than that; this one may be needed sooner by another stream.
        """
        farthest = None
        for stream in self.streams:
            place = self._scans[stream.id].farthest(self, stream)
            if place is not None:
                in_s = stream.in_s(place, now_s)
                if farthest is None or in_s > farthest[0]:
                    farthest = (in_s, stream, place)
        return farthest

    def take(self, stream: Stream, place: int) -> None:
        """What `farthest` returned is taken; `note` brings it back."""
        self._scans[stream.id].take(place)


@dataclass(slots=True)
class _Scan:
    """How far down from its far end a stream has been looked through for what is here, and what was found on the way.

    `found` and `noted` hold places above `below`, the first in rising order, the other as a heap of the negative places: what
    came to lie there after the scan had passed. Places and not times: these move with the reader's pace, but their order does
    not. Either may hold places that have become void meanwhile.
    """

    below: int
    found: list[int] = field(default_factory=list)
    noted: list[int] = field(default_factory=list)

    def farthest(self, shelf: Shelf, stream: Stream) -> int | None:
        while self.noted and not _is_valid(shelf, stream, -self.noted[0]):
            heapq.heappop(self.noted)
        while True:
            while self.found and not _is_valid(shelf, stream, self.found[-1]):
                self.found.pop()
            if self.found or self.noted or self.below <= stream.start:
                break
            self._look_further(shelf, stream)
        if not self.noted:
            return self.found[-1] if self.found else None
        return max(self.found[-1], -self.noted[0]) if self.found else -self.noted[0]

    def take(self, place: int) -> None:
        while self.found and self.found[-1] == place:
            self.found.pop()
        while self.noted and -self.noted[0] == place:
            heapq.heappop(self.noted)

    def _look_further(self, shelf: Shelf, stream: Stream) -> None:
        first, turn = max(stream.start, self.below - SCANNED_AT_ONCE), len(stream.current)
        if first < turn < self.below:
            first = turn
        self.found = stream.items_here(first, self.below, shelf.present)
        self.below = first


def _is_valid(shelf: Shelf, stream: Stream, place: int) -> bool:
    item = stream.item_at(place)
    return stream.place_of(item) == place and shelf.parts(item) != 0
