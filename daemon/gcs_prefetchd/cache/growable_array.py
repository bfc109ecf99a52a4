"""Long columns of numbers that grow without being copied: memory of their own, extended by the kernel. Pure."""

import mmap
from struct import calcsize
from typing import Literal

__all__ = ["GrowableArray"]


class GrowableArray:
    """Numbers of one `kind` (as in `array`), at first 0. `view` holds them, until `grow` makes another view.

    What was never written takes no memory, so room for twice as many costs nothing; and nothing is left behind in the heap,
    as it is when an array grows.
    """

    def __init__(self, kind: Literal["B", "I", "Q"], length: int) -> None:
        self._kind = kind
        self._item_bytes = calcsize(kind)
        self._memory = mmap.mmap(-1, length * self._item_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = memoryview(self._memory)
        self.view: memoryview = self._bytes.cast(kind)

    def grow(self, length: int) -> memoryview:
        """Make room for so many numbers; returns the new view, and the one before is of no more use."""
        self.view.release()
        self._bytes.release()
        self._memory.resize(length * self._item_bytes)
        self._bytes = memoryview(self._memory)
        self.view = self._bytes.cast(self._kind)
        return self.view
