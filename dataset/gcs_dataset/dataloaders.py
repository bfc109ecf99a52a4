"""Ready-made pairs of DataLoaders, `{"train": ..., "test": ...}`: one function for each way to read a dataset.

All of them list images and labels, report and leave out items that lack one of them, and split the items with
`consistent_train_test_split`. Without a `transform` the samples are tensors (`to_tensors`), because PIL images cannot be
batched. `label_mode`, `image_pattern` and `label_pattern` are those of ImageDataset.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler, SubsetRandomSampler

from gcs_dataset.cached_loader import CachedLoader
from gcs_dataset.dataloader_worker import worker_init_fn
from gcs_dataset.default_transform import to_tensors
from gcs_dataset.gcs_listing import list_manifest
from gcs_dataset.gcs_loader import gcs_pil_loader
from gcs_dataset.image_dataset import ImageDataset
from gcs_dataset.image_label_pairs import LabelMode, pillow_mode
from gcs_dataset.item_listing import Items, warn_of_incomplete
from gcs_dataset.local_loader import list_pairs_local, pil_loader
from gcs_dataset.manifest_source import get_manifest
from gcs_dataset.plan_registration import PlanSender
from gcs_dataset.planned_dataloader import PlannedDataLoader
from gcs_dataset.planned_sampler import PlannedSampler
from gcs_dataset.relisting import Relisting
from gcs_dataset.stream_dataset import AsyncImageDataset
from gcs_dataset.train_test_split import Selection, consistent_train_test_split
from gcs_prefetchd.shared.item_patterns import IMAGE_PATTERN, LABEL_PATTERN, ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.objects import DataRoot

__all__ = ["get_async_dataloaders", "get_cached_dataloaders", "get_local_dataloaders", "get_streamed_dataloaders"]

Loaders = dict[str, DataLoader[Any]]
Transform = Callable[[tuple[Any, Any]], Any]

ASYNC_CONCURRENCY = 128
BATCHES_PER_WORKER = 2  # DataLoader's default prefetch_factor: how many batches each worker gets ahead


@dataclass(frozen=True, slots=True)
class _PartSettings:
    """Where the parts of an item are and how they are read."""

    label_mode: LabelMode
    image_pattern: str
    label_pattern: str

    @property
    def item_patterns(self) -> ItemPatterns:
        return ItemPatterns((self.image_pattern, self.label_pattern))

    def list_items(self, gcs_data_root: str) -> Manifest:
        data_root = DataRoot.parse(gcs_data_root)
        manifest = list_manifest(data_root, self.item_patterns)
        warn_of_incomplete(Items(manifest.ids, manifest.incomplete), self.item_patterns, data_root.uri)
        return manifest

    def dataset(
        self, data_root: str | os.PathLike[str], items: Sequence[str], loader: Callable[..., Any], transform: Transform | None
    ) -> ImageDataset:
        return ImageDataset(
            data_root,
            items,
            loader,
            transform or to_tensors,
            label_mode=self.label_mode,
            image_pattern=self.image_pattern,
            label_pattern=self.label_pattern,
        )


def get_local_dataloaders(
    data_root: str | os.PathLike[str],
    batch_size: int = 8,
    transform: Transform | None = None,
    test_ratio: float = 0.1,
    num_workers: int = 8,
    *,
    label_mode: LabelMode = "RGB",
    image_pattern: str = IMAGE_PATTERN,
    label_pattern: str = LABEL_PATTERN,
) -> Loaders:
    """DataLoaders over a local folder. Raises ItemError if it holds no complete item."""
    parts = _PartSettings(label_mode, image_pattern, label_pattern)
    items = list_pairs_local(data_root, parts.item_patterns)
    warn_of_incomplete(items, parts.item_patterns, os.fspath(data_root))
    dataset = parts.dataset(data_root, items.ids, pil_loader, transform)
    return _indexed_loaders(dataset, items.ids, batch_size, test_ratio, num_workers)


def get_streamed_dataloaders(
    gcs_data_root: str,
    batch_size: int = 8,
    transform: Transform | None = None,
    test_ratio: float = 0.1,
    num_workers: int = 8,
    *,
    label_mode: LabelMode = "RGB",
    image_pattern: str = IMAGE_PATTERN,
    label_pattern: str = LABEL_PATTERN,
) -> Loaders:
    """DataLoaders that read each image and label from GCS when it is needed.

    Raises ItemError if no complete item is below the data root, ObjectMissingError if there is no such bucket.
    """
    parts = _PartSettings(label_mode, image_pattern, label_pattern)
    manifest = parts.list_items(gcs_data_root)
    dataset = parts.dataset(gcs_data_root, manifest.ids, gcs_pil_loader, transform)
    return _indexed_loaders(dataset, manifest.ids, batch_size, test_ratio, num_workers)


def get_async_dataloaders(
    gcs_data_root: str,
    batch_size: int = 8,
    transform: Transform | None = None,
    test_ratio: float = 0.1,
    num_workers: int = 8,
    *,
    seed: int | None = None,
    label_mode: LabelMode = "RGB",
    image_pattern: str = IMAGE_PATTERN,
    label_pattern: str = LABEL_PATTERN,
) -> Loaders:
    """DataLoaders that stream from GCS with many downloads in flight.

    "train" is endless and draws with replacement (`seed` fixes the draw); "test" ends after one pass. Raises as
    get_streamed_dataloaders does.
    """
    pillow_mode(label_mode)
    ids = _PartSettings(label_mode, image_pattern, label_pattern).list_items(gcs_data_root).ids
    train, test = (Selection(ids, side.numpy()) for side in consistent_train_test_split(ids, test_ratio))

    def stream(items: Selection, passes: int | None) -> DataLoader[Any]:
        dataset = AsyncImageDataset(
            gcs_data_root,
            items,
            transform or to_tensors,
            ASYNC_CONCURRENCY,
            passes=passes,
            seed=seed,
            label_mode=label_mode,
            image_pattern=image_pattern,
            label_pattern=label_pattern,
        )
        return _loader(dataset, None, batch_size, num_workers)

    return {"train": stream(train, None), "test": stream(test, 1)}


def get_cached_dataloaders(
    gcs_data_root: str,
    cache_dir: str | os.PathLike[str],
    batch_size: int = 8,
    transform: Transform | None = None,
    test_ratio: float = 0.1,
    num_workers: int = 8,
    seed: int = 0,
    *,
    replacement: bool = False,
    label_mode: LabelMode = "RGB",
    image_pattern: str = IMAGE_PATTERN,
    label_pattern: str = LABEL_PATTERN,
) -> dict[str, PlannedDataLoader]:
    """DataLoaders that read through the cache of the daemon of `cache_dir`, and send it their plans.

    "train" is shuffled by `seed` and the epoch (`replacement` draws with replacement), "test" is in order; both are the same
    with and without a daemon. If torch.distributed is initialised, each rank gets its share of one global order. They are
    PlannedDataLoaders: `state_dict` and `load_state_dict` resume in the middle of an epoch, `set_epoch` names the next one.
    Each of them follows the data root from epoch to epoch (Relisting). Raises as get_streamed_dataloaders does.
    """
    pillow_mode(label_mode)
    parts = _PartSettings(label_mode, image_pattern, label_pattern)
    manifest = get_manifest(gcs_data_root, cache_dir, image_pattern=image_pattern, label_pattern=label_pattern)

    def planned(side: int, name: str) -> PlannedDataLoader:
        # Nothing is shared with the other side: each starts its epochs, and changes to newer listings, independently.
        loader = CachedLoader(cache_dir, manifest=manifest)
        dataset = parts.dataset(gcs_data_root, manifest.ids, loader, transform)
        indices = consistent_train_test_split(manifest.ids, test_ratio)[side]
        is_drawn = name == "train" and len(indices) > 0  # a split may leave a side empty, with nothing to shuffle
        sampler = PlannedSampler(
            indices,
            seed=seed,
            shuffle=is_drawn,
            replacement=replacement and is_drawn,
            plan_sender=PlanSender(Path(cache_dir), manifest, job=loader.job, stream=f"{name}-{loader.job[:8]}"),
            read_ahead=BATCHES_PER_WORKER * num_workers * batch_size,
        )
        relisting = Relisting(
            manifest,
            dataset,
            loader,
            sampler,
            lambda ids: consistent_train_test_split(ids, test_ratio)[side],
            name=f"{manifest.data_root.uri} ({name})",
        )
        return PlannedDataLoader(dataset, batch_size, sampler=sampler, relisting=relisting, **_worker_settings(num_workers))

    return {name: planned(side, name) for side, name in enumerate(("train", "test"))}


def _indexed_loaders(
    dataset: ImageDataset, items: Sequence[str], batch_size: int, test_ratio: float, num_workers: int
) -> Loaders:
    train, test = consistent_train_test_split(items, test_ratio)
    return {
        "train": _loader(dataset, SubsetRandomSampler(train.tolist()), batch_size, num_workers),
        "test": _loader(dataset, PlannedSampler(test, shuffle=False), batch_size, num_workers),
    }


def _loader(dataset: Dataset[Any], sampler: Sampler[int] | None, batch_size: int, num_workers: int) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, sampler=sampler, **_worker_settings(num_workers))


def _worker_settings(num_workers: int) -> dict[str, Any]:
    # Persistent workers keep their connections, their imports and the memory that malloc kept.
    return {"num_workers": num_workers, "worker_init_fn": worker_init_fn, "persistent_workers": num_workers > 0}
