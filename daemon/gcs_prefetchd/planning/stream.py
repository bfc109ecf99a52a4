"""One stream: what a reader reads, epoch after epoch, its position by the reads that were reported, and when it will read an
item next. Pure.

A place is an index into the order of the current epoch; the places of the next epoch follow on. How much of the order is
*known* is the rule of docs/planner.md: to the end of the current epoch, and into the next one's head as far as the window
reaches; for an endless stream with replacement, one epoch's length ahead.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gcs_prefetchd.shared.epoch_order import Indices
from gcs_prefetchd.shared.moving_average import MovingRate

__all__ = ["NEVER", "Epoch", "Stream"]

NEVER = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Epoch:
    """The order of numbered items in one epoch, read from `position` on.

    `first_places` holds for each item its first unread place, or NEVER. `following` holds for each place the next place of the
    same item, or NEVER; it is None if no item occurs twice. The stream that starts the epoch takes over `first_places` and
    changes it.
    """

    number: int
    position: int
    order: Indices
    first_places: Indices
    following: Indices | None

    @classmethod
    def from_order(cls, number: int, order: Indices, items: int, position: int = 0) -> "Epoch":
        """Prepare an order of item numbers, all of them below `items`.

        A million takes some 20 ms, ten times that if items occur twice: run it in a thread.
        """
        first_places = np.full(items, NEVER, dtype=np.uint32)
        places, unread = np.arange(position, len(order), dtype=np.uint32), order[position:]
        first_places[unread[::-1]] = places[::-1]  # of several assignments to an item the last one holds: its first place
        if np.array_equal(first_places[unread], places):
            return cls(number, position, order, first_places, None)
        following = np.full(len(order), NEVER, dtype=np.uint32)
        by_item = np.argsort(order, kind="stable").astype(np.uint32)
        is_repeated = order[by_item[1:]] == order[by_item[:-1]]
        following[by_item[:-1][is_repeated]] = by_item[1:][is_repeated]
        return cls(number, position, order, first_places, following)

    def __len__(self) -> int:
        return len(self.order)

    def following_place(self, place: int) -> int:
        """The next place of the item at this place, or NEVER."""
        return NEVER if self.following is None else int(self.following[place])


class Stream:
    """The order of one reader, and its position.

    `is_endless`: one epoch's length is known ahead at any moment. `position` counts the reads of this epoch. Workers overtake
    each other and reports get lost, so it is not a place: `first_unread` is the first unread place, and `front` the place after
    the farthest read. `next_places` holds each item's next known place, or NEVER. Three places limit what was done so far:
    `known_end` what is known, `planned_end` prefetching, `read_ahead_end` reading cached files into memory.
    """

    def __init__(self, stream_id: str, job: str, epoch: Epoch, *, is_endless: bool = False) -> None:
        self.id = stream_id
        self.job = job
        self.is_endless = is_endless
        self.rate = MovingRate()
        self.start_epoch(epoch)

    def __len__(self) -> int:
        return len(self.epoch)

    @property
    def is_finished(self) -> bool:
        """Whether all of the epoch has been read."""
        return self.position >= len(self.epoch)

    def start_epoch(self, epoch: Epoch) -> None:
        """Start another epoch. What was not read of the one before counts no longer."""
        self.epoch = epoch
        self.next_epoch: Epoch | None = None
        self.known_end = len(epoch)
        self.position = self.first_unread = self.front = self.planned_end = self.read_ahead_end = epoch.position
        self.next_places = epoch.first_places  # a copy would cost memory, and for a large epoch the event loop's time
        self._next_places = self.next_places.data  # to read or write one number takes a third of the time that numpy needs
        self._order = epoch.order.data

    def start_next_epoch(self) -> None:
        """Start the next epoch, which must be known. What has been read of its head stays read."""
        assert self.next_epoch is not None
        next_epoch, length = self.next_epoch, len(self.epoch)
        head = next_epoch.order[: self.known_end - length]
        read: list[int] = head[self.next_places[head] > np.arange(length, self.known_end)].tolist()
        self.start_epoch(next_epoch)
        for item in read:
            self.mark_read(item)

    def set_next_epoch(self, epoch: Epoch) -> None:
        """Set the next epoch's order, which `extend_known` needs towards the end of this one."""
        self.next_epoch = epoch

    def grow(self, items: int) -> None:
        """Make space for more item numbers; none of them is in the order."""
        if items > len(self.next_places):
            more = np.full(items - len(self.next_places), NEVER, dtype=np.uint32)
            self.next_places = np.concatenate([self.next_places, more])
            self._next_places = self.next_places.data

    def next_place(self, item: int) -> int:
        """The next known place of an item, or NEVER."""
        return self._next_places[item]

    def item_at(self, place: int) -> int:
        """The item at a known place."""
        length = len(self._order)
        if place < length:
            return self._order[place]
        assert self.next_epoch is not None
        return int(self.next_epoch.order[place - length])

    def cached_places(self, first: int, end: int, parts: NDArray[np.uint8]) -> list[int]:
        """The known places from `first` to `end`, all of one epoch, where a cached item is read next."""
        length = len(self._order)
        epoch, base = (self.epoch, 0) if end <= length else (self.next_epoch, length)
        assert epoch is not None
        items = epoch.order[first - base : end - base]
        is_cached = (parts[items] != 0) & (self.next_places[items] == np.arange(first, end, dtype=np.uint32))
        places: list[int] = (np.flatnonzero(is_cached) + first).tolist()
        return places

    def runway_items(self, is_ready: NDArray[np.bool_]) -> int:
        """How many unread items, from the first one on and as far as prefetching has planned, are ready before one is not."""
        end = min(self.planned_end, len(self.epoch))
        items = self.epoch.order[self.first_unread : end]
        is_unread = self.next_places[items] == np.arange(self.first_unread, max(self.first_unread, end), dtype=np.uint32)
        gaps = np.flatnonzero(is_unread & ~is_ready[items])
        return int(np.count_nonzero(is_unread[: gaps[0]] if len(gaps) else is_unread))

    def mark_read(self, item: int) -> bool:
        """Mark the item as read, at its next known place; False if it has none."""
        next_places = self._next_places
        place = next_places[item]
        if place == NEVER:
            return False
        next_places[item] = self._following_place(place, item)
        self.position += 1
        self.front = max(self.front, place + 1)
        if place == self.first_unread:
            first_unread, known_end = place + 1, self.known_end
            while first_unread < known_end and next_places[self.item_at(first_unread)] != first_unread:
                first_unread += 1
            self.first_unread = first_unread
        return True

    def extend_known(self, window: int) -> list[int]:
        """Extend what is known as far as it should reach by now; returns the items that have a next place because of it."""
        length = len(self.epoch)
        wanted_end = self.window_start(window) + (length if self.is_endless else window)
        end = min(wanted_end, length + (0 if self.next_epoch is None else len(self.next_epoch)))
        needed = []
        for place in range(self.known_end, end):
            item = self.item_at(place)
            if self._next_places[item] == NEVER:
                self._next_places[item] = place
                needed.append(item)
        self.known_end = max(self.known_end, end)
        return needed

    def window_start(self, window: int) -> int:
        """The first place of the window: the first unread place. A place that a lost report left unread does not stop the
        window: at least half of it is ahead of the farthest read."""
        return max(self.first_unread, self.front - window // 2)

    def plan_again(self, item: int) -> None:
        """Plan from this item on again: it is not ready although it was planned."""
        place = self._next_places[item]
        if place < self.planned_end:
            self.planned_end = max(place, self.first_unread)

    def time_until_s(self, place: int, now_s: float) -> float:
        """In how many seconds the place will be read, at the current rate; 0 if it is overdue."""
        return max(0, place - self.first_unread) / self.rate.per_s(now_s)

    def _following_place(self, place: int, item: int) -> int:
        length = len(self._order)
        if place >= length:
            assert self.next_epoch is not None
            following = self.next_epoch.following_place(place - length)
        else:
            following = self.epoch.following_place(place)
            if following != NEVER:
                return following
            following = NEVER if self.next_epoch is None else int(self.next_epoch.first_places[item])
        return following + length if following != NEVER and following + length < self.known_end else NEVER
