"""Which part of which item lies at a path of the cache, and back. Pure."""

from collections.abc import Mapping, Sequence

from gcs_prefetchd.planning.item_numbers import Catalog
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path, name_of

__all__ = ["Place", "Places"]

REMEMBERED = 100_000

Place = tuple[str, int, int]  # data root, number of an item, part


class Places:
    """Looks places up in the listings of `catalogs`, by data root, which are their owner's to fill: `clear` after a change.

    What comes up soon or has just come up is remembered, because to find it takes a while.
    """

    def __init__(self, catalogs: Mapping[str, Catalog]) -> None:
        self._catalogs = catalogs
        self._remembered: dict[str, Place] = {}

    def __contains__(self, path: str) -> bool:
        """Whether the place comes up soon, or has just come up."""
        return path in self._remembered

    def clear(self) -> None:
        """Items have new numbers, and objects perhaps other ones."""
        self._remembered.clear()

    def forget(self, path: str) -> None:
        """It will not come up soon."""
        self._remembered.pop(path, None)

    def locate(self, path: str) -> Place | None:
        """Which part of which item lies at a path, or None."""
        place = self._remembered.get(path)
        if place is not None:
            return place
        name = name_of(path)
        return None if name is None else self._find(name)

    def of(self, name: ObjectName, path: str) -> Place | None:
        """The same for an object whose path and name are known."""
        return self._remembered.get(path) or self._find(name)

    def paths(self, key: str, number: int, versions: Sequence[ObjectVersion], parts: int = -1) -> list[str]:
        """Where the versions of an item's parts lie, of those parts that are named by a bit; they are remembered."""
        if len(self._remembered) > REMEMBERED:
            self._remembered.clear()
        paths = []
        for part, version in enumerate(versions):
            if parts >> part & 1:
                path = cache_path(version.name.bucket, version.name.name)
                self._remembered[path] = (key, number, part)
                paths.append(path)
        return paths

    def _find(self, name: ObjectName) -> Place | None:
        for key, catalog in self._catalogs.items():
            if catalog.listings and name in catalog.newest.manifest.data_root and (found := catalog.find(name)) is not None:
                return (key, *found)
        return None
