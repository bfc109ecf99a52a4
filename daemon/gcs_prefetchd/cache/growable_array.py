"""Long arrays of numbers that grow without being copied: the kernel extends their memory. Pure."""

import mmap
from struct import calcsize
from typing import Literal

__all__ = ["GrowableArray"]


class GrowableArray:
    """Numbers of one `kind` (as in `array`), 0 at first. They are in `view`, until `grow` replaces it.

    Pages that were never written take no memory, so space for twice as many numbers costs nothing. And growing leaves no holes
    in the heap, as growing an `array` does.
    """

    def __init__(self, kind: Literal["B", "I", "Q"], length: int) -> None:
        self._kind = kind
        self._item_bytes = calcsize(kind)
        self._memory = mmap.mmap(-1, length * self._item_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = memoryview(self._memory)
        self.view: memoryview = self._bytes.cast(kind)

    def grow(self, length: int) -> memoryview:
        """Make space for `length` numbers; returns the new view, and invalidates the previous one."""
        self.view.release()
        self._bytes.release()
        self._memory.resize(length * self._item_bytes)
        self._bytes = memoryview(self._memory)
        self.view = self._bytes.cast(self._kind)
        return self.view
