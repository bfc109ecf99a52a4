"""The sampler whose order is known in advance: by the daemon, which prefetches along it, and by any program with the seed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from gcs_dataset.epoch_position import TRANSITIONS, EpochState, Position
from gcs_dataset.plan_registration import PlanSender, Share
from gcs_dataset.sampler_checkpoint import LARGEST_EPOCH, Checkpoint, check_comparable, resumed_position
from gcs_prefetchd.shared.epoch_order import Indices, order_digest, share_length
from gcs_prefetchd.shared.errors import SettingsError
from gcs_prefetchd.shared.manifest import Manifest

__all__ = ["PlannedSampler"]

LARGEST_SEED = 2**63 - 1
CHUNK_INDICES = 4096  # converted to Python's integers at once, which need ten times the memory of packed ones


class PlannedSampler(Sampler[int]):
    """Yields dataset indices in an order that depends on `seed` and the epoch alone, with and without a daemon.

    - `indices`: what to yield (1-d, of the manifest's items): one side of a split, for example.
    - `shuffle=False`: yields them in the given order. `replacement=True`: draws as many as there are, with replacement.
    - `rank` of `world`: which share of the one global order to yield; by default torch.distributed's if it is initialised,
      else all of it. As with torch's DistributedSampler all shares have the same length: `drop_last` leaves the odd rest out,
      otherwise some items are repeated.
    - `plan_sender`: sends each epoch's order to the daemon before its first item; None sends nothing.
    - `read_ahead`: how many indices the DataLoader takes before their items are read (batches in flight times their size).

    Each iteration is the next epoch, from 0; `set_epoch` names the next one. `state_dict` and `load_state_dict` resume in the
    middle of an epoch, with the same world or another, which continues the same global order. They count indices that were
    *taken*: exact in torchdata's StatefulDataLoader, which keeps the state of each batch until it returns the batch, and in
    our PlannedDataLoader; torch's own DataLoader requests batches ahead and does not report how many it has returned.

    Raises SettingsError for a rank outside the world, a negative or huge seed, invalid indices, and nothing to shuffle.
    """

    def __init__(
        self,
        indices: Sequence[int] | NDArray[Any] | torch.Tensor,
        *,
        seed: int = 0,
        shuffle: bool = True,
        replacement: bool = False,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
        plan_sender: PlanSender | None = None,
        read_ahead: int = 0,
    ) -> None:
        self.seed = int(seed)
        self.shuffle = shuffle
        self.replacement = replacement
        self.drop_last = bool(drop_last)
        self.rank, self.world = _rank_and_world(rank, world)
        self._manifest = plan_sender.manifest if plan_sender is not None else None
        self._indices = self._checked_indices(indices, len(self._manifest) if self._manifest is not None else 2**32)
        self._plan_sender = plan_sender
        self._read_ahead = read_ahead
        if not 0 <= seed <= LARGEST_SEED:
            raise SettingsError(f"seed must be between 0 and {LARGEST_SEED}, not {seed}")
        if replacement and not shuffle:
            raise SettingsError("replacement=True draws at random: leave shuffle=True")
        self._state = EpochState.PENDING
        self._start = Position()  # of the current epoch's iteration
        self._taken = 0  # of the share; not a Position, because it changes with every index

    def __len__(self) -> int:
        """The length of a complete epoch's share."""
        return self._share_length(0)

    @property
    def kind(self) -> str:
        """How an epoch's order is computed, as `epoch_order.plan_order` names it."""
        return "endless" if self.replacement else "shuffled" if self.shuffle else "listed"

    @property
    def has_started(self) -> bool:
        """Whether the current epoch is being read or was; False if the next iteration reads it."""
        return self._state is EpochState.STARTED

    @property
    def taken(self) -> int:
        """How many items of the current epoch's share have been taken."""
        return self._taken

    @property
    def is_at_epoch_start(self) -> bool:
        """Whether nothing of the current epoch has been taken, in this run or in one that it resumes."""
        return self._start.start == self._taken == 0

    @property
    def indices(self) -> Indices:
        """The indices to yield, in the order in which they were given."""
        return self._indices

    @property
    def remaining(self) -> int:
        """How many items of the current epoch are left for this rank."""
        return self._share_length(self._start.start) - self._taken

    def set_epoch(self, epoch: int) -> None:
        """Make this epoch the next iteration's; if a loaded state is in the middle of it, the iteration continues there."""
        if not 0 <= epoch <= LARGEST_EPOCH:
            raise SettingsError(f"epoch must be between 0 and {LARGEST_EPOCH}, not {epoch}")
        if self.has_started or epoch != self._start.epoch:
            self._move_to(Position(int(epoch)))
        self._enter(EpochState.REQUESTED)

    def use_manifest(self, manifest: Manifest, indices: Sequence[int] | NDArray[Any] | torch.Tensor) -> None:
        """Yield these indices of another manifest from the next iteration on; the epoch and the position stay.

        Raises SettingsError if they are not indices of its items, or if there is nothing to shuffle.
        """
        self._indices = self._checked_indices(indices, len(manifest))
        self._manifest = manifest
        if self._plan_sender is not None:
            self._plan_sender.use_manifest(manifest)

    def order(self, epoch: int) -> Indices:
        """The complete order of an epoch for this rank."""
        return self._share(epoch, 0).order()

    def __iter__(self) -> Iterator[int]:
        if self.has_started:
            self._move_to(Position(self._start.epoch + 1))
        elif self.remaining == 0 and self._state is not EpochState.REQUESTED:
            # A state from an epoch's very end was loaded. The iteration that resumes it yields nothing. But DataLoaders
            # create iterators that they never use, and a caller who creates another one wants the next epoch.
            if self._state is EpochState.EXHAUSTED:
                self._move_to(Position(self._start.epoch + 1))
            if self.remaining == 0:
                self._enter(EpochState.EXHAUSTED)
        return self._take_indices()

    def checkpoint(self, taken: int | None = None) -> Checkpoint:
        """Where in which epoch of which order this is; `taken` as in `state_dict`."""
        manifest = self._manifest
        return Checkpoint(
            data_root=manifest.data_root.uri if manifest is not None else "",
            manifest=manifest.digest if manifest is not None else "",
            ids=manifest.ids.digest if manifest is not None else "",
            items=order_digest(self._indices),
            kind=self.kind,
            seed=self.seed,
            epoch=self._start.epoch,
            position=self._start.start + (self._taken if taken is None else taken) * self.world,
            start=self._start.start,
            world=self.world,
            drop_last=self.drop_last,
        )

    def state_dict(self, *, position: int | None = None) -> dict[str, Any]:
        """Where in which epoch of which order this is; the same on every rank.

        `position` is how many items of this rank's share have been read, if not all that were taken.
        """
        return self.checkpoint(position).to_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue where a state was saved, with this rank's share of what was left then.

        The order depends on the items' ids alone, so a state of an earlier listing with the same ids is as good. A state of
        which nothing has been read yet starts its epoch, whatever the data root holds by now. Raises ManifestError if the
        state is of other items, SettingsError if it is of another order or not a state.
        """
        saved, own = Checkpoint.from_state(state), self.checkpoint()
        check_comparable(saved, own)
        self._move_to(resumed_position(saved, own, len(self._indices)))

    def prepare_iteration(self) -> bool:
        """Move to the next iteration's epoch; False if nothing is left of a resumed one: this was its iteration."""
        if self.has_started:
            self._move_to(Position(self._start.epoch + 1))
        elif self.remaining == 0:
            self._enter(EpochState.STARTED)
        return not self.has_started

    def _take_indices(self) -> Iterator[int]:
        # A generator: an epoch starts when its first index is taken. DataLoader creates iterators that it never uses.
        if self.has_started:
            self._move_to(Position(self._start.epoch + 1))
        self._enter(EpochState.STARTED)
        share = self._share(self._start.epoch, self._start.start)
        order, first_taken, sender = share.order(), self._taken, self._plan_sender
        if sender is not None and first_taken < len(order):
            # A listed share is sent as it is: the ranks need not know each other's.
            sender.start_plan(share if self.shuffle else Share("listed", 0, share.epoch, order), order, first_taken)
        for chunk_start in range(first_taken, len(order), CHUNK_INDICES):
            for position, index in enumerate(order[chunk_start : chunk_start + CHUNK_INDICES].tolist(), chunk_start):
                if sender is not None:
                    sender.ensure_sent(max(position - self._read_ahead, first_taken))
                self._taken = position + 1
                yield index

    def _checked_indices(self, indices: Sequence[int] | NDArray[Any] | torch.Tensor, items: int) -> Indices:
        given = np.asarray(indices)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise SettingsError(f"indices must be a sequence of integers, not {given.ndim}-dimensional {given.dtype}")
        if given.size and not 0 <= int(given.min()) <= int(given.max()) < items:
            worst = int(given.min()) if given.min() < 0 else int(given.max())
            raise SettingsError(f"indices must be between 0 and {items - 1}, the items of the manifest; one is {worst}")
        if self.shuffle and not given.size:
            raise SettingsError("indices must hold at least one item to shuffle or draw from")
        return given.astype(np.uint32)

    def _share_length(self, start: int) -> int:
        return share_length(len(self._indices) - start, self.world, self.drop_last)

    def _share(self, epoch: int, start: int) -> Share:
        return Share(self.kind, self.seed, epoch, self._indices, self.rank, self.world, self.drop_last, start)

    def _move_to(self, position: Position) -> None:
        """Let the next iteration start here."""
        self._enter(EpochState.PENDING)
        self._start, self._taken = position, position.taken

    def _enter(self, state: EpochState) -> None:
        assert state in TRANSITIONS[self._state], (self._state, state)
        self._state = state


def _rank_and_world(rank: int | None, world: int | None) -> tuple[int, int]:
    """This process's rank and the number of ranks: as given, else torch.distributed's, else the only one."""
    if rank is not None and world is not None:
        if world < 1:
            raise SettingsError(f"world must be at least 1, not {world}")
        if not 0 <= rank < world:
            raise SettingsError(f"rank must be between 0 and {world - 1} in a world of {world}, not {rank}")
        return int(rank), int(world)
    if rank is not None or world is not None:
        raise SettingsError(f"rank and world go together: give both or neither, not rank={rank} and world={world}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
