"""Who was used least recently, among up to a few million numbered items. Pure."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Recency"]

SPARE = 1024


class Recency:
    """A queue of uses in which only an item's last one counts.

    A use is appended and voids the item's earlier one, so every step takes constant time; a full queue has what is void
    squeezed out. About 14 bytes an item.
    """

    def __init__(self, items: int) -> None:
        self._place = np.zeros(items, dtype=np.uint32)  # where in the queue the item's last use is, from 1; 0: nowhere
        self._first = self._end = 0
        self._lay_out(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.float32))

    def grow(self, items: int) -> None:
        """Make room for more items."""
        self._place = np.concatenate([self._place, np.zeros(items - len(self._place), dtype=np.uint32)])
        self._lay_out(*self._valid())

    def use(self, item: int, now_s: float) -> None:
        """The item was used now, later than at any use before."""
        if self._end == len(self._items):
            self._lay_out(*self._valid())
        self._items[self._end] = item
        self._when_s[self._end] = now_s
        self._end += 1
        self._places[item] = self._end

    def remove(self, item: int) -> None:
        """Take the item out, if it is in."""
        self._places[item] = 0

    def oldest(self) -> tuple[int, float] | None:
        """The item used least recently, and when that was; None where there is none."""
        while self._first < self._end:
            item = self._items[self._first]
            if self._places[item] == self._first + 1:
                return item, self._when_s[self._first]
            self._first += 1
        return None

    def put_back(self, uses: list[tuple[int, float]]) -> None:
        """Have items again that `oldest` has just told of, in its order, and that were removed: as if they had not been."""
        place = min(self._first + 1, self._end)
        for item, _ in reversed(uses):
            while self._items[place - 1] != item:
                place -= 1
            self._places[item] = place
            self._first = place - 1

    def hold_to(self, wanted: NDArray[np.bool_]) -> None:
        """Have exactly the items for which `wanted` is true; those that come in count as used before all others."""
        items, when_s = self._valid()
        kept = wanted[items]
        missing = wanted.copy()
        missing[items] = False
        new = np.flatnonzero(missing).astype(np.uint32)
        self._place[items[~kept]] = 0
        self._lay_out(np.concatenate([new, items[kept]]), np.concatenate([np.zeros(len(new)), when_s[kept]]))

    def _valid(self) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        places = np.arange(self._first, self._end, dtype=np.uint32)
        items = np.asarray(self._items)[places]
        valid = self._place[items] == places + 1
        return items[valid], np.asarray(self._when_s)[places[valid]]

    def _lay_out(self, items: NDArray[np.uint32], when_s: NDArray[np.float32]) -> None:
        length = len(self._place) + len(self._place) // 4 + SPARE
        queue, times = np.zeros(length, dtype=np.uint32), np.zeros(length, dtype=np.float32)
        self._first, self._end = 0, len(items)
        queue[: self._end], times[: self._end] = items, when_s
        self._place[items] = np.arange(1, self._end + 1, dtype=np.uint32)
        # Views: one number in or out of them takes a third of the time that numpy needs.
        self._items: memoryview = queue.data
        self._places: memoryview = self._place.data
        self._when_s: Any = times.data  # memoryview's type knows integers only
