"""The ready-made DataLoaders, the package's names, and what importing it costs."""

import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import gcs_dataset
from gcs_dataset import (
    consistent_train_test_split,
    get_async_dataloaders,
    get_cached_dataloaders,
    get_local_dataloaders,
    get_streamed_dataloaders,
)
from gcs_dataset.gcs_listing import list_manifest
from gcs_prefetchd.shared.epoch_order import epoch_order, plan_order
from gcs_prefetchd.shared.errors import ItemError, ManifestError, ObjectMissingError, SettingsError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.objects import DataRoot
from gcs_prefetchd.testing import Kind, ServingGCS
from support.datasets import ROOT, RecordingDaemon, cache_file, fill, gcs, number_of, pair_of, warnings_of, write_local

COUNT = 40
Get = Callable[..., Mapping[str, DataLoader[Any]]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingGCS]:
    with gcs(monkeypatch) as server:
        fill(server, COUNT)
        yield server


@pytest.fixture(params=["local", "streamed", "async", "cached"])
def get(request: pytest.FixtureRequest, server: ServingGCS, tmp_path: Path) -> Get:
    """One of the four functions, with its data root filled in."""
    if request.param == "local":
        write_local(tmp_path, COUNT)
        return lambda *args, **kwargs: get_local_dataloaders(tmp_path, *args, **kwargs)
    if request.param == "cached":
        return lambda *args, **kwargs: get_cached_dataloaders(ROOT, tmp_path, *args, **kwargs)
    plain = {"streamed": get_streamed_dataloaders, "async": get_async_dataloaders}[request.param]
    return lambda *args, **kwargs: plain(ROOT, *args, **kwargs)


def item_numbers(loader: DataLoader[Any], batches: int | None = None) -> list[int]:
    return [round(float(image.float().mean())) for batch, _ in islice(loader, batches) for image in batch]


def split() -> tuple[list[int], list[int]]:
    train, test = consistent_train_test_split([f"{number:04d}" for number in range(COUNT)], 0.3)
    return train.tolist(), test.tolist()


def test_dataloaders_work_without_a_transform(get: Get) -> None:
    loaders = get(4, None, 0.3, 2)
    image, label = next(iter(loaders["train"]))
    assert (image.shape, image.dtype, label.shape, label.dtype) == ((4, 3, 16, 16), torch.uint8, (4, 3, 16, 16), torch.uint8)
    assert sorted(item_numbers(loaders["test"])) == sorted(item_numbers(loaders["test"])) == split()[1]


def test_training_never_sees_a_test_item(get: Get) -> None:
    seen = item_numbers(get(4, None, 0.3, 2)["train"], 12)
    assert set(seen) <= set(split()[0])


def test_labels_can_keep_their_class_indices(get: Get) -> None:
    image, label = next(iter(get(4, num_workers=0, label_mode="index")["train"]))
    assert (label.shape, label.dtype) == ((4, 16, 16), torch.int64)
    assert label[:, 0, 0].tolist() == [round(float(one.float().mean())) % 7 for one in image]


def test_a_transform_returns_the_samples(get: Get) -> None:
    batches = list(get(4, lambda pair: number_of(pair[0]), 0.3, 0)["test"])
    assert sorted(number for batch in batches for number in batch.tolist()) == split()[1]


def test_invalid_settings_are_named(get: Get) -> None:
    with pytest.raises(SettingsError, match="label_mode"):
        get(label_mode="colour")
    with pytest.raises(SettingsError, match="test_ratio must be between 0 and 1, not 2"):
        get(test_ratio=2)
    with pytest.raises(SettingsError, match="pattern"):
        get(image_pattern="images/7.jpg")


def test_a_pattern_without_matches_is_named(get: Get) -> None:
    with pytest.raises(ItemError, match=r"holds no item \(images/\{id\}\.tiff with"):
        get(image_pattern="images/{id}.tiff")


def test_items_without_a_label_are_reported_and_left_out(server: ServingGCS, caplog: pytest.LogCaptureFixture) -> None:
    server.delete("pictures", "set/labels/0003.png")
    server.put("pictures", "set/labels/9999.png", b"x")
    with caplog.at_level(logging.WARNING):
        loaders = get_streamed_dataloaders(ROOT, num_workers=0, test_ratio=0)
    [warning] = warnings_of(caplog)
    assert f"{ROOT}/labels/0003.png" in warning
    assert f"{ROOT}/images/9999.jpg" in warning
    assert sorted(item_numbers(loaders["train"])) == [number for number in range(COUNT) if number != 3]


@pytest.mark.parametrize("plain", [get_streamed_dataloaders, get_async_dataloaders])
def test_a_missing_bucket_is_named(server: ServingGCS, plain: Get) -> None:
    with pytest.raises(ObjectMissingError, match="gs://nowhere/set"):
        plain("gs://nowhere/set")


def test_cached_epochs_follow_the_seed(server: ServingGCS, tmp_path: Path) -> None:
    train = torch.tensor(split()[0]).numpy().astype("uint32")
    loaders = get_cached_dataloaders(ROOT, tmp_path, 4, test_ratio=0.3, num_workers=2, seed=5)
    epochs = [item_numbers(loaders["train"]) for _ in range(3)]
    assert epochs == [epoch_order(5, epoch, train).tolist() for epoch in range(3)]
    assert item_numbers(loaders["test"]) == split()[1]


def test_cached_loaders_use_the_daemons_manifest_and_report_everything(
    server: ServingGCS, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = list_manifest(DataRoot.parse(ROOT), ItemPatterns())
    for number in range(COUNT):
        for version, data in zip(manifest.versions(number), pair_of(number).values(), strict=True):
            cache_file(tmp_path / "cache", version.name.uri, data, version.generation)
    lists = server.counts.total(Kind.LIST)
    with RecordingDaemon(tmp_path / "cache") as daemon, caplog.at_level(logging.WARNING):
        daemon.manifest_folder = manifest.save(tmp_path / "cache/manifests")
        loaders = get_cached_dataloaders(ROOT, tmp_path / "cache", 4, test_ratio=0.3, num_workers=2)
        assert sorted([*item_numbers(loaders["train"]), *item_numbers(loaders["test"])]) == list(range(COUNT))
        daemon.wait_for(lambda daemon: daemon.reads() == (2 * COUNT, 0, 0))
        assert {plan.manifest for plan, _ in daemon.plans} == {manifest.digest}
        assert len({plan.stream for plan, _ in daemon.plans}) == 2
        assert {plan.job for plan, _ in daemon.plans} == {report.job for report in daemon.reports}
        assert daemon.leases == [plan.job for plan, _ in daemon.plans]  # each side has its own
    assert server.counts.total(Kind.LIST) == lists
    assert server.counts.total(Kind.MEDIA) == 0
    assert warnings_of(caplog) == []


def test_cached_loaders_can_draw_with_replacement(server: ServingGCS, tmp_path: Path) -> None:
    train = get_cached_dataloaders(ROOT, tmp_path, 4, test_ratio=0.3, num_workers=0, seed=5, replacement=True)["train"]
    items = np.array(split()[0], dtype=np.uint32)
    assert [item_numbers(train) for _ in range(2)] == [plan_order("endless", 5, epoch, items).tolist() for epoch in range(2)]


def test_cached_loaders_resume_in_the_middle_of_an_epoch(server: ServingGCS, tmp_path: Path) -> None:
    first, second = (get_cached_dataloaders(ROOT, tmp_path, 4, test_ratio=0.3, num_workers=2, seed=5) for _ in range(2))
    read = item_numbers(first["train"]) + item_numbers(first["train"], 3)
    second["train"].load_state_dict(first["train"].state_dict())
    read += item_numbers(second["train"])
    assert read == [item for epoch in range(2) for item in first["train"].sampler.order(epoch).tolist()]
    with pytest.raises(ManifestError, match="checkpoint: field 'items'"):
        second["test"].load_state_dict(first["train"].state_dict())


def test_a_split_may_leave_a_side_empty(server: ServingGCS, tmp_path: Path) -> None:
    for ratio, sides in [(0, (COUNT, 0)), (1, (0, COUNT))]:
        loaders = get_cached_dataloaders(ROOT, tmp_path, 4, test_ratio=ratio, num_workers=0, replacement=True)
        assert (len(item_numbers(loaders["train"])), len(item_numbers(loaders["test"]))) == sides


@pytest.mark.parametrize("trouble", ["other patterns", "no manifest", "damaged", "none"])
def test_cached_loaders_list_gcs_if_the_daemon_cannot(
    server: ServingGCS, tmp_path: Path, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    with RecordingDaemon(tmp_path / "cache") as daemon, caplog.at_level(logging.WARNING):
        if trouble == "other patterns":
            manifest = list_manifest(DataRoot.parse(ROOT), ItemPatterns(("images/{id}.jpg", "images/{id}.png")))
            daemon.manifest_folder = manifest.save(tmp_path / "manifests")
        elif trouble == "damaged":
            daemon.manifest_folder = tmp_path
        elif trouble == "none":
            daemon.refuses["/v1/status"] = (503, "starting")
        loaders = get_cached_dataloaders(ROOT, tmp_path / "cache", test_ratio=0, num_workers=0)
        assert sorted(item_numbers(loaders["train"])) == list(range(COUNT))
    assert any(f"listing {ROOT} without the daemon" in warning for warning in warnings_of(caplog))


def test_names_and_signatures_are_those_of_the_seeds() -> None:
    def positional(function: Callable[..., Any]) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]

    shared = ["batch_size", "transform", "test_ratio", "num_workers"]
    assert positional(gcs_dataset.ImageDataset) == ["data_root", "items", "loader", "transform"]
    assert positional(gcs_dataset.AsyncImageDataset) == ["data_root", "items", "transform", "concurrency"]
    assert positional(gcs_dataset.consistent_train_test_split) == ["items", "test_ratio"]
    assert positional(get_local_dataloaders) == ["data_root", *shared]
    assert positional(get_streamed_dataloaders) == positional(get_async_dataloaders) == ["gcs_data_root", *shared]
    assert positional(get_cached_dataloaders) == ["gcs_data_root", "cache_dir", *shared, "seed"]
    assert all(hasattr(gcs_dataset, name) for name in gcs_dataset.__all__)


def test_a_training_worker_loads_nothing_of_the_daemon(server: ServingGCS, tmp_path: Path) -> None:
    """Neither when it is imported nor when it reads a cached item and falls back for another."""
    cache_file(tmp_path, f"{ROOT}/images/0000.jpg", pair_of(0)["images/0000.jpg"])
    script = f"""
import json, sys
from gcs_dataset import CachedLoader, ImageDataset
dataset = ImageDataset({ROOT!r}, ["0000"], CachedLoader({str(tmp_path)!r}))
imported = set(sys.modules)
dataset[0]
print(json.dumps([sorted(imported), sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    imported, read = (set(names) for names in json.loads(done.stdout))
    assert not imported & {"aiohttp", "janus", "diskcache", "watchdog", "uvloop", "google.cloud.storage", "requests"}
    assert not read & {"aiohttp", "diskcache", "watchdog", "uvloop", "pydantic", "gcs_prefetchd.gcs.client"}
