"""A queue of least recently used items, for up to a few million numbered items. Pure."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LRUQueue"]

# The first two entries of the arrays are not items. _OUT in an item's `next` means that the item is not in the queue; _ENDS is
# both ends of the list.
_OUT, _ENDS, _ITEMS = 0, 1, 2


class LRUQueue:
    """Items ordered by their last use, the least recently used first.

    A doubly linked list in arrays: every step takes the same time, however many items there are. No step ever tidies up, which
    would delay the caller that it happens to. 12 bytes an item.
    """

    def __init__(self, items: int) -> None:
        # Zeros cost nothing until they are overwritten: a queue of a million items is created in no time.
        length = items + _ITEMS
        self._set_arrays(np.zeros(length, np.uint32), np.zeros(length, np.uint32), np.zeros(length, np.float32))
        self._next[_ENDS] = self._previous[_ENDS] = _ENDS

    def grow(self, items: int) -> None:
        """Make space for more items."""
        more = items + _ITEMS - len(self._next_array)
        new = np.zeros(more, dtype=np.uint32)
        self._set_arrays(
            np.concatenate([self._next_array, new]),
            np.concatenate([self._previous_array, new]),
            np.concatenate([self._used_s_array, new.astype(np.float32)]),
        )

    def use(self, item: int, now_s: float) -> None:
        """The item was used now, later than all others: move or add it to the end."""
        self.remove(item)
        self._used_s[item + _ITEMS] = now_s
        self._link(item + _ITEMS, self._previous[_ENDS], _ENDS)

    def remove(self, item: int) -> None:
        """Remove the item, if it is in the queue."""
        following, previous = self._next[item + _ITEMS], self._previous[item + _ITEMS]
        if following != _OUT:
            self._next[previous], self._previous[following] = following, previous
            self._next[item + _ITEMS] = _OUT

    def oldest(self) -> tuple[int, float] | None:
        """The least recently used item and its last use; None if the queue is empty."""
        first = self._next[_ENDS]
        return None if first == _ENDS else (first - _ITEMS, self._used_s[first])

    def put_back(self, uses: list[tuple[int, float]]) -> None:
        """Undo the removal of the items that `oldest` has just returned, given in its order."""
        for item, used_s in reversed(uses):
            self._add_first(item, used_s)

    def set_members(self, is_member: NDArray[np.bool_], first: int = 0) -> None:
        """Of the items from `first` on, hold exactly those for which `is_member` is true; leave those beyond its end alone.

        Items that enter count as used before all others. Takes less than a microsecond for each that enters or leaves.
        """
        is_in = self._next_array[first + _ITEMS : first + _ITEMS + len(is_member)] != _OUT
        for item in (np.flatnonzero(is_in & ~is_member) + first).tolist():
            self.remove(item)
        for item in (np.flatnonzero(is_member & ~is_in) + first).tolist()[::-1]:
            self._add_first(item, 0.0)

    def _add_first(self, item: int, used_s: float) -> None:
        self._used_s[item + _ITEMS] = used_s
        self._link(item + _ITEMS, _ENDS, self._next[_ENDS])

    def _link(self, entry: int, previous: int, following: int) -> None:
        self._next[entry], self._previous[entry] = following, previous
        self._next[previous] = self._previous[following] = entry

    def _set_arrays(self, following: NDArray[np.uint32], previous: NDArray[np.uint32], used_s: NDArray[np.float32]) -> None:
        self._next_array, self._previous_array, self._used_s_array = following, previous, used_s
        # Views: to read or write one number through them takes a third of the time that numpy needs.
        self._next: memoryview = following.data
        self._previous: memoryview = previous.data
        self._used_s: Any = used_s.data  # memoryview's type knows integers only
