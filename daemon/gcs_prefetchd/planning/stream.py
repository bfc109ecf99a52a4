"""One stream: what a reader will read, epoch after epoch, how far it has come, and when it will read an item next. Pure.

Places count from the start of the current epoch; those of the next epoch follow on. How much of the order is *known* is the
rule of docs/planner.md: to the end of the current epoch, and into the next one's head as far as the window reaches; for an
endless stream with replacement, one epoch's length ahead.
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
    """One epoch's order of numbered items, and for each item its first place in it that is still to be read, or NEVER.

    What comes before `position` has been read.
    `following` holds, for each place, the next one of the same item; None where no item comes twice. The stream whose epoch it
    becomes takes it over, and goes on in `first`.
    """

    number: int
    position: int
    order: Indices
    first: Indices
    following: Indices | None

    @classmethod
    def of(cls, number: int, order: Indices, items: int, position: int = 0) -> "Epoch":
        """Prepare an order of numbers below `items`, to be read from `position` on.

        A million takes some 20 ms, ten times that where items come twice: for a thread.
        """
        first = np.full(items, NEVER, dtype=np.uint32)
        places, left = np.arange(position, len(order), dtype=np.uint32), order[position:]
        first[left[::-1]] = places[::-1]  # of several assignments the last one holds: the first place
        if np.array_equal(first[left], places):
            return cls(number, position, order, first, None)
        following = np.full(len(order), NEVER, dtype=np.uint32)
        by_item = np.argsort(order, kind="stable").astype(np.uint32)
        again = order[by_item[1:]] == order[by_item[:-1]]
        following[by_item[:-1][again]] = by_item[1:][again]
        return cls(number, position, order, first, following)

    def __len__(self) -> int:
        return len(self.order)

    def after(self, place: int) -> int:
        """The next place of the same item, or NEVER."""
        return NEVER if self.following is None else int(self.following[place])


class Stream:
    """Where one reader is in its order.

    `endless`: one epoch's length is known ahead at any moment. `position` counts the reads of this epoch. Workers overtake
    each other, and a report can get lost: `start` is the first place not read yet, `front` the one after the last read.
    `place` is each item's next known place, or NEVER. `planned` is how far prefetching has come, `advised` how far
    what is here has been read ahead.
    """

    def __init__(self, stream_id: str, job: str, epoch: Epoch, *, endless: bool = False) -> None:
        self.id = stream_id
        self.job = job
        self.endless = endless
        self.rate = MovingRate()
        self.turn(epoch)

    def __len__(self) -> int:
        return len(self.current)

    @property
    def ended(self) -> bool:
        """Whether all of the epoch has been read."""
        return self.position >= len(self.current)

    def turn(self, epoch: Epoch) -> None:
        """Another epoch begins: what was not read of the one before will not be."""
        self.current = epoch
        self.upcoming: Epoch | None = None
        self.known = len(epoch)
        self.position = self.start = self.front = self.planned = self.advised = epoch.position
        self.place = epoch.first  # a copy would take memory and, of a large epoch, the event loop's time
        self._places = self.place.data  # one number in or out of it takes a third of the time that numpy needs
        self._order = epoch.order.data

    def advance(self) -> None:
        """The next epoch, which is known, begins. What has been read of its head already stays so."""
        assert self.upcoming is not None
        upcoming, length = self.upcoming, len(self.current)
        head = upcoming.order[: self.known - length]
        read: list[int] = head[self.place[head] > np.arange(length, self.known)].tolist()
        self.turn(upcoming)
        for item in read:
            self.mark_read(item)

    def grow(self, items: int) -> None:
        """Make room for the numbers of more items; none of them is in the order."""
        if items > len(self.place):
            self.place = np.concatenate([self.place, np.full(items - len(self.place), NEVER, dtype=np.uint32)])
            self._places = self.place.data

    def append(self, epoch: Epoch) -> None:
        """The next epoch's order, which `reveal` needs towards the end of this one."""
        self.upcoming = epoch

    def place_of(self, item: int) -> int:
        """The next known place of an item, or NEVER."""
        return self._places[item]

    def item_at(self, place: int) -> int:
        """The item at a known place."""
        length = len(self._order)
        if place < length:
            return self._order[place]
        assert self.upcoming is not None
        return int(self.upcoming.order[place - length])

    def items_here(self, first: int, end: int, present: NDArray[np.uint8]) -> list[int]:
        """The known places from `first` to `end`, all of one epoch, whose item is present and is not read before them."""
        length = len(self._order)
        epoch, base = (self.current, 0) if end <= length else (self.upcoming, length)
        assert epoch is not None
        items = epoch.order[first - base : end - base]
        here = (present[items] != 0) & (self.place[items] == np.arange(first, end, dtype=np.uint32))
        found: list[int] = (np.flatnonzero(here) + first).tolist()
        return found

    def unbroken(self, here: NDArray[np.bool_]) -> int:
        """How many items not read yet, from the first of them on and as far as planned, are `here` before one is not."""
        end = min(self.planned, len(self.current))
        items = self.current.order[self.start : end]
        unread = self.place[items] == np.arange(self.start, max(self.start, end), dtype=np.uint32)
        gaps = np.flatnonzero(unread & ~here[items])
        return int(np.count_nonzero(unread[: gaps[0]] if len(gaps) else unread))

    def mark_read(self, item: int) -> bool:
        """Note that the item was read, at its next known place; False where it has none."""
        places = self._places
        place = places[item]
        if place == NEVER:
            return False
        places[item] = self._place_after(place, item)
        self.position += 1
        self.front = max(self.front, place + 1)
        if place == self.start:
            start, known = place + 1, self.known
            while start < known and places[self.item_at(start)] != start:
                start += 1
            self.start = start
        return True

    def reveal(self, window: int) -> list[int]:
        """Let what is known reach as far as it should by now; returns the items that have a next place with it."""
        length = len(self.current)
        wanted = self.window_start(window) + (length if self.endless else window)
        end = min(wanted, length + (0 if self.upcoming is None else len(self.upcoming)))
        revealed = []
        for place in range(self.known, end):
            item = self.item_at(place)
            if self._places[item] == NEVER:
                self._places[item] = place
                revealed.append(item)
        self.known = max(self.known, end)
        return revealed

    def window_start(self, window: int) -> int:
        """Where the window begins: at the first place not read. One that a lost report left unread holds up nothing: half of
        the window at least lies ahead of the last read."""
        return max(self.start, self.front - window // 2)

    def plan_again(self, item: int) -> None:
        """Something of this item is not on disk although it was planned: plan from there once more."""
        place = self._places[item]
        if place < self.planned:
            self.planned = max(place, self.start)

    def in_s(self, place: int, now_s: float) -> float:
        """In how many seconds the place will be read, at the rate of late; 0 where it is overdue."""
        return max(0, place - self.start) / self.rate.per_s(now_s)

    def _place_after(self, place: int, item: int) -> int:
        length = len(self._order)
        if place >= length:
            assert self.upcoming is not None
            after = self.upcoming.after(place - length)
        else:
            after = self.current.after(place)
            if after != NEVER:
                return after
            after = NEVER if self.upcoming is None else int(self.upcoming.first[item])
        return after + length if after != NEVER and after + length < self.known else NEVER
