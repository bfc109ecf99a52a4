"""Short texts side by side in one block of bytes, without an object for each. Pure."""

from gcs_prefetchd.cache.growable_array import GrowableArray

__all__ = ["StringArena"]

CELL_BYTES = 4  # so that numbers of 32 bits find a text in 16 GiB, and a void place has room for the number of the next
FIRST_BYTES = 1 << 16


class StringArena:
    """Holds texts of up to `longest_bytes`, each at the number that `add` returned for it. Whoever adds keeps their lengths.

    A removed text's place is given to the next one of about its length, so nothing is ever moved to close gaps: that would
    take as long as there are texts.
    """

    def __init__(self, longest_bytes: int) -> None:
        self._column = GrowableArray("B", FIRST_BYTES)
        self._bytes = self._column.view
        self._end = 0
        self._void = [0] * (longest_bytes // CELL_BYTES + 2)  # by cells: the number after that of the first void place; 0: none

    def add(self, text: bytes) -> int:
        """Hold the text; returns its number."""
        cells = _cells(len(text))
        if self._void[cells]:
            number = self._void[cells] - 1
            start = number * CELL_BYTES
            self._void[cells] = int.from_bytes(self._bytes[start : start + CELL_BYTES])
            self._bytes[start : start + len(text)] = text
            return number
        start, self._end = self._end, self._end + cells * CELL_BYTES
        if self._end > len(self._bytes):
            self._bytes = self._column.grow(2 * len(self._bytes))
        self._bytes[start : start + len(text)] = text
        return start // CELL_BYTES

    def get(self, number: int, length_bytes: int) -> bytes:
        """The text."""
        start = number * CELL_BYTES
        return bytes(self._bytes[start : start + length_bytes])

    def remove(self, number: int, length_bytes: int) -> None:
        """Let others have its place."""
        cells = _cells(length_bytes)
        start = number * CELL_BYTES
        self._bytes[start : start + CELL_BYTES] = self._void[cells].to_bytes(CELL_BYTES)
        self._void[cells] = number + 1


def _cells(length_bytes: int) -> int:
    return max(1, (length_bytes + CELL_BYTES - 1) // CELL_BYTES)
