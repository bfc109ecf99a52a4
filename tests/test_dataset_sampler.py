"""The sampler: its orders, its epochs, and what it tells the daemon."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset_support import ROOT, NotingDaemon
from gcs_dataset import PlannedSampler
from gcs_dataset.plans import PlanSender
from gcs_prefetchd.manifest import Layout, Manifest, ObjectVersion, build_manifest
from gcs_prefetchd.names import DataRoot, ObjectName
from gcs_prefetchd.order import epoch_order, order_digest
from gcs_prefetchd.protocol import Plan, unpack


@pytest.fixture
def manifest() -> Manifest:
    names = [
        f"set/{folder}/{number:02d}.{end}" for number in range(40) for folder, end in [("images", "jpg"), ("labels", "png")]
    ]
    return build_manifest(
        DataRoot.parse(ROOT), Layout(), [ObjectVersion(ObjectName("pictures", name), 1, 1, 1) for name in names]
    )


def sender(cache_dir: Path, manifest: Manifest, check_pause_s: float = 1.0) -> PlanSender:
    return PlanSender(cache_dir, manifest, job="job", stream="train-job", check_pause_s=check_pause_s)


def test_an_epochs_order_depends_on_seed_and_epoch_alone() -> None:
    indices = [3, 5, 8, 13, 21]
    first, second = PlannedSampler(indices, seed=7), PlannedSampler(torch.tensor(indices), seed=7)
    epochs = [list(first) for _ in range(3)]
    assert epochs == [list(second) for _ in range(3)]
    assert epochs == [epoch_order(7, epoch, np.array(indices, dtype=np.uint32)).tolist() for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [indices] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(first) == 5


def test_unshuffled_it_yields_what_it_was_given() -> None:
    sampler = PlannedSampler([5, 3, 8], shuffle=False)
    assert list(sampler) == list(sampler) == [5, 3, 8]


def test_set_epoch_says_which_is_next() -> None:
    sampler, other = PlannedSampler(range(100)), PlannedSampler(range(100))
    sampler.set_epoch(2)
    third, fourth = list(sampler), list(sampler)
    assert [third, fourth] == [list(other) for _ in range(4)][2:]


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 4), (0, None), (2, 4), (2, None)])
def test_every_pass_of_a_dataloader_is_the_next_epoch(workers: int, batch_size: int | None) -> None:
    sampler = PlannedSampler(range(20), seed=1)
    loader: DataLoader[int] = DataLoader(
        list(range(20)),  # type: ignore[arg-type]  # a list is a dataset to torch
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    passes = [torch.cat([torch.as_tensor(batch).reshape(-1) for batch in loader]).tolist() for _ in range(3)]
    assert passes == [sampler.order(epoch).tolist() for epoch in range(3)]


def test_the_plan_is_told_before_the_first_item(tmp_path: Path, manifest: Manifest) -> None:
    with NotingDaemon(tmp_path) as daemon:
        sampler = PlannedSampler(range(0, 40, 2), seed=3, plan_sender=sender(tmp_path, manifest))
        for epoch in range(2):
            iterator = iter(sampler)
            first = next(iterator)
            plan, packed = daemon.plans[epoch]
            order = sampler.order(epoch)
            assert plan == Plan("job", "train-job", ROOT, manifest.digest, epoch, 0, order_digest(order))
            assert list(unpack(packed)) == order.tolist() == [first, *iterator]
        assert len(daemon.plans) == 2


def test_a_new_daemon_is_told_the_plan_and_the_position(tmp_path: Path, manifest: Manifest) -> None:
    told = sender(tmp_path, manifest, check_pause_s=0)
    with NotingDaemon(tmp_path, "first") as first:
        told.begin(5, np.arange(40, dtype=np.uint32))
        told.keep_told(1)
        assert [plan.position for plan, _ in first.plans] == [0]
    told.keep_told(2)
    with NotingDaemon(tmp_path, "second") as second:
        told.keep_told(17)
        second.wait_for(lambda daemon: len(daemon.plans) == 1)
        told.keep_told(18)
        assert [(plan.epoch, plan.position) for plan, _ in second.plans] == [(5, 17)]


def test_it_looks_for_a_new_daemon_once_a_second_at_most(tmp_path: Path, manifest: Manifest) -> None:
    told = sender(tmp_path, manifest, check_pause_s=1000)
    with NotingDaemon(tmp_path, "first"):
        told.begin(0, np.arange(40, dtype=np.uint32))
    with NotingDaemon(tmp_path, "second") as second:
        told.keep_told(17)
        assert second.plans == []


def test_a_daemon_that_hangs_holds_up_an_epoch_for_a_second(tmp_path: Path, manifest: Manifest) -> None:
    sampler = PlannedSampler(range(40), plan_sender=sender(tmp_path, manifest, check_pause_s=0))
    with NotingDaemon(tmp_path) as daemon, daemon.hanging():
        started_s = time.monotonic()
        assert sorted(sampler) == list(range(40))
        assert time.monotonic() - started_s < 3


def test_items_that_the_dataloader_took_and_nobody_read_stay_in_the_plan(tmp_path: Path, manifest: Manifest) -> None:
    """A daemon that starts in the middle of an epoch learns a position that leaves `read_ahead` items in front of it."""
    plan_sender = sender(tmp_path, manifest, check_pause_s=0)
    iterator = iter(PlannedSampler(range(40), shuffle=False, plan_sender=plan_sender, read_ahead=8))
    taken = [next(iterator) for _ in range(20)]
    assert taken == list(range(20))
    with NotingDaemon(tmp_path) as daemon:
        assert next(iterator) == 20
        daemon.wait_for(lambda daemon: len(daemon.plans) == 1)
        assert [plan.position for plan, _ in daemon.plans] == [12]


def test_without_a_daemon_the_order_is_the_same(tmp_path: Path, manifest: Manifest) -> None:
    alone = PlannedSampler(range(40), seed=3, plan_sender=sender(tmp_path / "none", manifest))
    with NotingDaemon(tmp_path):
        led = PlannedSampler(range(40), seed=3, plan_sender=sender(tmp_path, manifest))
        assert [list(alone) for _ in range(2)] == [list(led) for _ in range(2)]


def test_a_refused_plan_is_one_warning(tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    sampler = PlannedSampler(range(40), plan_sender=sender(tmp_path, manifest))
    with NotingDaemon(tmp_path) as daemon:
        daemon.refuses["/v1/plan"] = (400, "no such manifest")
        for _ in range(3):
            assert sorted(sampler) == list(range(40))
    [warning] = [record.getMessage() for record in caplog.records if record.name == "gcs_dataset"]
    assert "no such manifest" in warning
