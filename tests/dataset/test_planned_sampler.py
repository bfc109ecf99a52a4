"""The sampler: its orders, its epochs, its state, and what it sends to the daemon."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gcs_dataset import PlannedSampler
from gcs_dataset.plan_registration import PlanSender
from gcs_prefetchd.shared.epoch_order import epoch_order, order_digest, plan_order
from gcs_prefetchd.shared.errors import ManifestError, PrefetchdError, SettingsError
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.messages import Plan, unpack_indices
from support.datasets import ROOT, RecordingDaemon, manifest_of


@pytest.fixture
def manifest() -> Manifest:
    return manifest_of(40)


def sender_of(cache_dir: Path, manifest: Manifest, check_pause_s: float = 1.0, confirm_pause_s: float = 1000.0) -> PlanSender:
    return PlanSender(
        cache_dir, manifest, job="job", stream="train-job", check_pause_s=check_pause_s, confirm_pause_s=confirm_pause_s
    )


def test_an_epochs_order_depends_only_on_seed_and_epoch() -> None:
    indices = [3, 5, 8, 13, 21]
    first, second = PlannedSampler(indices, seed=7), PlannedSampler(torch.tensor(indices), seed=7)
    epochs = [list(first) for _ in range(3)]
    assert epochs == [list(second) for _ in range(3)]
    assert epochs == [epoch_order(7, epoch, np.array(indices, dtype=np.uint32)).tolist() for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [indices] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(first) == 5


def test_an_unshuffled_sampler_yields_its_indices_in_order() -> None:
    sampler = PlannedSampler([5, 3, 8], shuffle=False)
    assert list(sampler) == list(sampler) == [5, 3, 8]


def test_set_epoch_names_the_next_epoch() -> None:
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


def test_the_plan_is_sent_before_the_first_item(tmp_path: Path, manifest: Manifest) -> None:
    with RecordingDaemon(tmp_path) as daemon:
        sampler = PlannedSampler(range(0, 40, 2), seed=3, plan_sender=sender_of(tmp_path, manifest))
        for epoch in range(2):
            iterator = iter(sampler)
            first = next(iterator)
            plan, packed = daemon.plans[epoch]
            order = sampler.order(epoch)
            digest = order_digest(order)
            assert plan == Plan(
                "job",
                "train-job",
                ROOT,
                manifest.digest,
                "shuffled",
                3,
                epoch,
                0,
                rank=0,
                world=1,
                drop_last=0,
                start=0,
                digest=digest,
            )
            assert list(unpack_indices(packed)) == list(range(0, 40, 2))
            assert order.tolist() == [first, *iterator]
        assert len(daemon.plans) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1, "world": 3},
        {"rank": 1, "world": 3, "drop_last": True},
        {"rank": 2, "world": 3, "replacement": True},
        {"rank": 2, "world": 3, "shuffle": False},
        {"shuffle": False},
    ],
    ids=str,
)
def test_the_daemon_can_compute_the_order_from_the_plan(tmp_path: Path, manifest: Manifest, options: dict[str, Any]) -> None:
    """Also of an epoch that continues where another world stopped."""
    with RecordingDaemon(tmp_path) as daemon:
        for start in (0, 10):
            sampler = PlannedSampler(range(40), seed=5, plan_sender=sender_of(tmp_path, manifest), **options)
            if start:
                state = PlannedSampler(range(40), **(options | {"seed": 5, "rank": 0, "world": 5})).state_dict()
                sampler.load_state_dict(state | {"position": start, "manifest": ""})
            yielded = list(sampler)
            plan, packed = daemon.plans[-1]
            order = plan_order(
                plan.kind,
                plan.seed,
                plan.epoch,
                np.frombuffer(packed, dtype="<u4").astype(np.uint32),
                rank=plan.rank,
                world=plan.world,
                drop_last=bool(plan.drop_last),
                start=plan.start,
            )
            assert order.tolist() == yielded
            assert order_digest(order) == plan.digest
            assert plan.kind == sampler.kind


def test_a_daemon_that_hangs_delays_an_epoch_by_a_second(tmp_path: Path, manifest: Manifest) -> None:
    sampler = PlannedSampler(range(40), plan_sender=sender_of(tmp_path, manifest, check_pause_s=0))
    with RecordingDaemon(tmp_path) as daemon, daemon.hanging():
        started_s = time.monotonic()
        assert sorted(sampler) == list(range(40))
        assert time.monotonic() - started_s < 3


def test_items_that_were_taken_but_not_read_stay_in_the_plan(tmp_path: Path, manifest: Manifest) -> None:
    """A daemon that starts in the middle of an epoch learns a position that leaves `read_ahead` items in front of it."""
    plan_sender = sender_of(tmp_path, manifest, check_pause_s=0)
    iterator = iter(PlannedSampler(range(40), shuffle=False, plan_sender=plan_sender, read_ahead=8))
    taken = [next(iterator) for _ in range(20)]
    assert taken == list(range(20))
    with RecordingDaemon(tmp_path) as daemon:
        assert next(iterator) == 20
        daemon.wait_for(lambda daemon: len(daemon.plans) == 1)
        assert [plan.position for plan, _ in daemon.plans] == [12]


def test_without_a_daemon_the_order_is_the_same(tmp_path: Path, manifest: Manifest) -> None:
    alone = PlannedSampler(range(40), seed=3, plan_sender=sender_of(tmp_path / "none", manifest))
    with RecordingDaemon(tmp_path):
        planned = PlannedSampler(range(40), seed=3, plan_sender=sender_of(tmp_path, manifest))
        assert [list(alone) for _ in range(2)] == [list(planned) for _ in range(2)]


def test_a_rejected_plan_is_one_warning(tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    sampler = PlannedSampler(range(40), plan_sender=sender_of(tmp_path, manifest))
    with RecordingDaemon(tmp_path) as daemon:
        daemon.refuses["/v1/plan"] = (400, "no such manifest")
        for _ in range(3):
            assert sorted(sampler) == list(range(40))
    [warning] = [record.getMessage() for record in caplog.records if record.name == "gcs_dataset"]
    assert "no such manifest" in warning


# --- Ranks


def test_the_ranks_interleaved_are_one_global_order() -> None:
    alone = PlannedSampler(range(20), seed=3)
    shares = [list(PlannedSampler(range(20), seed=3, rank=rank, world=4)) for rank in range(4)]
    assert [item for turn in zip(*shares, strict=True) for item in turn] == list(alone)


@pytest.mark.parametrize(("drop_last", "length"), [(False, 6), (True, 5)])
def test_all_ranks_have_the_same_number_of_items(drop_last: bool, length: int) -> None:
    samplers = [PlannedSampler(range(22), rank=rank, world=4, drop_last=drop_last) for rank in range(4)]
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers] == [length] * 4
    read = {item for sampler in samplers for item in sampler.order(0).tolist()}
    assert len(read) == (20 if drop_last else 22)


def test_with_replacement_an_epoch_has_as_many_draws_as_there_are_items() -> None:
    sampler = PlannedSampler(range(100, 140), replacement=True)
    epochs = [list(sampler) for _ in range(3)]
    assert {len(epoch) for epoch in epochs} == {40}
    assert all(100 <= item < 140 for epoch in epochs for item in epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(set(epochs[0])) < 40


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rank": 4, "world": 4}, "rank must be between 0 and 3 in a world of 4, not 4"),
        ({"rank": -1, "world": 4}, "rank must be between 0 and 3"),
        ({"rank": 0, "world": 0}, "world must be at least 1, not 0"),
        ({"rank": 1}, "give both or neither"),
        ({"world": 2}, "give both or neither"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"seed": 2**63}, "seed must be between 0 and"),
        ({"shuffle": False, "replacement": True}, "leave shuffle=True"),
        ({"indices": []}, "indices must hold at least one item"),
        ({"indices": [1, 40]}, "indices must be between 0 and 39, the items of the manifest; one is 40"),
        ({"indices": [-1, 3]}, "one is -1"),
        ({"indices": [1.5]}, "must be a sequence of integers"),
        ({"indices": [[1]]}, "must be a sequence of integers"),
    ],
    ids=str,
)
def test_invalid_settings_are_named(tmp_path: Path, manifest: Manifest, options: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = {"indices": range(40), "plan_sender": sender_of(tmp_path, manifest)} | options
    with pytest.raises(SettingsError, match=why):
        PlannedSampler(**given)


def test_an_invalid_epoch_is_named() -> None:
    with pytest.raises(SettingsError, match="epoch must be between 0 and"):
        PlannedSampler(range(3)).set_epoch(-1)


def test_an_empty_side_of_a_split_yields_nothing_and_sends_nothing(tmp_path: Path, manifest: Manifest) -> None:
    with RecordingDaemon(tmp_path) as daemon:
        sampler = PlannedSampler([], shuffle=False, plan_sender=sender_of(tmp_path, manifest))
        assert [list(sampler) for _ in range(3)] == [[], [], []]
        assert daemon.plans == []


# --- Resuming


@given(
    st.integers(1, 40),
    st.sampled_from([{}, {"replacement": True}, {"shuffle": False}]),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 15)), max_size=4),
)
def test_any_chain_of_worlds_continues_the_same_global_order(
    items: int, options: dict[str, bool], drop_last: bool, runs: list[tuple[int, int]]
) -> None:
    """Each run of some ranks reads some rounds, saves the state of any rank, and is stopped."""
    alone = PlannedSampler(range(items), seed=9, **options)  # type: ignore[arg-type]
    alone.set_epoch(2)
    expected = list(alone)
    state, read = None, []
    for world, rounds in [*runs, (1, items)]:
        samplers = [
            PlannedSampler(range(items), seed=9, rank=rank, world=world, drop_last=drop_last and world > 1, **options)  # type: ignore[arg-type]
            for rank in range(world)
        ]
        for sampler in samplers:
            sampler.set_epoch(2)
            if state is not None:
                sampler.load_state_dict(state)
        iterators = [iter(sampler) for sampler in samplers]
        for _ in range(min(rounds, samplers[0].remaining)):
            read += [next(iterator) for iterator in iterators]
        states = [sampler.state_dict() for sampler in samplers]
        assert all(one == states[0] for one in states)
        state = states[0]
    assert read[:items] == expected


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_same_world_continues_the_very_same_shares(drop_last: bool) -> None:
    """Including the items that are repeated at their ends."""
    for rank in range(4):
        complete, first, second, third = (PlannedSampler(range(22), rank=rank, world=4, drop_last=drop_last) for _ in range(4))
        iterator = iter(first)
        read = [next(iterator), next(iterator)]
        second.load_state_dict(first.state_dict())
        iterator = iter(second)
        read.append(next(iterator))
        third.load_state_dict(second.state_dict())
        assert [*read, *third] == list(complete)
        assert list(third) == complete.order(1).tolist()


def test_a_state_from_before_the_first_item_resumes_at_the_epochs_start() -> None:
    sampler, other = PlannedSampler(range(10)), PlannedSampler(range(10))
    sampler.set_epoch(3)
    iter(sampler)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == sampler.order(3).tolist()


def test_set_epoch_keeps_a_states_position_in_its_epoch_and_starts_any_other() -> None:
    """A training loop calls set_epoch in either case."""
    sampler = PlannedSampler(range(10))
    sampler.set_epoch(3)
    iterator = iter(sampler)
    read = [next(iterator) for _ in range(4)]
    for epoch, expected in [(3, sampler.order(3).tolist()[4:]), (4, sampler.order(4).tolist())]:
        resumed = PlannedSampler(range(10))
        resumed.load_state_dict(sampler.state_dict())
        resumed.set_epoch(epoch)
        assert list(resumed) == expected
    assert read == sampler.order(3).tolist()[:4]


@pytest.mark.parametrize("iterators", [1, 2])
def test_a_state_from_an_epochs_very_end_leaves_nothing_of_it(iterators: int) -> None:
    sampler, resumed = PlannedSampler(range(10)), PlannedSampler(range(10))
    assert len(list(sampler)) == 10
    resumed.load_state_dict(sampler.state_dict())
    resumed.set_epoch(0)
    for _ in range(iterators):
        iterator = iter(resumed)
    assert list(iterator) == []
    assert list(resumed) == sampler.order(1).tolist()


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        (
            {"manifest": "0" * 32, "ids": "1" * 32, "position": 3},
            ManifestError,
            "field 'ids': it was saved for the items of listing 0000.*restart the epoch",
        ),
        (
            {"data_root": "gs://other/set"},
            ManifestError,
            f"field 'data_root': .* for gs://other/set, but this .* {ROOT};",
        ),
        ({"items": "0" * 16}, ManifestError, "field 'items': it was saved for other indices; use the data root and the split"),
        ({"seed": 8}, SettingsError, "field 'seed': it was saved with 8, but this sampler has 7"),
        ({"kind": "endless"}, SettingsError, "field 'kind': it was saved with 'endless', but this sampler has 'shuffled'"),
        ({"position": 41}, SettingsError, "field 'position': 41 of 40 items"),
        ({"position": -1}, SettingsError, "field 'position': -1"),
        ({"start": 41, "position": 41}, SettingsError, "field 'position': 41 of 40 items, starting at 41"),
        ({"epoch": -1}, SettingsError, "field 'position'"),
        ({"world": 0}, SettingsError, "field 'position'"),
        ({"ids": 7}, SettingsError, "field 'ids' is missing or not of type str"),
        ({"epoch": "1"}, SettingsError, "field 'epoch' is missing or not of type int"),
        ({"drop_last": None}, SettingsError, "field 'drop_last' is missing or not of type bool"),
    ],
    ids=str,
)
def test_a_checkpoint_of_something_else_is_refused_by_field(
    tmp_path: Path, manifest: Manifest, changes: dict[str, Any], error: type[PrefetchdError], why: str
) -> None:
    sampler = PlannedSampler(range(40), seed=7, plan_sender=sender_of(tmp_path, manifest))
    state = sampler.state_dict() | changes
    with pytest.raises(error, match=f"^checkpoint: {why}"):
        sampler.load_state_dict(state)
    assert list(sampler) == sampler.order(0).tolist()


def test_a_checkpoint_is_plain_data_that_torch_saves_and_loads(tmp_path: Path) -> None:
    sampler = PlannedSampler(np.arange(10), seed=np.int64(3))  # type: ignore[arg-type]
    sampler.set_epoch(np.int64(2))  # type: ignore[arg-type]
    iterator = iter(sampler)
    read = [next(iterator) for _ in range(3)]
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    resumed = PlannedSampler(range(10), seed=3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert [*read, *resumed] == sampler.order(2).tolist()
