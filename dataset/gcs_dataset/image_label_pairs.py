"""Where the image and the label of an item are, and the mode in which labels are read."""

import os
from dataclasses import dataclass
from typing import Literal

from gcs_prefetchd.shared.errors import SettingsError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.objects import DataRoot

__all__ = ["LabelMode", "Pairs", "pillow_mode"]

LabelMode = Literal["RGB", "index"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The images and labels below one data root: a folder, or `gs://bucket/prefix`."""

    root: str
    item_patterns: ItemPatterns

    @classmethod
    def below(cls, data_root: str | os.PathLike[str], image_pattern: str, label_pattern: str) -> "Pairs":
        """Raises InvalidNameError for an invalid URI, SettingsError for a pattern without `{id}`."""
        root = os.fspath(data_root)
        root = DataRoot.parse(root).uri if "://" in root else root.rstrip("/")
        return cls(root, ItemPatterns((image_pattern, label_pattern)))

    def paths_of(self, item_id: str) -> list[str]:
        """The paths or URIs of the item's image and label."""
        return [f"{self.root}/{self.item_patterns.part_name(item_id, part)}" for part in (0, 1)]


def pillow_mode(label_mode: LabelMode) -> str | None:
    """The mode that labels are converted to: "RGB", or None to keep class indices. Raises SettingsError for any other."""
    if label_mode == "RGB":
        return "RGB"
    if label_mode == "index":
        return None
    raise SettingsError(f"label_mode must be 'RGB' or 'index', not {label_mode!r}")
