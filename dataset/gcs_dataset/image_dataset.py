"""The dataset of image and label pairs, read by any loader."""

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

from PIL import Image
from torch.utils.data import Dataset

from gcs_dataset.image_label_pairs import LabelMode, Pairs, pillow_mode
from gcs_dataset.local_loader import pil_loader
from gcs_prefetchd.shared.item_patterns import IMAGE_PATTERN, LABEL_PATTERN

__all__ = ["ImageDataset"]


class ImageDataset(Dataset[Any]):
    """Pairs of a PIL image and a PIL label, by index into `items`.

    - `data_root`: a folder, or `gs://bucket/prefix`; an item's parts are at `image_pattern` and `label_pattern` below it.
    - `items`: ids, any sequence of str. Not copied: a manifest's ids stay in the memory that all workers share.
    - `loader`: `loader(path)` is the image in RGB. With `label_mode="index"`, labels are loaded by `loader(path, mode=None)`
      and keep their class indices. A loader with a method `load_many(paths, modes)` loads both parts at once;
      one with `load_item(index, paths, modes)` also receives the index into `items`.
    - `transform`: receives the pair as ONE tuple, and returns the sample.

    Raises SettingsError for an invalid `label_mode` or pattern; reading raises what the loader raises.
    """

    def __init__(
        self,
        data_root: str | os.PathLike[str],
        items: Sequence[str],
        loader: Callable[..., Image.Image] = pil_loader,
        transform: Callable[[tuple[Image.Image, Image.Image]], Any] | None = None,
        *,
        label_mode: LabelMode = "RGB",
        image_pattern: str = IMAGE_PATTERN,
        label_pattern: str = LABEL_PATTERN,
    ) -> None:
        self.data_root = data_root
        self.items = items
        self.loader = loader
        self.transform = transform
        self.label_mode = label_mode
        self._label_mode = pillow_mode(label_mode)
        self._pairs = Pairs.below(data_root, image_pattern, label_pattern)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: SupportsIndex) -> Any:
        """`(image, label)`, or what the transform returns for it; negative indices count from the end."""
        if isinstance(index, slice):
            raise TypeError("ImageDataset accepts one index; torch.utils.data.Subset accepts several")
        position = operator.index(index)
        image, label = self._load(position, self._pairs.paths_of(self.items[position]))
        return (image, label) if self.transform is None else self.transform((image, label))

    def _load(self, index: int, paths: list[str]) -> list[Image.Image]:
        load_item = getattr(self.loader, "load_item", None)
        if load_item is not None:
            parts: list[Image.Image] = load_item(index % len(self.items), paths, ["RGB", self._label_mode])
            return parts
        load_many = getattr(self.loader, "load_many", None)
        if load_many is not None:
            images: list[Image.Image] = load_many(paths, ["RGB", self._label_mode])
            return images
        image_path, label_path = paths
        if self._label_mode is None:
            return [self.loader(image_path), self.loader(label_path, mode=None)]
        # One argument, so that a loader without a `mode` parameter works.
        return [self.loader(image_path), self.loader(label_path)]
