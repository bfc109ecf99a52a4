"""Ids of items: from the names of their parts, and which side of the train/test split each is on. No I/O."""

import itertools
import logging
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from gcs_prefetchd.shared.errors import ItemError, SettingsError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Ids

__all__ = ["Items", "Selection", "complete_items", "consistent_train_test_split", "ids_of", "warn_of_incomplete"]

SHOWN_NAMES = 5

log = logging.getLogger("gcs_dataset")


@dataclass(frozen=True, slots=True)
class Items:
    """The ids that have all their parts, and the names of the parts that others lack."""

    ids: Ids
    incomplete: tuple[str, ...]


def ids_of(names: Iterable[str], where: str) -> list[str]:
    """The sorted ids of files or objects: their names below the folder `where`, without the extension.

    Names that end in "/" are folder placeholders and no items. Raises ItemError where two names have the same id, because
    only one of them could ever be read, and where there is none.
    """
    by_id: dict[str, str] = {}
    for name in names:
        if name.endswith("/"):
            continue
        item_id = posixpath.splitext(name)[0]
        other = by_id.setdefault(item_id, name)
        if other != name:
            raise ItemError(f"{where}: {other} and {name} have the same id {item_id!r}")
    if not by_id:
        raise ItemError(f"{where}: holds no items")
    return sorted(by_id)


def complete_items(names: Iterable[str], item_patterns: ItemPatterns, where: str) -> Items:
    """Sort the names (below the data root `where`) into items; those that lack a part are named and left out."""
    parts: list[set[str]] = [set() for _ in item_patterns.patterns]
    for name in names:
        match = item_patterns.match(name)
        if match is not None:
            parts[match[1]].add(match[0])
    complete = set.intersection(*parts)
    incomplete = tuple(
        f"{where}/{item_patterns.part_name(item_id, part)}"
        for item_id in sorted(set().union(*parts) - complete)
        for part, ids in enumerate(parts)
        if item_id not in ids
    )
    return Items(Ids.from_sorted(sorted(complete)), incomplete)


def warn_of_incomplete(items: Items, item_patterns: ItemPatterns, where: str) -> None:
    """Say once which parts are missing; raises ItemError where no item is complete."""
    shown = ", ".join(items.incomplete[:SHOWN_NAMES])
    more = len(items.incomplete) - SHOWN_NAMES
    missing = shown + (f" and {more} more" if more > 0 else "")
    if not items.ids:
        wanted = " with ".join(item_patterns.patterns)
        raise ItemError(f"{where}: holds no item ({wanted})" + (f"; missing: {missing}" if missing else ""))
    if missing:
        log.warning("%s: items without all their parts are left out; missing: %s", where, missing)


def consistent_train_test_split(items: Sequence[str], test_ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (int64, shape (n,)) of the items to train with and of those to test with.

    An item is for testing when the crc32c of its id is below `test_ratio` of its range, so it never changes sides as the
    dataset grows. Raises SettingsError unless 0 <= test_ratio <= 1.
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
