"""Which side of the train/test split each item is on. No I/O."""

import itertools
from collections.abc import Iterable, Sequence
from typing import overload

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from gcs_prefetchd.shared.errors import SettingsError
from gcs_prefetchd.shared.manifest import Ids

__all__ = ["Selection", "consistent_train_test_split"]


def consistent_train_test_split(items: Sequence[str], test_ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (int64, shape (n,)) of the items to train with and of those to test with.

    An item is for testing if the crc32c of its id is below `test_ratio` of its range, so it never changes sides as the dataset
    grows. Raises SettingsError unless 0 <= test_ratio <= 1.
    """
    if not 0 <= test_ratio <= 1:
        raise SettingsError(f"test_ratio must be between 0 and 1, not {test_ratio}")
    checksums = np.fromiter(map(google_crc32c.value, _encoded(items)), dtype=np.float64, count=len(items))
    is_test = checksums < test_ratio * 2**32
    return torch.from_numpy(np.flatnonzero(~is_test)), torch.from_numpy(np.flatnonzero(is_test))


def _encoded(items: Sequence[str]) -> Iterable[bytes]:
    if not isinstance(items, Ids):
        return (item.encode() for item in items)
    # A million ids are sliced from one block in 0.2 s; decoding each of them first takes 2 s.
    text = items.text.tobytes()
    ends = [0, *items.ends.tolist()]
    return (text[start:end] for start, end in itertools.pairwise(ends))


class Selection(Sequence[str]):
    """Some of the items, by index: a list of str that holds 8 bytes an item and shares the ids."""

    def __init__(self, items: Sequence[str], indices: NDArray[np.int64]) -> None:
        self._items = items
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Selection": ...
    def __getitem__(self, index: int | slice) -> "str | Selection":
        if isinstance(index, slice):
            return Selection(self._items, self._indices[index])
        return self._items[int(self._indices[index])]
