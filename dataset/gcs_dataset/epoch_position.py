"""Where a sampler is: a position in an epoch, and which epoch its next iteration reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["TRANSITIONS", "EpochState", "Position"]


@dataclass(frozen=True, slots=True)
class Position:
    """A position in one rank's share of an epoch.

    The share starts at `start` of the epoch's global order: 0, or where another world stopped. `taken` of its items are read.
    """

    epoch: int = 0
    start: int = 0
    taken: int = 0


class EpochState(Enum):
    """Which epoch the next iteration of a sampler reads: the current one, from its position on, or the one after it."""

    PENDING = "pending"
    """The current one. If nothing is left of it, its first iterator yields nothing, and the one after is the next epoch's."""

    REQUESTED = "requested"
    """The current one, because `set_epoch` named it: every iterator yields what is left of it, even if that is nothing."""

    EXHAUSTED = "exhausted"
    """The next one: nothing is left of the current one, and an iterator that yields nothing was created for it."""

    STARTED = "started"
    """The next one: the current one is being read, or was."""


# `load_state_dict` leads from every state to PENDING, `set_epoch` to REQUESTED. The other transitions:
TRANSITIONS: Mapping[EpochState, frozenset[EpochState]] = {
    EpochState.PENDING: frozenset({
        EpochState.PENDING,
        EpochState.REQUESTED,
        EpochState.EXHAUSTED,  # an iterator is created, and nothing is left
        EpochState.STARTED,  # the iterator's first index is taken
    }),
    EpochState.REQUESTED: frozenset({
        EpochState.PENDING,
        EpochState.REQUESTED,
        EpochState.STARTED,  # the iterator's first index is taken
    }),
    EpochState.EXHAUSTED: frozenset({
        EpochState.PENDING,  # another iterator is created, for the next epoch
        EpochState.REQUESTED,
        EpochState.STARTED,  # that iterator's first index is requested
    }),
    EpochState.STARTED: frozenset({
        EpochState.PENDING,  # an iterator is created, or an earlier one is used, for the next epoch
        EpochState.REQUESTED,
    }),
}  # fmt: skip
