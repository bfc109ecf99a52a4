"""What a checkpoint must have in common with the sampler that loads it, and where the sampler continues."""

from dataclasses import fields, replace
from typing import Any

import pytest

from gcs_dataset.epoch_position import Position
from gcs_dataset.sampler_checkpoint import COMPARISONS, Checkpoint, check_comparable, resumed_position
from gcs_prefetchd.shared.errors import PrefetchdError, SettingsError

OWN = Checkpoint(
    data_root="gs://pictures/set",
    manifest="a" * 32,
    ids="b" * 32,
    items="c" * 16,
    kind="shuffled",
    seed=7,
    epoch=2,
    position=12,
    start=4,
    world=2,
    drop_last=False,
)


def refused_field(saved: Checkpoint, own: Checkpoint = OWN) -> str:
    """The field that the error names; empty if the two are comparable."""
    try:
        check_comparable(saved, own)
    except PrefetchdError as exc:
        return str(exc).split("'")[1]
    return ""


def test_a_state_is_plain_data_and_makes_the_same_checkpoint() -> None:
    state = OWN.to_state()
    assert {type(value) for value in state.values()} == {str, int, bool}
    assert Checkpoint.from_state(state | {"of a later version": 1}) == OWN


@pytest.mark.parametrize("field", [field.name for field in fields(Checkpoint)])
def test_a_missing_field_and_one_of_another_type_are_named(field: str) -> None:
    state: dict[str, Any] = OWN.to_state()
    for wrong in (state | {field: None}, {name: value for name, value in state.items() if name != field}):
        with pytest.raises(SettingsError, match=f"^checkpoint: field '{field}' is missing or not of type"):
            Checkpoint.from_state(wrong)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, ""),
        ({"manifest": "d" * 32}, ""),  # objects that changed do not change the order
        ({"epoch": 9, "position": 30, "start": 0, "world": 5, "drop_last": True}, ""),
        ({"data_root": "gs://other/set"}, "data_root"),
        ({"data_root": "gs://other/set", "manifest": ""}, ""),  # the indices alone count without a listing
        ({"data_root": "gs://other/set", "manifest": "", "items": "0" * 16}, "items"),
        ({"ids": "0" * 32}, "ids"),
        ({"ids": "0" * 32, "items": "0" * 16}, "ids"),
        ({"ids": "0" * 32, "items": "0" * 16, "position": 0, "start": 0}, ""),  # its epoch starts with the present items
        ({"ids": "0" * 32, "position": 0, "seed": 8}, "seed"),
        ({"items": "0" * 16}, "items"),
        ({"items": "0" * 16, "position": 0}, "items"),
        ({"kind": "listed"}, "kind"),
        ({"seed": 8}, "seed"),
        ({"kind": "listed", "seed": 8}, "kind"),
    ],
    ids=str,
)
def test_a_checkpoint_is_refused_for_the_first_field_that_differs(changes: dict[str, Any], field: str) -> None:
    assert refused_field(replace(OWN, **changes)) == field


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda comparison: comparison.field)
def test_every_refusal_names_its_field_and_offers_to_restart_the_epoch(comparison: Any) -> None:
    """Every reason can be formatted, and every refusal offers to restart the epoch."""
    other: Any = 8 if comparison.field == "seed" else "other"
    with pytest.raises(comparison.error, match=f"^checkpoint: field '{comparison.field}': .*; .*restart the epoch"):
        comparison.check(replace(OWN, **{comparison.field: other}), OWN)


@pytest.mark.parametrize(
    ("changes", "position"),
    [
        ({}, Position(2, start=4, taken=4)),
        ({"position": 4}, Position(2, start=4, taken=0)),
        ({"position": 41}, Position(2, start=4, taken=18)),  # one item was repeated
        ({"world": 3}, Position(2, start=12, taken=0)),
        ({"drop_last": True}, Position(2, start=12, taken=0)),
        ({"world": 5, "position": 43}, Position(2, start=40, taken=0)),
    ],
    ids=str,
)
def test_the_same_shares_continue_and_other_shares_start_where_they_stopped(
    changes: dict[str, Any], position: Position
) -> None:
    assert resumed_position(replace(OWN, **changes), OWN, 40) == position


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": -1},
        {"epoch": 2**63},
        {"world": 0},
        {"start": -1},
        {"start": 41, "position": 41},
        {"position": 3},
        {"position": 42},
    ],
    ids=str,
)
def test_contradictory_numbers_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"field 'position': .* not a valid position"):
        resumed_position(replace(OWN, **changes), OWN, 40)


def test_the_next_epoch_starts_at_its_start() -> None:
    following = OWN.at_next_epoch()
    assert (following.epoch, following.start, following.position) == (3, 0, 0)
    assert following.is_at_epoch_start
    assert not OWN.is_at_epoch_start
