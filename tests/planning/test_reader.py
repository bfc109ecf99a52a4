"""A reader's plan becomes its stream, and determines its next epochs."""

from collections.abc import Sequence

import pytest

from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.shared.epoch_order import plan_order
from gcs_prefetchd.shared.errors import ProtocolError
from support.plans import indices_of, plan_of
from support.registries import MANIFEST, add_items, order_of, positions, register


@pytest.mark.parametrize("kind", ["shuffled", "endless"])
def test_the_stream_of_a_seeded_plan_is_its_ranks_share_of_the_order(registry: Registry, kind: str) -> None:
    reader = register(registry, range(10), kind=kind, seed=3, epoch=2, rank=1, world=2)
    assert order_of(reader) == plan_order(kind, 3, 2, indices_of(range(10)), rank=1, world=2).tolist()
    assert reader.stream.is_endless == (kind == "endless")


@pytest.mark.parametrize("kind", ["shuffled", "endless"])
def test_the_next_epoch_of_a_seeded_plan_is_known(registry: Registry, kind: str) -> None:
    reader = register(registry, range(10), kind=kind, seed=3, epoch=2, rank=1, world=2, start=4)
    following = reader.prepare_next_epoch()
    assert following is not None
    assert following.number == 3
    assert following.order.tolist() == plan_order(kind, 3, 3, indices_of(range(10)), rank=1, world=2).tolist()


def test_the_next_epoch_of_a_listed_plan_is_unknown(registry: Registry) -> None:
    assert register(registry, [1, 2]).prepare_next_epoch() is None


@pytest.mark.parametrize(
    ("items", "changes", "message"),
    [
        (
            [3, 1],
            {"manifest": "feed"},
            "field 'manifest': 'feed' is not a known manifest of 'gs://pictures/train'; request it again",
        ),
        ([3, 1], {"data_root": "gs://pictures/valid"}, "field 'manifest': .* is not a known manifest of 'gs://pictures/valid'"),
        ([3, 10], {}, "field 'indices': index 10 is beyond the 10 items of the manifest"),
        ([3, 0xFFFF_FFFF], {}, "field 'indices': index 4294967295 is beyond"),
        ([], {}, "field 'indices' is empty"),
        ([], {"kind": "shuffled"}, "field 'indices' is empty"),
        ([], {"kind": "endless", "digest": ""}, "field 'indices' is empty"),
        ([3, 1], {"position": 3}, "field 'position': 3 is beyond the plan's 2 items"),
        ([3, 1, 2], {"rank": 1, "world": 2, "drop_last": 1, "position": 2}, "field 'position': 2 is beyond the plan's 1 items"),
        ([3, 1], {"digest": "0" * 16}, "field 'digest' does not match the order"),
        ([3, 1], {"digest": ""}, "field 'digest'"),
        (range(10), {"kind": "shuffled", "seed": 1, "digest": plan_of(MANIFEST, range(10))[0].digest}, "field 'digest'"),
    ],
)
def test_an_invalid_plan_names_its_field_and_changes_nothing(
    registry: Registry, items: Sequence[int], changes: dict[str, object], message: str
) -> None:
    before = list(registry)
    with pytest.raises(ProtocolError, match=f"^Plan: {message}"):
        register(registry, items, **changes)  # type: ignore[arg-type]  # none of them is a parameter
    assert list(registry) == before


@pytest.mark.parametrize("start", [3, 1000])
def test_a_plan_that_starts_at_or_beyond_its_end_is_finished(registry: Registry, start: int) -> None:
    assert register(registry, [3, 1, 2], start=start).stream.is_finished


@pytest.mark.parametrize(("items", "position"), [([1, 2], 2), ([9, 0], 1), ([1, 1, 1], 0)])
def test_a_plan_may_start_finished_or_repeat_items(registry: Registry, items: list[int], position: int) -> None:
    register(registry, items, position=position)
    assert positions(registry) == {"job/0": position}


def test_items_that_are_not_ready_when_an_epoch_starts_are_counted(registry: Registry) -> None:
    add_items(registry, 0, 1, 2)
    assert register(registry, [0, 1, 5, 6, 7]).missing_at_epoch_start == 3
    assert register(registry, [5, 0, 6], position=1, epoch=1).missing_at_epoch_start == 1
