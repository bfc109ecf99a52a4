"""The manifests of all data roots, and which objects and items they name. Pure."""

from gcs_prefetchd.planning.item_numbers import ManifestHistory, NumberedManifest
from gcs_prefetchd.planning.item_refs import PartRef
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = ["Catalog"]


class Catalog:
    """One `ManifestHistory` for each data root that has been listed."""

    def __init__(self) -> None:
        self._histories: dict[str, ManifestHistory] = {}

    def history(self, data_root: str) -> ManifestHistory:
        """The manifests of a data root that has been listed."""
        return self._histories[data_root]

    def newest_manifest(self, data_root: str) -> Manifest | None:
        """The manifest in force; None before the data root is first listed."""
        history = self._histories.get(data_root)
        return None if history is None else history.newest.manifest

    def find_manifest(self, data_root: str, digest: str) -> NumberedManifest | None:
        """The manifest that a plan refers to."""
        history = self._histories.get(data_root)
        return None if history is None else history.find_manifest(digest)

    def assign_numbers(self, manifest: Manifest) -> NumberedManifest:
        """Number the items of a manifest; the catalog does not change. Run it in a thread."""
        return self._histories.get(manifest.data_root.uri, ManifestHistory()).assign_numbers(manifest)

    def add_newest(self, numbered: NumberedManifest) -> ManifestHistory:
        """Put a manifest in force; returns the history of its data root."""
        data_root = numbered.manifest.data_root.uri
        history = self._histories.get(data_root, ManifestHistory())
        history.add_newest(numbered)
        if data_root not in self._histories:
            # A new dictionary, and no history without a manifest: threads look through them at the same time.
            self._histories = {**self._histories, data_root: history}
        return history

    def add_earlier(self, numbered: NumberedManifest) -> ManifestHistory:
        """Add a manifest from before the newest one, of a data root that has been listed; returns its history."""
        history = self._histories[numbered.manifest.data_root.uri]
        history.add_earlier(numbered)
        return history

    def find_part(self, name: ObjectName) -> PartRef | None:
        """The part of an item that an object is; None if it belongs to no item."""
        for data_root, history in self._histories.items():
            if name in history.newest.manifest.data_root and (found := history.find_part(name)) is not None:
                return PartRef(data_root, *found)
        return None

    def newest_version(self, name: ObjectName) -> ObjectVersion | None:
        """The version of an object in the newest manifest; None if that lacks the object."""
        for history in self._histories.values():
            manifest = history.newest.manifest
            if name in manifest.data_root and (found := manifest.find(name)) is not None:
                return manifest.version(*found)
        return None
