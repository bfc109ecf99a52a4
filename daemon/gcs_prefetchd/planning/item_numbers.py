"""Numbers for the items of a data root that outlast its listings: what was listed before keeps its number. Pure."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from gcs_prefetchd.planning.stream import NEVER
from gcs_prefetchd.shared.epoch_order import Indices
from gcs_prefetchd.shared.manifest import Manifest, build_manifest
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = ["Catalog", "Listing"]


class Listing:
    """A manifest with the numbers of its items. In a data root's first manifest an item's number is its index."""

    def __init__(self, manifest: Manifest, numbers: Indices | None = None) -> None:
        self.manifest = manifest
        self._numbers = numbers
        self._indices: Indices | None = None
        self.item_bytes = max(1.0, float(manifest.size.sum()) / max(1, len(manifest)))  # on average
        self.items = len(manifest)  # numbers that it needs
        if numbers is not None:
            self.items = int(numbers.max()) + 1 if len(numbers) else 0
            self._indices = np.full(self.items, NEVER, dtype=np.uint32)
            self._indices[numbers] = np.arange(len(numbers), dtype=np.uint32)

    def of_same_items(self, manifest: Manifest) -> "Listing":
        """Another manifest with the same ids, whose numbers take no memory of their own."""
        listing = Listing(manifest)
        listing._numbers, listing._indices, listing.items = self._numbers, self._indices, self.items
        return listing

    def numbers_of(self, indices: Indices) -> Indices:
        """The numbers of items of the manifest."""
        return indices if self._numbers is None else self._numbers[indices]

    def index_of(self, number: int) -> int | None:
        """The item's index in the manifest, or None where that lacks it."""
        if self._indices is None:
            return number if number < len(self.manifest) else None
        index = int(self._indices[number]) if number < len(self._indices) else NEVER
        return None if index == NEVER else index

    def number_at(self, index: int) -> int:
        """The number of the item at an index of the manifest."""
        return index if self._numbers is None else int(self._numbers[index])

    @property
    def numbers(self) -> Indices:
        """The numbers of all its items."""
        return self.numbers_of(np.arange(len(self.manifest), dtype=np.uint32))

    def versions(self, number: int) -> list[ObjectVersion]:
        """The item's parts as this manifest has them; empty where it lacks the item."""
        index = self.index_of(number)
        return [] if index is None else self.manifest.versions(index)

    def known(self) -> Iterator[tuple[str, int]]:
        """Every id and its number."""
        for index, item_id in enumerate(self.manifest.ids):
            yield item_id, self.number_at(index)


class Catalog:
    """The listings of one data root, the newest last, and how many numbers they use.

    What is listed no more keeps its number all the same: its files may still be here, and it may come back. So the listings
    that are given up leave a remnant, of the items that no other one has; it is the oldest of the listings.
    """

    def __init__(self) -> None:
        self.listings: list[Listing] = []
        self.items = 0
        self._remnant: Listing | None = None

    @property
    def newest(self) -> Listing:
        """The listing in force."""
        return self.listings[-1]

    def number(self, manifest: Manifest) -> Listing:
        """Give the items of a manifest their numbers; changes nothing here. Takes a second for a million: for a thread."""
        if not self.listings:
            return Listing(manifest)
        if self.newest.manifest.ids == manifest.ids:
            return self.newest.of_same_items(manifest)
        known = dict(pair for listing in self.listings for pair in listing.known())
        numbers = np.empty(len(manifest), dtype=np.uint32)
        new = self.items
        for index, item_id in enumerate(manifest.ids):
            number = known.get(item_id)
            if number is None:
                number, new = new, new + 1
            numbers[index] = number
        return Listing(manifest, numbers)

    def take(self, listing: Listing) -> None:
        """Put a listing in force."""
        self.listings.append(listing)
        self.items = max(self.items, listing.items)

    def take_earlier(self, listing: Listing) -> None:
        """Know a listing that was in force before the newest, which stays so."""
        self.listings.insert(-1, listing)
        self.items = max(self.items, listing.items)

    def superseded(self, in_use: Collection[Listing]) -> list[Listing]:
        """The listings to give up, for `remnant` and `give_up`: those that are neither in use nor one of the newest two.

        Whoever has been told of a listing just before the next one came may still send a plan of it.
        """
        superseded = [one for one in self.listings[:-2] if one not in in_use]
        return [] if superseded == [self._remnant] else superseded

    def remnant(self, superseded: Sequence[Listing]) -> Listing | None:
        """What of them no other listing has, as it was listed last; None where that is nothing. For a thread."""
        return _remnant(superseded, [one for one in self.listings if one not in superseded])

    def give_up(self, superseded: Collection[Listing], remnant: Listing | None) -> None:
        """Keep what is left of them in their place."""
        kept = [one for one in self.listings if one not in superseded]
        self.listings = kept if remnant is None else [remnant, *kept]
        self._remnant = remnant

    def listing(self, digest: str) -> Listing | None:
        """The newest listing of a manifest, by its digest."""
        return next((one for one in reversed(self.listings) if one.manifest.digest == digest), None)

    def find(self, name: ObjectName) -> tuple[int, int] | None:
        """The number of the item whose part an object is, and which part; None where it is none's."""
        for listing in reversed(self.listings):
            place = listing.manifest.find(name)
            if place is not None:
                return listing.number_at(place[0]), place[1]
        return None

    def versions(self, number: int) -> list[ObjectVersion]:
        """The item's parts as they were when they were listed last."""
        for listing in reversed(self.listings):
            if versions := listing.versions(number):
                return versions
        return []


def _remnant(superseded: Sequence[Listing], kept: Sequence[Listing]) -> Listing | None:
    listed = np.zeros(max(one.items for one in (*superseded, *kept)), dtype=np.bool_)
    for one in kept:
        listed[one.numbers] = True
    numbers: dict[str, int] = {}

    def lost() -> Iterator[ObjectVersion]:
        for one in reversed(superseded):
            own = one.numbers
            for index in np.flatnonzero(~listed[own]).tolist():
                numbers[one.manifest.ids[index]] = one.number_at(index)
                yield from one.manifest.versions(index)
            listed[own] = True

    last = superseded[-1].manifest
    manifest = build_manifest(last.data_root, last.layout, lost())
    if not len(manifest):
        return None
    return Listing(manifest, np.array([numbers[item_id] for item_id in manifest.ids], dtype=np.uint32))
