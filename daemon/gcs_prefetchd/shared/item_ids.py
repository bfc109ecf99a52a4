"""Item ids as one block of UTF-8 and the offsets of their ends: sorted, compared and memory-mapped without a str for each."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["ByteArray", "Ids", "Int64Array", "select_texts", "sort_texts"]

ByteArray = NDArray[np.uint8]
Int64Array = NDArray[np.int64]

# Sorting compares this many bytes of each text at a time; the eighth byte of a word holds how many of them there were.
WORD_BYTES = 7
SELECT_BATCH = 1 << 16  # texts; bounds the memory for the positions of their bytes


class Ids(Sequence[str]):
    """Sorted ids in one memory-mapped block of UTF-8. Behaves like a list of str without holding any.

    `text` is the block, `ends` the byte offsets at which the ids end. If the ids were loaded from `folder`, another process
    gets them by calling `reload` with it.
    """

    def __init__(
        self, text: ByteArray, ends: Int64Array, folder: Path | None = None, reload: Callable[[Path], "Ids"] | None = None
    ) -> None:
        self.text = text
        self.ends = ends
        self._folder = folder
        self._reload = reload
        # A single number or slice of an array costs several times as much as one of a memoryview.
        self._bytes = memoryview(text.data)
        self._end_of = memoryview(ends.data)

    @classmethod
    def from_sorted(cls, ids: Iterable[str]) -> "Ids":
        """The ids, which must be sorted."""
        encoded = [item_id.encode() for item_id in ids]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self._at(index % len(self))

    def __iter__(self) -> Iterator[str]:
        return map(self._at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Ids):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # a list of ids has no hash either

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that identify the ids. Takes 30 ms for a million, once."""
        digest = hashlib.blake2b(f"{len(self)}".encode(), digest_size=16)
        for array in (self.text, self.ends):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def find(self, item_id: str) -> int | None:
        """The index of the id, or None. Takes log2(n) steps."""
        index = bisect_left(range(len(self)), item_id, key=self._at)
        return index if index < len(self) and self._at(index) == item_id else None

    def common_with(self, other: "Ids") -> tuple[Int64Array, Int64Array]:
        """The indices, in `self` and in `other`, of the ids that both contain, in order."""
        if self == other:
            everything = np.arange(len(self))
            return everything, everything
        text = np.concatenate((self.text, other.text))
        ends = np.concatenate((self.ends, other.ends + len(self.text)))
        order, is_first = sort_texts(text, ends)
        repeated = np.flatnonzero(~is_first)  # sorting is stable: ours, then theirs
        return order[repeated - 1], order[repeated] - len(self)

    def _at(self, index: int) -> str:
        start = self._end_of[index - 1] if index else 0
        return str(self._bytes[start : self._end_of[index]], "utf-8")

    def __reduce__(self) -> tuple[object, ...]:
        # Spawned workers map the files of the ids, instead of receiving a copy through a pipe.
        if self._reload is not None and self._folder is not None and self._folder.exists():
            return self._reload, (self._folder,)
        return Ids, (np.asarray(self.text), np.asarray(self.ends))

    @property
    def arrays(self) -> dict[str, ByteArray | Int64Array]:
        """The block of text and the offsets of the ids' ends, as they are saved."""
        return {"ids": self.text, "ends": self.ends}


def sort_texts(text: ByteArray, ends: Int64Array) -> tuple[Int64Array, NDArray[np.bool_]]:
    """The indices that sort the texts as bytes, and for each position in that order whether its text is the first of equals.

    Equal texts keep their order. Only arrays are used, one word of every undecided text at a time: sorting a million str would
    block the interpreter, and so the event loop, for a second, and a table as wide as the longest text could fill the memory.
    """
    starts = _starts(ends)
    padded = np.concatenate((text, np.zeros(8, dtype=np.uint8)))
    words = np.ndarray((len(text) + 1,), dtype=">u8", buffer=padded.data, strides=(1,))  # one starting at every byte
    order = np.arange(len(ends))
    is_first = np.zeros(len(ends), dtype=np.bool_)
    is_first[:1] = True
    positions, depth = order.copy(), 0
    while len(positions):
        rows = order[positions]
        left = (ends - starts)[rows] - depth
        keys = _keys(words[starts[rows] + depth], left)
        # Only texts that were equal so far are compared. Most of those stay equal, as the parts of an item do.
        if np.any((keys[1:] < keys[:-1]) & ~is_first[positions[1:]]):
            by = np.lexsort((keys, np.cumsum(is_first)[positions])) if depth else np.argsort(keys, kind="stable")
            order[positions], keys, left = rows[by], keys[by], left[by]
        is_first[positions[1:]] |= keys[1:] != keys[:-1]
        equal = ~is_first[positions[1:]] & (left[1:] > WORD_BYTES)
        undecided = np.concatenate(([False], equal)) | np.concatenate((equal, [False]))
        positions, depth = positions[undecided], depth + WORD_BYTES
    return order, is_first


def _keys(words: NDArray[np.uint64], left: Int64Array) -> NDArray[np.uint64]:
    """Keys that sort like the next bytes of each text, of which `left` remain: the bytes, then their count, 8 for more."""
    masks = np.array([2**64 - 2 ** (64 - 8 * kept) for kept in range(WORD_BYTES + 1)], dtype=np.uint64)
    counts = np.minimum(left, WORD_BYTES + 1)
    bits: NDArray[np.uint64] = words.astype(np.uint64) & masks[np.minimum(counts, WORD_BYTES)]
    return bits | counts.astype(np.uint64)


def select_texts(text: ByteArray, ends: Int64Array, rows: Int64Array) -> tuple[ByteArray, Int64Array]:
    """The texts of these rows, in their order, and the offsets of their ends."""
    starts = _starts(ends)
    lengths = (ends - starts)[rows]
    selected_ends = np.cumsum(lengths)
    selected = np.empty(int(lengths.sum()), dtype=np.uint8)
    for low in range(0, len(rows), SELECT_BATCH):
        batch = slice(low, low + SELECT_BATCH)
        first = int(selected_ends[low] - lengths[low])
        last = int(selected_ends[batch][-1])
        shift = starts[rows[batch]] - (selected_ends[batch] - lengths[batch])
        selected[first:last] = text[np.repeat(shift, lengths[batch]) + np.arange(first, last)]
    return selected, selected_ends


def _starts(ends: Int64Array) -> Int64Array:
    return np.concatenate((np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]))
