"""Read image datasets from Google Cloud Storage in PyTorch, through the cache of gcs-prefetchd or without it."""

from gcs_dataset.cached_loader import CachedLoader
from gcs_dataset.dataloader_worker import worker_init_fn
from gcs_dataset.dataloaders import (
    get_async_dataloaders,
    get_cached_dataloaders,
    get_local_dataloaders,
    get_streamed_dataloaders,
)
from gcs_dataset.default_transform import to_tensors
from gcs_dataset.followed_sampler import FollowedSampler, follow
from gcs_dataset.gcs_listing import load_items_gcs
from gcs_dataset.gcs_loader import gcs_pil_loader
from gcs_dataset.image_dataset import ImageDataset
from gcs_dataset.local_loader import list_items_local, pil_loader
from gcs_dataset.manifest_source import get_manifest
from gcs_dataset.planned_dataloader import PlannedDataLoader
from gcs_dataset.planned_sampler import PlannedSampler
from gcs_dataset.relisting import Relisting
from gcs_dataset.stream_dataset import AsyncImageDataset, generate_stream
from gcs_dataset.train_test_split import consistent_train_test_split

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
