"""A data root that changes while a job reads it: each epoch starts with the newest listing and keeps it to its end."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image

from gcs_dataset import CachedLoader, ImageDataset, PlannedDataLoader, PlannedSampler, Relisting, get_cached_dataloaders
from gcs_dataset.gcs_listing import list_manifest
from gcs_dataset.plan_registration import PlanSender
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.epoch_order import epoch_order
from gcs_prefetchd.shared.errors import ManifestError, SettingsError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, load_manifest
from gcs_prefetchd.shared.objects import DataRoot
from gcs_prefetchd.testing import Kind, ServingGCS
from support.daemons import DATA_ROOT, daemon_process
from support.datasets import ROOT, RecordingDaemon, encoded, gcs, warnings_of

COUNT, BATCH, SEED = 40, 4, 5


def put(server: ServingGCS, item: int, value: int, root: str = ROOT) -> list[int]:
    """Put or replace an item whose image and label both hold `value`. Returns their generations."""
    data_root, generations = DataRoot.parse(root), []
    for part, kind in enumerate(("JPEG", "PNG")):
        name = data_root.folder + ItemPatterns().part_name(f"{item:04}", part)
        stored = server.put(data_root.bucket, name, encoded(Image.new("L", (16, 16), value), kind))
        generations.append(stored.generation)
    return generations


def delete(server: ServingGCS, item: int, root: str = ROOT) -> None:
    data_root = DataRoot.parse(root)
    for part in (0, 1):
        server.delete(data_root.bucket, data_root.folder + ItemPatterns().part_name(f"{item:04}", part))


def values(batches: Any, count: int | None = None) -> list[int]:
    """The values that were read, by the labels; each image must be of the same time as its label."""
    read: list[int] = []
    for images, labels in islice(batches, count):
        of_labels = labels[:, 0, 0].tolist()
        of_images = images.float().mean(dim=(1, 2, 3)).tolist()
        assert of_images == pytest.approx(of_labels, abs=1.1)  # JPEG changes a flat grey by 1 at most
        read += of_labels
    return read


def order_of(items: list[int], epoch: int) -> list[int]:
    """What an epoch of a loader over these items (sorted, all on its side) reads, in order."""
    return [items[index] for index in epoch_order(SEED, epoch, np.arange(len(items), dtype=np.uint32))]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingGCS]:
    with gcs(monkeypatch) as server:
        for item in range(COUNT):
            put(server, item, item)
        yield server


class Node:
    """A node whose daemon lists the bucket when a test calls `relist`."""

    def __init__(self, server: ServingGCS, daemon: RecordingDaemon) -> None:
        self.server, self.daemon, self.cache_dir = server, daemon, daemon.cache_dir
        self.relist()

    def relist(self) -> Manifest:
        manifest = list_manifest(DataRoot.parse(ROOT), ItemPatterns())
        self.daemon.manifest_folder = manifest.save(self.cache_dir / "manifests")
        return manifest

    def loaders(self, workers: int = 0, test_ratio: float = 0.0, seed: int = SEED) -> dict[str, PlannedDataLoader]:
        return get_cached_dataloaders(
            ROOT, self.cache_dir, BATCH, num_workers=workers, test_ratio=test_ratio, seed=seed, label_mode="index"
        )

    def train(self, workers: int = 0, seed: int = SEED) -> PlannedDataLoader:
        return self.loaders(workers, seed=seed)["train"]


@pytest.fixture
def node(server: ServingGCS, tmp_path: Path) -> Iterator[Node]:
    with RecordingDaemon(tmp_path / "cache") as daemon:
        yield Node(server, daemon)


# --- The next epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_running_epoch_keeps_its_items_and_the_next_uses_the_newest_listing(
    node: Node, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    train = node.train(workers)
    batches = iter(train)
    read = values(batches, 2)
    for item in (100, 101, 102):
        put(node.server, item, item)
    newest = node.relist()
    read += values(batches)
    assert read == order_of(list(range(COUNT)), 0)
    delete(node.server, 7)
    newest = node.relist()
    items = [*range(7), *range(8, COUNT), 100, 101, 102]
    with caplog.at_level(logging.WARNING):
        assert [values(train), values(train)] == [order_of(items, 1), order_of(items, 2)]
    assert len(train) == -(-len(items) // BATCH)
    assert [plan.manifest == newest.digest for plan, _ in node.daemon.plans] == [False, True, True]
    assert [warning for warning in warnings_of(caplog) if " removed; " in warning] == [
        f"{ROOT} (train): 3 items were added and 1 removed; {len(items)} from this epoch on"
    ]


def test_each_side_updates_independently_and_no_item_changes_sides(node: Node) -> None:
    loaders = node.loaders(test_ratio=0.3)
    before = {side: set(values(loader)) for side, loader in loaders.items()}
    for item in range(100, 120):
        put(node.server, item, item)
    node.relist()
    train = set(values(loaders["train"]))
    assert len(loaders["test"].dataset.items) == COUNT  # type: ignore[attr-defined]  # an ImageDataset
    test = set(values(loaders["test"]))
    assert before["train"] < train
    assert before["test"] < test
    assert not train & test
    assert train | test == {*range(COUNT), *range(100, 120)}


def test_changed_objects_are_used_silently_in_the_same_order(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    train = node.train()
    values(train)
    put(node.server, 7, 200)
    newest = node.relist()
    caplog.clear()
    assert values(train) == [200 if item == 7 else item for item in order_of(list(range(COUNT)), 1)]
    assert node.daemon.plans[-1][0].manifest == newest.digest
    assert not any(ROOT in warning for warning in warnings_of(caplog) if "reading from GCS" not in warning)


def test_workers_stay_alive_while_nothing_changes(node: Node) -> None:
    train = node.train(workers=2)
    workers = []
    for change in (False, False, True):
        if change:
            put(node.server, 7, 200)
            node.relist()
        values(train)
        workers.append([worker.pid for worker in train._iterator._workers])  # type: ignore[union-attr]  # torch's own
    assert workers[0] == workers[1]
    assert not set(workers[1]) & set(workers[2])


def test_a_loader_without_a_relisting_keeps_its_listing(node: Node) -> None:
    manifest = list_manifest(DataRoot.parse(ROOT), ItemPatterns())
    loader = CachedLoader(node.cache_dir, manifest=manifest)
    dataset = ImageDataset(ROOT, manifest.ids, loader)
    planned = PlannedDataLoader(dataset, BATCH, sampler=PlannedSampler(range(COUNT)), collate_fn=len)
    assert sum(planned) == COUNT
    put(node.server, 100, 100)
    node.relist()
    assert sum(planned) == COUNT
    assert loader.manifest is manifest


# --- Listings that are not used


def of_a_rank(node: Node, rank: int, world: int) -> PlannedDataLoader:
    manifest = list_manifest(DataRoot.parse(ROOT), ItemPatterns())
    loader = CachedLoader(node.cache_dir, manifest=manifest)
    dataset = ImageDataset(ROOT, manifest.ids, loader, lambda pair: pair[1].getpixel((0, 0)), label_mode="index")
    sender = PlanSender(node.cache_dir, manifest, job=loader.job, stream=f"rank-{rank}")
    sampler = PlannedSampler(range(COUNT), seed=SEED, rank=rank, world=world, plan_sender=sender)
    relisting = Relisting(manifest, dataset, loader, sampler, lambda ids: torch.arange(len(ids)), name=f"rank {rank}")
    return PlannedDataLoader(dataset, BATCH, sampler=sampler, relisting=relisting)


def test_several_ranks_keep_their_items_and_log_it_once(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Also ranks that learn of other items at different times. Each uses new generations of the same items."""
    ranks = [of_a_rank(node, rank, 2) for rank in range(2)]

    def epoch() -> list[int]:
        shares = [torch.cat(list(loader)).tolist() for loader in ranks]
        return [item for turn in zip(*shares, strict=True) for item in turn]

    assert epoch() == order_of(list(range(COUNT)), 0)
    put(node.server, 7, 200)
    node.relist()
    assert epoch() == [200 if item == 7 else item for item in order_of(list(range(COUNT)), 1)]
    for number in range(2, 5):
        put(node.server, 100 + number, 100 + number)
        node.relist()
        assert epoch() == [200 if item == 7 else item for item in order_of(list(range(COUNT)), number)]
    logged = [warning for warning in warnings_of(caplog) if "are not updated" in warning]
    assert [warning[:6] for warning in logged] == ["rank 0", "rank 1"]
    assert all("2 ranks must agree" in warning and "a restart reads the new ones" in warning for warning in logged)


def test_a_side_that_would_become_empty_keeps_its_items(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    loaders = node.loaders(test_ratio=0.3)
    before = {side: values(loader) for side, loader in loaders.items()}
    for item in before["test"]:
        delete(node.server, item)
    node.relist()
    loaders["test"].set_epoch(0)
    assert len(loaders["test"]) == -(-len(before["test"]) // BATCH)
    with pytest.raises(Exception, match="no such object"):
        values(loaders["test"])
    assert sorted(values(loaders["train"])) == sorted(before["train"])
    assert any("(test)" in warning and "nothing would be left" in warning for warning in warnings_of(caplog))


@contextmanager
def faulty_daemon(node: Node, fault: str) -> Iterator[None]:
    """The daemon has a newer listing, but something is wrong with it or with the daemon."""
    path = f"/v1/manifest?{urlencode({'data_root': ROOT})}"
    if fault == "hangs":
        with node.daemon.hanging():
            yield
        return
    if fault == "is gone":
        (node.cache_dir / "daemon.json").unlink()
    elif fault == "fails":
        node.daemon.refuses[path] = (503, "no")
    elif fault == "does not serve the data root":
        node.daemon.refuses[path] = (400, "no")
    elif fault == "names no manifest":
        node.daemon.manifest_folder = node.cache_dir / "none"
    elif fault == "has other patterns":
        other = list_manifest(DataRoot.parse(ROOT), ItemPatterns(("labels/{id}.png", "images/{id}.jpg")))
        node.daemon.manifest_folder = other.save(node.cache_dir / "manifests")
    yield
    assert node.daemon.refused == (fault in ("fails", "does not serve the data root"))


@pytest.mark.parametrize(
    "fault",
    ["hangs", "is gone", "fails", "does not serve the data root", "names no manifest", "has other patterns"],
)
def test_whatever_the_daemon_does_an_epoch_starts_soon_with_the_current_items(node: Node, fault: str) -> None:
    """And GCS is not listed for it."""
    train = node.train()
    put(node.server, 100, 100)
    node.relist()
    with faulty_daemon(node, fault):
        lists = node.server.counts.total(Kind.LIST)
        started_s = time.monotonic()
        batches = iter(train)
        assert time.monotonic() - started_s < 2
        assert node.server.counts.total(Kind.LIST) == lists
    assert values(batches) == order_of(list(range(COUNT)), 0)


# --- Checkpoints


def interrupted(node: Node) -> tuple[list[int], dict[str, Any]]:
    """What was read of epoch 1 before its state was saved."""
    train = node.train()
    train.set_epoch(1)
    read = values(train, 3)
    return read, train.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_of_other_items_uses_their_listing_until_its_epochs_end(node: Node, workers: int) -> None:
    read, state = interrupted(node)
    put(node.server, 100, 100)
    newest = node.relist()
    resumed = node.train(workers)
    values(resumed)  # like an evaluation with the same loader: its workers have the newest listing
    resumed.load_state_dict(state)
    assert len(resumed) == COUNT // BATCH
    assert read + values(resumed) == order_of(list(range(COUNT)), 1)
    assert node.daemon.plans[-1][0].manifest == state["manifest"] != newest.digest
    assert values(resumed) == order_of([*range(COUNT), 100], 2)
    assert node.daemon.plans[-1][0].manifest == newest.digest


def test_a_state_of_the_same_items_continues_with_their_new_generations(node: Node) -> None:
    read, state = interrupted(node)
    shutil.rmtree(node.cache_dir / "manifests")
    last = order_of(list(range(COUNT)), 1)[-1]
    put(node.server, last, 200)
    newest = node.relist()
    resumed = node.train()
    resumed.load_state_dict(state)
    assert read + values(resumed) == [*order_of(list(range(COUNT)), 1)[:-1], 200]
    assert node.daemon.plans[-1][0].manifest == newest.digest != state["manifest"]


@pytest.mark.parametrize("fault", ["removed", "damaged", "named by a path", "of another data root"])
def test_a_state_whose_listing_is_not_available_is_refused_and_changes_nothing(node: Node, fault: str) -> None:
    _, state = interrupted(node)
    folder = node.cache_dir / "manifests" / state["manifest"]
    if fault == "removed":
        shutil.rmtree(folder)
    elif fault == "damaged":
        (folder / "ends.npy").write_bytes(b"")
    elif fault == "named by a path":
        state |= {"manifest": f"../manifests/{state['manifest']}"}
    else:
        put(node.server, 0, 0, "gs://pictures/other")
        other = list_manifest(DataRoot.parse("gs://pictures/other"), ItemPatterns())
        state |= {"manifest": other.save(node.cache_dir / "manifests").name}
    put(node.server, 100, 100)
    node.relist()
    resumed = node.train()
    with pytest.raises(ManifestError, match=r"^checkpoint: field 'ids': .*restart the epoch with set_epoch"):
        resumed.load_state_dict(state)
    assert values(resumed) == order_of([*range(COUNT), 100], 0)


def test_a_state_that_is_refused_for_another_reason_keeps_the_newest_listing(node: Node) -> None:
    _, state = interrupted(node)
    put(node.server, 100, 100)
    node.relist()
    resumed = node.train(seed=SEED + 1)
    with pytest.raises(SettingsError, match="field 'seed'"):
        resumed.load_state_dict(state)
    assert sorted(values(resumed)) == [*range(COUNT), 100]


@pytest.mark.parametrize("is_ended", [True, False])
def test_a_state_from_an_epochs_start_starts_it_with_the_newest_listing(node: Node, is_ended: bool) -> None:
    train = node.train()
    if is_ended:
        values(train)
    else:
        train.set_epoch(1)
    state = train.state_dict()
    shutil.rmtree(node.cache_dir / "manifests")
    put(node.server, 100, 100)
    node.relist()
    resumed = node.train()
    resumed.load_state_dict(state)
    put(node.server, 101, 101)
    node.relist()
    assert values(resumed) == order_of([*range(COUNT), 100, 101], 1)


# --- With a real daemon


class Training:
    """A job on a node whose daemon lists every second, and what its readers reported."""

    def __init__(self, server: ServingGCS, client: DaemonClient, context: str | None) -> None:
        self.server, self.client = server, client
        workers = {None: 0, "fork": 2, "spawn": 1}[context]  # a spawned worker takes seconds to import torch
        self.loader = get_cached_dataloaders(DATA_ROOT, client.cache_dir, BATCH, None, 0.0, workers, SEED, label_mode="index")[
            "train"
        ]
        self.loader.multiprocessing_context = context

    @property
    def listed(self) -> Manifest:
        return load_manifest(Path(self.client.manifest(DATA_ROOT).path))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline_at_s = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline_at_s

    def wait_until_listed(self, changed: dict[int, list[int]]) -> None:
        """Until the daemon's listing has these generations of these items."""

        def has_all() -> bool:
            listed = self.listed
            return all(
                (index := listed.ids.find(f"{item:04}")) is not None and listed.generation[index].tolist() == generations
                for item, generations in changed.items()
            )

        self.wait_for(has_all)

    def fallbacks(self, reads: int) -> int:
        """The number of fallbacks, once this many reads have been reported."""

        def reported() -> dict[str, int]:
            return self.client.stats()["reads"]  # type: ignore[no-any-return]  # JSON

        self.wait_for(lambda: sum(reported()[kind] for kind in ("hits", "misses", "fallbacks")) >= reads)
        return reported()["fallbacks"]


@pytest.fixture
def cache_dir(server: ServingGCS, tmp_path: Path) -> Path:
    """An empty cache directory for a daemon, over a bucket with the items."""
    for item in range(COUNT):
        put(server, item, item, DATA_ROOT)
    return tmp_path / "cache"


EVERY_SECOND = ["--set", "relist_s=1"]


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_changed_objects_are_never_mixed_and_are_read_from_the_cache_in_the_next_epoch(
    server: ServingGCS, cache_dir: Path, context: str | None
) -> None:
    """Neither an item that the running epoch has read already, nor one that it has not."""
    order = order_of(list(range(COUNT)), 0)
    with daemon_process(cache_dir, server.url, EVERY_SECOND) as client:
        training = Training(server, client, context)
        batches = iter(training.loader)
        read = values(batches, 2)
        changed = {order[0]: put(server, order[0], 200, DATA_ROOT), order[-1]: put(server, order[-1], 201, DATA_ROOT)}
        training.wait_until_listed(changed)
        read += values(batches)
        assert read == [*order[:-1], 201]
        assert training.fallbacks(2 * COUNT) == 2  # both parts of the item that had changed before it was read
        expected = [{order[0]: 200, order[-1]: 201}.get(item, item) for item in order_of(list(range(COUNT)), 1)]
        assert values(training.loader) == expected
        assert training.fallbacks(4 * COUNT) == 2
        media = server.counts.media
        objects = [name.removeprefix("gs://") for name in names_of(order[0])]
        assert [media[name] for name in objects] == [2, 2]  # one GET for each generation
        unchanged = set(media) - {name.removeprefix("gs://") for item in changed for name in names_of(item)}
        assert {media[name] for name in unchanged} == {1}


def names_of(item: int) -> list[str]:
    return [f"{DATA_ROOT}/{ItemPatterns().part_name(f'{item:04}', part)}" for part in (0, 1)]


def test_added_items_are_read_in_the_next_epoch_and_deleted_ones_are_not(server: ServingGCS, cache_dir: Path) -> None:
    order = order_of(list(range(COUNT)), 0)
    with daemon_process(cache_dir, server.url, EVERY_SECOND) as client:
        training = Training(server, client, "fork")
        server.wait_for(lambda counts: len(counts.media) == 2 * COUNT and counts.open_media == 0)
        batches = iter(training.loader)
        read = values(batches, 2)
        delete(server, order[-1], DATA_ROOT)
        added = {item: put(server, item, item, DATA_ROOT) for item in (100, 101)}
        training.wait_until_listed(added)
        assert [*read, *values(batches)] == order
        left = sorted({*range(COUNT), *added} - {order[-1]})
        assert values(training.loader) == order_of(left, 1)
        assert training.fallbacks(2 * COUNT + 2 * len(left)) == 0
        assert set(server.counts.media.values()) == {1}


def test_a_dead_daemon_at_an_epochs_start_only_delays_the_newest_listing(server: ServingGCS, cache_dir: Path) -> None:
    with daemon_process(cache_dir, server.url, EVERY_SECOND) as client:
        training = Training(server, client, "fork")
        assert values(training.loader) == order_of(list(range(COUNT)), 0)
        pid = client.status().pid
        put(server, 100, 100, DATA_ROOT)
        os.kill(pid, signal.SIGKILL)
        assert values(training.loader) == order_of(list(range(COUNT)), 1)


def test_a_restarted_daemon_accepts_the_plan_of_a_checkpoints_listing(
    server: ServingGCS, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two daemons later: the first has listed the new items, and the second knows only that listing."""
    with daemon_process(cache_dir, server.url) as client:
        training = Training(server, client, None)
        read = values(training.loader, 3)
        state = training.loader.state_dict()
    added = {100: put(server, 100, 100, DATA_ROOT)}
    with daemon_process(cache_dir, server.url) as client:
        Training(server, client, None).wait_until_listed(added)
    with daemon_process(cache_dir, server.url) as client:
        newest = client.manifest(DATA_ROOT).digest
        training = Training(server, client, None)
        training.loader.load_state_dict(state)
        batches = iter(training.loader)
        read += values(batches, 1)
        assert [(s["epoch"], s["length"]) for s in client.stats()["streams"]] == [(0, COUNT)]
        assert client.manifest(DATA_ROOT).digest == newest != state["manifest"]
        assert [*read, *values(batches)] == order_of(list(range(COUNT)), 0)
        assert values(training.loader) == order_of([*range(COUNT), 100], 1)
        assert max(server.counts.media.values()) == 1
    assert warnings_of(caplog) == ["gs://pictures/train (train): 1 items were added and 0 removed; 41 from this epoch on"]
