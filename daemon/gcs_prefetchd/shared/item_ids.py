"""Ids as one block of UTF-8 and where each ends in it: sorted, compared and mapped into memory without a str for each."""

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

# Sorting compares as many bytes of each text at a time; the eighth of a word says how many of them there were.
WORD_BYTES = 7
TAKEN_AT_ONCE = 1 << 16  # texts; bounds the memory for the positions of their bytes


class Ids(Sequence[str]):
    """Sorted ids in one memory-mapped block of UTF-8; behaves as a list of str without holding one.

    `text` is the block, `ends` where each id ends in it, in bytes. `reload` makes the ids anew in another process, where they
    were loaded from `folder`.
    """

    def __init__(
        self, text: ByteArray, ends: Int64Array, folder: Path | None = None, reload: Callable[[Path], "Ids"] | None = None
    ) -> None:
        self.text = text
        self.ends = ends
        self._folder = folder
        self._reload = reload
        # A single number or slice of an array costs several times that of a memoryview.
        self._bytes = memoryview(text.data)
        self._end_of = memoryview(ends.data)

    @classmethod
    def from_sorted(cls, ids: Iterable[str]) -> "Ids":
        """The ids, which must be sorted."""
        encoded = [item_id.encode() for item_id in ids]
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
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
        """32 hexadecimal digits that tell the ids from any others. Takes 30 ms for a million, once."""
        digest = hashlib.blake2b(f"{len(self)}".encode(), digest_size=16)
        for array in (self.text, self.ends):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def find(self, item_id: str) -> int | None:
        """The index of the id, or None. Takes log2(n) steps."""
        index = bisect_left(range(len(self)), item_id, key=self._at)
        return index if index < len(self) and self._at(index) == item_id else None

    def common_with(self, other: "Ids") -> tuple[Int64Array, Int64Array]:
        """The indices here and there of the ids that both have, in order."""
        if self == other:
            everything = np.arange(len(self))
            return everything, everything
        text = np.concatenate((self.text, other.text))
        ends = np.concatenate((self.ends, other.ends + len(self.text)))
        order, is_first = sort_texts(text, ends)
        again = np.flatnonzero(~is_first)  # sorting is stable: ours, then theirs
        return order[again - 1], order[again] - len(self)

    def _at(self, index: int) -> str:
        start = self._end_of[index - 1] if index else 0
        return str(self._bytes[start : self._end_of[index]], "utf-8")

    def __reduce__(self) -> tuple[object, ...]:
        # Spawned workers map the files that the ids came from, instead of a copy of their own through a pipe.
        if self._reload is not None and self._folder is not None and self._folder.exists():
            return self._reload, (self._folder,)
        return Ids, (np.asarray(self.text), np.asarray(self.ends))

    @property
    def arrays(self) -> dict[str, ByteArray | Int64Array]:
        """The block of text and where each id ends in it, as they are saved."""
        return {"ids": self.text, "ends": self.ends}


def sort_texts(text: ByteArray, ends: Int64Array) -> tuple[Int64Array, NDArray[np.bool_]]:
    """Which text comes when they are sorted as bytes, and for each place in that order whether its text is a new one.

    Equal texts keep their order. Arrays alone, a word of every undecided text at a time: sorting a million str would hold the
    interpreter, and the event loop with it, for a second, and a table as wide as the longest text could fill the memory.
    """
    starts = _starts(ends)
    padded = np.concatenate((text, np.zeros(8, dtype=np.uint8)))
    words = np.ndarray((len(text) + 1,), dtype=">u8", buffer=padded.data, strides=(1,))  # one from every byte on
    order = np.arange(len(ends))
    is_first = np.zeros(len(ends), dtype=np.bool_)
    is_first[:1] = True
    places, depth = order.copy(), 0
    while len(places):
        rows = order[places]
        left = (ends - starts)[rows] - depth
        keys = _keys(words[starts[rows] + depth], left)
        # Only texts that were equal so far are compared. Most that still are stay so, as the parts of an item do.
        if np.any((keys[1:] < keys[:-1]) & ~is_first[places[1:]]):
            by = np.lexsort((keys, np.cumsum(is_first)[places])) if depth else np.argsort(keys, kind="stable")
            order[places], keys, left = rows[by], keys[by], left[by]
        is_first[places[1:]] |= keys[1:] != keys[:-1]
        alike = ~is_first[places[1:]] & (left[1:] > WORD_BYTES)
        undecided = np.concatenate(([False], alike)) | np.concatenate((alike, [False]))
        places, depth = places[undecided], depth + WORD_BYTES
    return order, is_first


def _keys(words: NDArray[np.uint64], left: Int64Array) -> NDArray[np.uint64]:
    """What sorts as the next bytes of each text do, of which so many are left: the bytes, then their count, 8 for more."""
    masks = np.array([2**64 - 2 ** (64 - 8 * kept) for kept in range(WORD_BYTES + 1)], dtype=np.uint64)
    counts = np.minimum(left, WORD_BYTES + 1)
    bits: NDArray[np.uint64] = words.astype(np.uint64) & masks[np.minimum(counts, WORD_BYTES)]
    return bits | counts.astype(np.uint64)


def select_texts(text: ByteArray, ends: Int64Array, rows: Int64Array) -> tuple[ByteArray, Int64Array]:
    """The text of these rows, in their order, and where each ends in it."""
    starts = _starts(ends)
    lengths = (ends - starts)[rows]
    taken_ends = np.cumsum(lengths)
    taken = np.empty(int(lengths.sum()), dtype=np.uint8)
    for low in range(0, len(rows), TAKEN_AT_ONCE):
        some = slice(low, low + TAKEN_AT_ONCE)
        first = int(taken_ends[low] - lengths[low])
        last = int(taken_ends[some][-1])
        shift = starts[rows[some]] - (taken_ends[some] - lengths[some])
        taken[first:last] = text[np.repeat(shift, lengths[some]) + np.arange(first, last)]
    return taken, taken_ends


def _starts(ends: Int64Array) -> Int64Array:
    return np.concatenate((np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]))
