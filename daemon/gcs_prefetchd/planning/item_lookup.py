"""Finds the part of an item that is stored at a path of the cache, and the paths of an item. Pure."""

from gcs_prefetchd.planning.catalog import Catalog
from gcs_prefetchd.planning.item_refs import PartRef
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path, object_at_path

__all__ = ["ItemLookup"]

MAX_REMEMBERED = 100_000


class ItemLookup:
    """Looks parts up in a catalog. Call `clear` when the catalog changes.

    It remembers the parts that will be read soon or were read a moment ago, because a search takes a while.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._remembered: dict[str, PartRef] = {}

    def __contains__(self, path: str) -> bool:
        """Whether the part at a path is remembered: it will be read soon, or was read a moment ago."""
        return path in self._remembered

    def clear(self) -> None:
        """Forget all parts: item numbers and objects may have changed."""
        self._remembered.clear()

    def forget(self, path: str) -> None:
        """Forget the part at a path: it will not be read soon."""
        self._remembered.pop(path, None)

    def locate(self, path: str) -> PartRef | None:
        """The part that is stored at a path; None if no item has it."""
        part = self._remembered.get(path)
        if part is not None:
            return part
        name = object_at_path(path)
        return None if name is None else self._catalog.find_part(name)

    def locate_object(self, name: ObjectName, path: str) -> PartRef | None:
        """The same for an object of which the caller knows both the path and the name."""
        return self._remembered.get(path) or self._catalog.find_part(name)

    def versions(self, data_root: str, item: int, *, newest_manifest_only: bool = False) -> list[ObjectVersion]:
        """The parts of an item that will be read soon, as listed last; they are remembered.

        As listed last, also for a reader whose plan refers to an earlier manifest: an object that has changed since is gone
        from the bucket in its earlier version, and the reader's next epoch uses the newest manifest. The seeded stream
        represents future readers, which will use the newest manifest: for it, items that this one lacks have no parts.
        """
        history = self._catalog.history(data_root)
        versions = (history.newest if newest_manifest_only else history).versions(item)
        self._remember(data_root, item, versions)
        return versions

    def paths(self, data_root: str, item: int, parts: int = -1) -> list[str]:
        """The paths of an item's parts, or of those in the bit set `parts`; they are remembered."""
        return self._remember(data_root, item, self._catalog.history(data_root).versions(item), parts)

    def _remember(self, data_root: str, item: int, versions: list[ObjectVersion], parts: int = -1) -> list[str]:
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.clear()
        paths = []
        for part, version in enumerate(versions):
            if parts >> part & 1:
                path = cache_path(version.name.bucket, version.name.name)
                self._remembered[path] = PartRef(data_root, item, part)
                paths.append(path)
        return paths
