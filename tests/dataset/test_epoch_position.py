"""The states of a sampler's epoch: which transitions are allowed, and how a sampler's calls lead from one to the next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_dataset import PlannedSampler
from gcs_dataset.epoch_position import TRANSITIONS, EpochState, Position

PENDING, REQUESTED, EXHAUSTED, STARTED = EpochState
CALLS = ("iter", "read", "finish", "set_epoch 0", "set_epoch 1", "load start", "load end", "prepare_iteration")


class Calls:
    """Makes calls of a sampler of two items, and records the states that they lead to."""

    def __init__(self) -> None:
        self.sampler = PlannedSampler(range(2))
        self.iterator = iter(self.sampler)
        self.end_state = self.sampler.state_dict() | {"position": 2}

    def make(self, call: str) -> EpochState:
        if call == "iter":
            self.iterator = iter(self.sampler)
        elif call == "read":
            next(self.iterator, None)
        elif call == "finish":
            list(self.iterator)
        elif call == "prepare_iteration":
            self.sampler.prepare_iteration()
        elif call.startswith("set_epoch"):
            self.sampler.set_epoch(int(call[-1]))
        else:
            self.sampler.load_state_dict(self.end_state | ({"position": 0} if call == "load start" else {}))
        return self.sampler._state


@pytest.mark.parametrize(
    ("calls", "states"),
    [
        (["iter", "read", "iter", "read"], [PENDING, STARTED, PENDING, STARTED]),
        (["iter", "iter", "finish", "iter"], [PENDING, PENDING, STARTED, PENDING]),
        (["set_epoch 1", "iter", "read"], [REQUESTED, REQUESTED, STARTED]),
        (["set_epoch 0", "set_epoch 1", "load start"], [REQUESTED, REQUESTED, PENDING]),
        (["read", "set_epoch 1"], [STARTED, REQUESTED]),
        (["read", "load end"], [STARTED, PENDING]),
        (["load end", "iter", "finish", "iter"], [PENDING, EXHAUSTED, STARTED, PENDING]),
        (["load end", "iter", "iter", "read"], [PENDING, EXHAUSTED, PENDING, STARTED]),
        (["load end", "iter", "set_epoch 0", "iter"], [PENDING, EXHAUSTED, REQUESTED, REQUESTED]),
        (["load end", "set_epoch 0", "iter", "iter", "finish"], [PENDING, REQUESTED, REQUESTED, REQUESTED, STARTED]),
        (["load end", "prepare_iteration", "prepare_iteration"], [PENDING, STARTED, PENDING]),
    ],
    ids=str,
)
def test_calls_lead_from_state_to_state(calls: list[str], states: list[EpochState]) -> None:
    made = Calls()
    assert [made.make(call) for call in calls] == states


@given(st.lists(st.sampled_from(CALLS), max_size=30))
def test_no_sequence_of_calls_leaves_the_table(calls: list[str]) -> None:
    """The sampler asserts that a transition is in the table."""
    made = Calls()
    for call in calls:
        assert made.make(call) in TRANSITIONS


def test_every_state_has_a_row_and_none_is_a_dead_end() -> None:
    assert set(TRANSITIONS) == set(EpochState)
    for allowed in TRANSITIONS.values():
        assert allowed >= {PENDING, REQUESTED}


def test_positions_are_frozen_values() -> None:
    assert Position() == Position(epoch=0, start=0, taken=0)
    assert len({Position(1, 2, 3), Position(1, 2, 3), Position(1, 2, 4)}) == 2
