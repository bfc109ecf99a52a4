"""Following samplers of any kind: exactly their indices, sent to the daemon if there is one."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from gcs_dataset import CachedLoader, FollowedSampler, PlannedSampler, follow
from gcs_prefetchd.shared.epoch_order import order_digest
from gcs_prefetchd.shared.errors import SettingsError
from gcs_prefetchd.shared.messages import unpack_indices
from support.datasets import ROOT, RecordingDaemon, manifest_of, warnings_of

ITEMS = 40
DATASET: Any = list(range(ITEMS))


class OwnBatches:
    """A user's batch sampler: batches of growing size, of all kinds of integers, one of them empty."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        yield [self.epoch]
        yield []
        yield (3, 1, 2)
        yield np.array([7, 5])
        yield torch.tensor([9, 9, 39])


class OwnIndices(Sampler[Any]):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        return iter([np.int64(3), torch.tensor(5), 7])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


SAMPLERS: dict[str, Callable[[], Any]] = {
    "weighted": lambda: WeightedRandomSampler(list(range(1, ITEMS + 1)), 100, generator=generator()),
    "distributed": lambda: DistributedSampler(DATASET, 3, 1, seed=4),
    "random": lambda: RandomSampler(DATASET, generator=generator()),
    "subset": lambda: SubsetRandomSampler([3, 1, 4], generator=generator()),
    "sequential": lambda: SequentialSampler(DATASET),
    "list": lambda: [5, 3, 8],
    "planned": lambda: PlannedSampler(range(ITEMS), seed=3),
    "batches": lambda: BatchSampler(RandomSampler(DATASET, generator=generator()), 7, drop_last=True),
    "distributed batches": lambda: BatchSampler(DistributedSampler(DATASET, 2, 0), 8, drop_last=False),
    "own batches": OwnBatches,
    "own indices": OwnIndices,
}


def values(yielded: Any) -> list[Any]:
    """The yielded values in comparable form, with their types."""
    return [(type(value), np.asarray(value).tolist()) for value in yielded]


def flat(yielded: list[Any]) -> list[int]:
    return [int(index) for value in yielded for index in np.asarray(value).reshape(-1)]


@pytest.fixture(params=["with a daemon", "without"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RecordingDaemon | None]:
    with ExitStack() as stack:
        yield stack.enter_context(RecordingDaemon(tmp_path)) if request.param == "with a daemon" else None


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_followed_sampler_yields_exactly_the_same_indices(daemon: RecordingDaemon | None, tmp_path: Path, name: str) -> None:
    """In every epoch, also after set_epoch; and the daemon has them before the first is yielded."""
    plain = SAMPLERS[name]()
    followed = follow(SAMPLERS[name](), CachedLoader(tmp_path, manifest=manifest_of(ITEMS)))
    for epoch in range(3):
        for sampler in (plain, followed):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        expected = list(plain)
        iterator = iter(followed)
        first = next(iterator)
        if daemon is not None:
            plan, packed = daemon.plans[epoch]
            assert (plan.kind, plan.epoch, plan.position, plan.rank, plan.world, plan.start) == ("listed", epoch, 0, 0, 1, 0)
            assert list(unpack_indices(packed)) == flat(expected)
            assert plan.digest == order_digest(np.array(flat(expected), dtype=np.uint32))
        assert values([first, *iterator]) == values(expected)
    assert daemon is None or len({plan.stream for plan, _ in daemon.plans}) == 1


@pytest.mark.parametrize(("make", "workers"), [(DataLoader, 0), (DataLoader, 2), (StatefulDataLoader, 0)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_dataloader_reads_the_same_through_a_followed_sampler(
    daemon: RecordingDaemon | None, tmp_path: Path, name: str, make: Callable[..., Any], workers: int
) -> None:
    def read(sampler: Any) -> list[Any]:
        if "batches" in name:
            loader = make(DATASET, batch_sampler=sampler, num_workers=workers, collate_fn=list)
        else:
            loader = make(DATASET, 4, sampler=sampler, num_workers=workers)
        torch.manual_seed(0)  # from which the DataLoader draws its workers' seed
        return [np.asarray(batch).tolist() for _ in range(2) for batch in loader]

    loader = CachedLoader(tmp_path, manifest=manifest_of(ITEMS))
    assert read(follow(SAMPLERS[name](), loader)) == read(SAMPLERS[name]())
    assert daemon is None or len(daemon.plans) == 2


def test_a_followed_sampler_has_the_samplers_length(tmp_path: Path) -> None:
    loader = CachedLoader(tmp_path)
    assert len(follow(SAMPLERS["batches"](), loader, ROOT)) == 5
    with pytest.raises(TypeError, match="OwnBatches"):
        len(follow(OwnBatches(), loader, ROOT))


def test_set_epoch_reaches_the_sampler(tmp_path: Path) -> None:
    batches = OwnBatches()
    follow(batches, CachedLoader(tmp_path), ROOT).set_epoch(7)
    assert batches.epoch == 7
    follow([1, 2], CachedLoader(tmp_path), ROOT).set_epoch(7)


def test_a_loader_without_a_manifest_uses_the_daemons(tmp_path: Path) -> None:
    manifest = manifest_of(ITEMS)
    with RecordingDaemon(tmp_path) as daemon:
        followed = follow([5, 3], CachedLoader(tmp_path), ROOT)
        assert list(followed) == [5, 3]
        assert daemon.plans == []  # it has no manifest yet
        daemon.manifest_folder = manifest.save(tmp_path / "manifests")
        assert list(followed) == [5, 3]
        [(plan, _)] = daemon.plans
        assert (plan.manifest, plan.data_root, plan.epoch) == (manifest.digest, ROOT, 1)


def test_each_epoch_is_sent_as_one_of_the_newest_listing_with_the_same_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """New generations are used. Other items are not, because the indices would refer to other ones; this is logged once."""
    first, changed = manifest_of(ITEMS), manifest_of(ITEMS, generation=2)
    listings = [first, first, changed, manifest_of(ITEMS + 1), manifest_of(ITEMS + 2), manifest_of(ITEMS, generation=3)]
    with RecordingDaemon(tmp_path) as daemon:
        followed = follow([5, 3], CachedLoader(tmp_path), ROOT)
        for listing in listings:
            daemon.manifest_folder = listing.save(tmp_path / "manifests")
            assert list(followed) == [5, 3]
        sent = [plan.manifest for plan, _ in daemon.plans]
    assert sent == [one.digest for one in (first, first, changed, changed, changed, listings[-1])]
    [warning] = warnings_of(caplog)
    assert "the items have changed in the bucket" in warning


def test_a_loaders_own_manifest_is_kept(tmp_path: Path) -> None:
    own = manifest_of(ITEMS)
    with RecordingDaemon(tmp_path) as daemon:
        daemon.manifest_folder = manifest_of(ITEMS, generation=2).save(tmp_path / "manifests")
        followed = follow([5, 3], CachedLoader(tmp_path, manifest=own))
        assert list(followed) == list(followed) == [5, 3]
        assert {plan.manifest for plan, _ in daemon.plans} == {own.digest}


def test_a_daemon_that_starts_in_the_middle_learns_the_position(tmp_path: Path) -> None:
    loader = CachedLoader(tmp_path, manifest=manifest_of(ITEMS))
    iterator = iter(FollowedSampler([[0, 1, 2]] * 20, loader, read_ahead=6, check_pause_s=0))
    taken = list(itertools.islice(iterator, 10))
    assert len(taken) == 10
    with RecordingDaemon(tmp_path) as daemon:
        next(iterator)
        daemon.wait_for(lambda daemon: len(daemon.plans) == 1)
        assert [plan.position for plan, _ in daemon.plans] == [
            24
        ]  # ten batches of three indices, six of which are not read yet


@pytest.mark.parametrize(
    ("yielded", "why"),
    [
        ([3, ITEMS], f"yields the index {ITEMS}, but {ROOT} has {ITEMS} items"),
        ([-1], "yields the index -1"),
        ([[1, 2], [3, 2**40]], "yields the index 1099511627776"),
        (["0003"], "yields '0003', which is neither an index nor a list of indices"),
        ([1.5], "yields 1.5"),
        ([None], "yields None"),
    ],
)
def test_an_index_outside_the_manifest_is_named(tmp_path: Path, yielded: list[Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        list(follow(yielded, CachedLoader(tmp_path, manifest=manifest_of(ITEMS))))


def test_an_endless_sampler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="more than 1000 times; an endless sampler cannot be followed"):
        next(iter(FollowedSampler(itertools.count(), CachedLoader(tmp_path), ROOT, most_items=1000)))


def test_a_data_root_must_be_named_and_be_the_manifests(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="data_root must name"):
        follow([1], CachedLoader(tmp_path))
    with pytest.raises(SettingsError, match=f"data_root is gs://pictures/other, and the loader's manifest is of {ROOT}"):
        follow([1], CachedLoader(tmp_path, manifest=manifest_of(3)), "gs://pictures/other")


def test_an_empty_epoch_is_not_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RecordingDaemon(tmp_path) as daemon:
        assert list(follow([], CachedLoader(tmp_path, manifest=manifest_of(3)))) == []
        assert daemon.plans == []
    assert warnings_of(caplog) == []
