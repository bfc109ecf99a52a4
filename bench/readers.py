"""The readers that `cold.py`, `warm.py` and `stall.py` compare, and the origin and daemon that they read from."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fast_origin import file_origin, has_nginx
from gcs_dataset import (
    CachedLoader,
    PlannedDataLoader,
    PlannedSampler,
    get_cached_dataloaders,
    get_manifest,
    list_items_local,
    worker_init_fn,
)
from gcs_dataset.expected_stamps import ExpectedStamps
from gcs_dataset.image_label_pairs import Pairs
from gcs_dataset.plan_registration import PlanSender
from gcs_dataset.read_reports import ReadCounts, ReadReporter
from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.item_patterns import IMAGE_PATTERN, LABEL_PATTERN
from gcs_prefetchd.shared.manifest import Ids, Manifest
from gcs_prefetchd.shared.paths import cache_path_of_uri
from rig import DATA_ROOT, server

__all__ = ["BATCH", "SEED", "PlainBytes", "StoredBytes", "cached", "cached_bytes", "length", "origin", "widths"]

BATCH = 8
SEED = 1  # not the daemon's: what it prefetches before a reader registers is in another order


def widths(pair: tuple[Any, Any]) -> int:
    """The transform of decoded pairs: the worker sends one number, so that reading is timed."""
    image, label = pair
    return int(image.width + label.width)


def length(image: bytes, label: bytes) -> int:
    """The same for bytes."""
    return len(image) + len(label)


@contextmanager
def origin(scratch: Path, data: Path, latency_ms: float) -> Iterator[str]:
    """nginx if it is installed, else our own server; the clients' emulator variable names it within the context."""
    with tempfile.TemporaryDirectory(dir=scratch) as run:
        serving = file_origin(Path(run), data, latency_ms) if has_nginx() else server(data, latency_ms)
        with serving as url:
            os.environ["STORAGE_EMULATOR_HOST"] = url
            os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "true"  # a request that no loader needs
            yield url


class PlainBytes(Dataset[int]):
    """The length of an item's bytes in a folder, read in Python's fastest way, unchecked."""

    def __init__(self, folder: Path) -> None:
        self._ids = Ids.from_sorted(list_items_local(folder / "images"))
        self._pairs = Pairs.below(folder, IMAGE_PATTERN, LABEL_PATTERN)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> int:
        return length(*self.read(index))

    def read(self, index: int) -> list[bytes]:
        """The bytes of the item's image and label."""
        data = []
        for path in self._pairs.paths_of(self._ids[index]):
            with open(path, "rb") as file:  # noqa: PTH123 - Path.read_bytes takes a third longer
                data.append(file.read())
        return data


class StoredBytes(Dataset[int]):
    """The length of an item's bytes, read as CachedLoader does but not decoded: verified hit, else demand, and reported.

    A read that the daemon cannot serve raises RuntimeError: a fallback must not be mistaken for it.
    """

    def __init__(self, cache_dir: Path, manifest: Manifest, job: str) -> None:
        self._cache_dir = cache_dir
        self._manifest = manifest
        self._job = job
        self._pairs = Pairs.below(DATA_ROOT, IMAGE_PATTERN, LABEL_PATTERN)
        self._versions = ExpectedStamps(manifest)
        self._opened: tuple[int, DaemonClient, ReadReporter] | None = None

    def __len__(self) -> int:
        return len(self._manifest)

    def __getitem__(self, index: int) -> int:
        return length(*self.read(index))

    def read(self, index: int) -> list[bytes]:
        """The bytes of the item's image and label."""
        uris = self._pairs.paths_of(self._manifest.ids[index])
        data = self._hits(index, uris)
        _, client, reporter = self._connections()
        missing = [uri for uri, one in zip(uris, data, strict=True) if one is None]
        if missing:
            errors = [error for error in client.fetch(missing) if error]
            data = self._hits(index, uris)
            if errors or None in data:
                raise RuntimeError(f"{missing}: {errors or 'not cached'}")
        reporter.add(ReadCounts(hits=len(uris) - len(missing), misses=len(missing)), uris)
        return [one for one in data if one is not None]

    def close(self) -> None:
        """Send the last report and close this process's connections."""
        if self._opened is not None:
            self._opened[2].close()
            self._opened[1].close()

    def _hits(self, index: int, uris: Sequence[str]) -> list[bytes | None]:
        stamps = self._versions.of(uris, index)
        objects = f"{self._cache_dir}/objects"
        return [read_checked(objects, cache_path_of_uri(uri), stamp) for uri, stamp in zip(uris, stamps, strict=True)]

    def _connections(self) -> tuple[int, DaemonClient, ReadReporter]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), DaemonClient(self._cache_dir), ReadReporter(self._cache_dir, self._job))
        return self._opened


def cached(cache_dir: Path, workers: int, batch: int = BATCH) -> PlannedDataLoader:
    """Ours as users run it, with decoding."""
    made = get_cached_dataloaders(DATA_ROOT, cache_dir, batch, widths, test_ratio=0.0, num_workers=workers, seed=SEED)
    return made["train"]


def cached_bytes(cache_dir: Path, workers: int) -> PlannedDataLoader:
    """Ours without decoding."""
    manifest = get_manifest(DATA_ROOT, cache_dir)
    job = CachedLoader(cache_dir).job
    sampler = PlannedSampler(
        np.arange(len(manifest)),
        seed=SEED,
        plan_sender=PlanSender(cache_dir, manifest, job=job, stream=f"bytes-{job[:8]}"),
        read_ahead=2 * workers * BATCH,
    )
    dataset = StoredBytes(cache_dir, manifest, job)
    return PlannedDataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, worker_init_fn=worker_init_fn)
