"""Who was used least recently, among up to a few million numbered items. Pure."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Recency"]

# The first two entries of the arrays are no items: what follows one that is not in, and the list's two ends in one.
_OUT, _ENDS, _ITEMS = 0, 1, 2


class Recency:
    """A queue of uses in which only an item's last one counts.

    A list that is linked both ways, in arrays: every step takes the same time however many items there are, and there is never
    anything to tidy up, which would hold up whoever comes just then. 12 bytes an item.
    """

    def __init__(self, items: int) -> None:
        # Zeros cost nothing before they are written over: a million items are laid out in no time.
        length = items + _ITEMS
        self._lay_out(np.zeros(length, np.uint32), np.zeros(length, np.uint32), np.zeros(length, np.float32))
        self._next[_ENDS] = self._before[_ENDS] = _ENDS

    def grow(self, items: int) -> None:
        """Make room for more items."""
        more = items + _ITEMS - len(self._next_of)
        new = np.zeros(more, dtype=np.uint32)
        when_s_of = np.concatenate([self._when_s_of, new.astype(np.float32)])
        self._lay_out(np.concatenate([self._next_of, new]), np.concatenate([self._before_of, new]), when_s_of)

    def use(self, item: int, now_s: float) -> None:
        """The item was used now, later than at any use before."""
        self.remove(item)
        self._when_s[item + _ITEMS] = now_s
        self._link(item + _ITEMS, self._before[_ENDS], _ENDS)

    def remove(self, item: int) -> None:
        """Take the item out, if it is in."""
        after, before = self._next[item + _ITEMS], self._before[item + _ITEMS]
        if after != _OUT:
            self._next[before], self._before[after] = after, before
            self._next[item + _ITEMS] = _OUT

    def oldest(self) -> tuple[int, float] | None:
        """The item used least recently, and when that was; None where there is none."""
        first = self._next[_ENDS]
        return None if first == _ENDS else (first - _ITEMS, self._when_s[first])

    def put_back(self, uses: list[tuple[int, float]]) -> None:
        """Have items again that `oldest` has just told of, in its order, and that were removed: as if they had not been."""
        for item, when_s in reversed(uses):
            self._put_first(item, when_s)

    def hold_to(self, wanted: NDArray[np.bool_], first: int = 0) -> None:
        """Have, of the items from `first` on, exactly those for which `wanted` is true, and leave those beyond its end.

        Those that come in count as used before all others. Takes less than a microsecond for each that comes or goes.
        """
        held = self._next_of[first + _ITEMS : first + _ITEMS + len(wanted)] != _OUT
        for item in (np.flatnonzero(held & ~wanted) + first).tolist():
            self.remove(item)
        for item in (np.flatnonzero(wanted & ~held) + first).tolist()[::-1]:
            self._put_first(item, 0.0)

    def _put_first(self, item: int, when_s: float) -> None:
        self._when_s[item + _ITEMS] = when_s
        self._link(item + _ITEMS, _ENDS, self._next[_ENDS])

    def _link(self, entry: int, before: int, after: int) -> None:
        self._next[entry], self._before[entry] = after, before
        self._next[before] = self._before[after] = entry

    def _lay_out(self, next_of: NDArray[np.uint32], before_of: NDArray[np.uint32], when_s_of: NDArray[np.float32]) -> None:
        self._next_of, self._before_of, self._when_s_of = next_of, before_of, when_s_of
        # Views: one number in or out of them takes a third of the time that numpy needs.
        self._next: memoryview = next_of.data
        self._before: memoryview = before_of.data
        self._when_s: Any = when_s_of.data  # memoryview's type knows integers only
