"""Numbers for the items of a data root. They outlast its manifests: an item that was listed before keeps its number. Pure."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from gcs_prefetchd.planning.stream import NEVER
from gcs_prefetchd.shared.epoch_order import Indices
from gcs_prefetchd.shared.manifest import Manifest, build_manifest
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = ["ManifestHistory", "NumberedManifest"]


class NumberedManifest:
    """A manifest and the numbers of its items. In a data root's first manifest an item's number is its index."""

    def __init__(self, manifest: Manifest, numbers: Indices | None = None) -> None:
        self.manifest = manifest
        self._numbers = numbers
        self._indices: Indices | None = None
        self.item_bytes = max(1.0, float(manifest.size.sum()) / max(1, len(manifest)))  # on average
        self.end = len(manifest)  # one more than the largest number
        if numbers is not None:
            self.end = int(numbers.max()) + 1 if len(numbers) else 0
            self._indices = np.full(self.end, NEVER, dtype=np.uint32)
            self._indices[numbers] = np.arange(len(numbers), dtype=np.uint32)

    def with_same_items(self, manifest: Manifest) -> "NumberedManifest":
        """Number another manifest with the same ids. The two share their arrays of numbers."""
        numbered = NumberedManifest(manifest)
        numbered._numbers, numbered._indices, numbered.end = self._numbers, self._indices, self.end
        return numbered

    def numbers_of(self, indices: Indices) -> Indices:
        """The numbers of the items at these indices of the manifest."""
        return indices if self._numbers is None else self._numbers[indices]

    def index_of(self, item: int) -> int | None:
        """The item's index in the manifest; None if the manifest lacks it."""
        if self._indices is None:
            return item if item < len(self.manifest) else None
        index = int(self._indices[item]) if item < len(self._indices) else NEVER
        return None if index == NEVER else index

    def number_at(self, index: int) -> int:
        """The number of the item at an index of the manifest."""
        return index if self._numbers is None else int(self._numbers[index])

    @property
    def numbers(self) -> Indices:
        """The numbers of all its items."""
        return self.numbers_of(np.arange(len(self.manifest), dtype=np.uint32))

    def versions(self, item: int) -> list[ObjectVersion]:
        """The item's parts in this manifest; empty if the manifest lacks the item."""
        index = self.index_of(item)
        return [] if index is None else self.manifest.versions(index)

    def ids_and_numbers(self) -> Iterator[tuple[str, int]]:
        """Every item's id and number."""
        for index, item_id in enumerate(self.manifest.ids):
            yield item_id, self.number_at(index)


class ManifestHistory:
    """The numbered manifests of one data root, the newest last.

    An item that is no longer listed keeps its number: its files may still be cached, and it may be listed again. So the
    manifests that are discarded leave a remnant: a manifest of the items that no other one has. It is the oldest of all.
    """

    def __init__(self) -> None:
        self.manifests: list[NumberedManifest] = []
        self.end = 0  # one more than the largest number that is used
        self._remnant: NumberedManifest | None = None

    @property
    def newest(self) -> NumberedManifest:
        """The manifest in force."""
        return self.manifests[-1]

    def assign_numbers(self, manifest: Manifest) -> NumberedManifest:
        """Number the items of a manifest; the history does not change. Takes a second for a million: run it in a thread."""
        if not self.manifests:
            return NumberedManifest(manifest)
        if self.newest.manifest.ids == manifest.ids:
            return self.newest.with_same_items(manifest)
        known = dict(pair for numbered in self.manifests for pair in numbered.ids_and_numbers())
        numbers = np.empty(len(manifest), dtype=np.uint32)
        end = self.end
        for index, item_id in enumerate(manifest.ids):
            number = known.get(item_id)
            if number is None:
                number, end = end, end + 1
            numbers[index] = number
        return NumberedManifest(manifest, numbers)

    def add_newest(self, numbered: NumberedManifest) -> None:
        """Put a manifest in force."""
        self.manifests.append(numbered)
        self.end = max(self.end, numbered.end)

    def add_earlier(self, numbered: NumberedManifest) -> None:
        """Add a manifest that was in force before the newest one, which stays in force."""
        self.manifests.insert(-1, numbered)
        self.end = max(self.end, numbered.end)

    def superseded(self, in_use: Collection[NumberedManifest]) -> list[NumberedManifest]:
        """The manifests to discard, for `remnant` and `discard`: neither in use nor one of the newest two.

        The last but one stays, because a reader may have loaded it just before the newest arrived, and still send a plan of it.
        """
        superseded = [one for one in self.manifests[:-2] if one not in in_use]
        return [] if superseded == [self._remnant] else superseded

    def remnant(self, superseded: Sequence[NumberedManifest]) -> NumberedManifest | None:
        """The superseded items that no other manifest has, in their last versions; None if there are none. For a thread."""
        return _remnant(superseded, [one for one in self.manifests if one not in superseded])

    def discard(self, superseded: Collection[NumberedManifest], remnant: NumberedManifest | None) -> None:
        """Replace the superseded manifests by their remnant."""
        kept = [one for one in self.manifests if one not in superseded]
        self.manifests = kept if remnant is None else [remnant, *kept]
        self._remnant = remnant

    def find_manifest(self, digest: str) -> NumberedManifest | None:
        """The newest manifest with this digest."""
        return next((one for one in reversed(self.manifests) if one.manifest.digest == digest), None)

    def find_part(self, name: ObjectName) -> tuple[int, int] | None:
        """The number of the item that an object belongs to, and which part it is; None if it belongs to no item."""
        for numbered in reversed(self.manifests):
            found = numbered.manifest.find(name)
            if found is not None:
                return numbered.number_at(found[0]), found[1]
        return None

    def versions(self, item: int) -> list[ObjectVersion]:
        """The item's parts as they were listed last."""
        for numbered in reversed(self.manifests):
            if versions := numbered.versions(item):
                return versions
        return []


def _remnant(superseded: Sequence[NumberedManifest], kept: Sequence[NumberedManifest]) -> NumberedManifest | None:
    is_listed = np.zeros(max(one.end for one in (*superseded, *kept)), dtype=np.bool_)
    for one in kept:
        is_listed[one.numbers] = True
    numbers: dict[str, int] = {}

    def unlisted_versions() -> Iterator[ObjectVersion]:
        for one in reversed(superseded):
            own = one.numbers
            for index in np.flatnonzero(~is_listed[own]).tolist():
                numbers[one.manifest.ids[index]] = one.number_at(index)
                yield from one.manifest.versions(index)
            is_listed[own] = True

    last = superseded[-1].manifest
    manifest = build_manifest(last.data_root, last.item_patterns, unlisted_versions())
    if not len(manifest):
        return None
    return NumberedManifest(manifest, np.array([numbers[item_id] for item_id in manifest.ids], dtype=np.uint32))
