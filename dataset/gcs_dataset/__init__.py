"""Read image datasets from Google Cloud Storage in PyTorch, through the cache of gcs-prefetchd or without it."""

from gcs_dataset.cached import CachedLoader
from gcs_dataset.following import FollowedSampler, follow
from gcs_dataset.gcs import gcs_pil_loader
from gcs_dataset.images import ImageDataset
from gcs_dataset.items import consistent_train_test_split
from gcs_dataset.listing import load_items_gcs
from gcs_dataset.loaders import (
    get_async_dataloaders,
    get_cached_dataloaders,
    get_local_dataloaders,
    get_streamed_dataloaders,
)
from gcs_dataset.local import list_items_local, pil_loader
from gcs_dataset.manifests import get_manifest
from gcs_dataset.planned import PlannedDataLoader
from gcs_dataset.relisting import Relisting
from gcs_dataset.sampler import PlannedSampler
from gcs_dataset.stream import AsyncImageDataset, generate_stream
from gcs_dataset.tensors import to_tensors
from gcs_dataset.workers import worker_init_fn

__all__ = [
    "AsyncImageDataset",
    "CachedLoader",
    "FollowedSampler",
    "ImageDataset",
    "PlannedDataLoader",
    "PlannedSampler",
    "Relisting",
    "consistent_train_test_split",
    "follow",
    "gcs_pil_loader",
    "generate_stream",
    "get_async_dataloaders",
    "get_cached_dataloaders",
    "get_local_dataloaders",
    "get_manifest",
    "get_streamed_dataloaders",
    "list_items_local",
    "load_items_gcs",
    "pil_loader",
    "to_tensors",
    "worker_init_fn",
]
