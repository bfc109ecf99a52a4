"""Stores short texts side by side in one block of bytes, without an object for each. Pure."""

from gcs_prefetchd.cache.growable_array import GrowableArray

__all__ = ["StringArena"]

CELL_BYTES = 4  # so that 32-bit numbers address 16 GiB, and a free place has space for the number of the next one
INITIAL_BYTES = 1 << 16


class StringArena:
    """Stores texts of up to `max_text_bytes`, each at the number that `add` returned for it. The caller keeps their lengths.

    The place of a removed text is reused for a text of the same number of cells, so nothing is ever moved to close gaps: that
    would take the longer the more texts there are.
    """

    def __init__(self, max_text_bytes: int) -> None:
        self._array = GrowableArray("B", INITIAL_BYTES)
        self._bytes = self._array.view
        self._end = 0
        self._free = [0] * (max_text_bytes // CELL_BYTES + 2)  # by cells: 1 + the number of the first free place; 0: none

    def add(self, text: bytes) -> int:
        """Store the text; returns its number."""
        cells = _cells(len(text))
        if self._free[cells]:
            number = self._free[cells] - 1
            start = number * CELL_BYTES
            self._free[cells] = int.from_bytes(self._bytes[start : start + CELL_BYTES])
            self._bytes[start : start + len(text)] = text
            return number
        start, self._end = self._end, self._end + cells * CELL_BYTES
        if self._end > len(self._bytes):
            self._bytes = self._array.grow(2 * len(self._bytes))
        self._bytes[start : start + len(text)] = text
        return start // CELL_BYTES

    def get(self, number: int, length_bytes: int) -> bytes:
        """The text."""
        start = number * CELL_BYTES
        return bytes(self._bytes[start : start + length_bytes])

    def remove(self, number: int, length_bytes: int) -> None:
        """Free the text's place."""
        cells = _cells(length_bytes)
        start = number * CELL_BYTES
        self._bytes[start : start + CELL_BYTES] = self._free[cells].to_bytes(CELL_BYTES)
        self._free[cells] = number + 1


def _cells(length_bytes: int) -> int:
    return max(1, (length_bytes + CELL_BYTES - 1) // CELL_BYTES)
