"""The sampler whose order is known in advance: by the daemon, which prefetches along it, and by anyone with the seed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from gcs_dataset.plan_registration import PlanSender, Share
from gcs_prefetchd.shared.epoch_order import Indices, order_digest, share_length
from gcs_prefetchd.shared.errors import ManifestError, SettingsError
from gcs_prefetchd.shared.manifest import Manifest

__all__ = ["PlannedSampler"]

LARGEST = 2**63 - 1
YIELDED_AT_ONCE = 4096  # as Python's integers, which take ten times the memory of packed ones


class PlannedSampler(Sampler[int]):
    """Yields dataset indices in an order that depends on `seed` and the epoch alone, with and without a daemon.

    - `indices`: what to yield (1-d, of the manifest's items): a side of a split, for example.
    - `shuffle=False`: yields them as they are given. `replacement=True`: draws as many as there are, with replacement.
    - `rank` of `world`: which share of the one global order this is; torch.distributed's where it is initialised, else all of
      it. As with torch's DistributedSampler all shares have the same length: `drop_last` leaves the odd rest out, else some
      items are repeated.
    - `plan_sender`: tells the daemon each epoch's order before its first item; None tells nobody.
    - `read_ahead`: how many indices the DataLoader takes before their items are read (batches in flight times their size).

    Each iteration is the next epoch, from 0; `set_epoch` says which is next. `state_dict` and `load_state_dict` resume in the
    middle of an epoch, with the same world or another, which goes on in the same global order. They count what was *taken*:
    exact in torchdata's StatefulDataLoader, which keeps the state of each batch until it hands it out, and in our
    PlannedDataLoader; torch's own DataLoader takes batches ahead and does not say how many it has handed out.

    Raises SettingsError for a rank outside the world, a negative or huge seed, indices that are none, and nothing to shuffle.
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
        self.rank, self.world = _place(rank, world)
        self._manifest = plan_sender.manifest if plan_sender is not None else None
        self._indices = self._checked(indices, len(self._manifest) if self._manifest is not None else 2**32)
        self._plan_sender = plan_sender
        self._read_ahead = read_ahead
        if not 0 <= seed <= LARGEST:
            raise SettingsError(f"seed must be between 0 and {LARGEST}, not {seed}")
        if replacement and not shuffle:
            raise SettingsError("replacement=True draws at random: leave shuffle=True")
        self._epoch = self._start = self._position = 0
        self._is_waiting, self._is_wanted, self._is_resumed = True, False, False

    def __len__(self) -> int:
        """The length of a whole epoch's share."""
        return self._length(0)

    @property
    def kind(self) -> str:
        """How an epoch's order is made, in the words of `order.plan_order`."""
        return "endless" if self.replacement else "shuffled" if self.shuffle else "listed"

    @property
    def is_waiting(self) -> bool:
        """Whether the epoch and position at hand are those of the next iteration; False once it has begun."""
        return self._is_waiting

    @property
    def position(self) -> int:
        """How many items of the epoch's share have been taken."""
        return self._position

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the epoch at hand has been taken, in this run or in one that it resumes."""
        return self._start == self._position == 0

    @property
    def indices(self) -> Indices:
        """What is yielded, in the order in which it was given."""
        return self._indices

    @property
    def left(self) -> int:
        """How many items the epoch at hand still has for this rank."""
        return self._length(self._start) - self._position

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be that of this epoch; one that a loaded state is in the middle of goes on from there."""
        if not 0 <= epoch <= LARGEST:
            raise SettingsError(f"epoch must be between 0 and {LARGEST}, not {epoch}")
        if not self._is_waiting or epoch != self._epoch:
            self._go_to(int(epoch))
        self._is_wanted = True

    def go_by(self, manifest: Manifest, indices: Sequence[int] | NDArray[Any] | torch.Tensor) -> None:
        """Yield these indices of another manifest from the next iteration on; the epoch and the position stay.

        Raises SettingsError where they are none of its items, or none at all where there is something to shuffle.
        """
        self._indices = self._checked(indices, len(manifest))
        self._manifest = manifest
        if self._plan_sender is not None:
            self._plan_sender.go_by(manifest)

    def order(self, epoch: int) -> Indices:
        """The whole order of an epoch for this rank."""
        return self._share(epoch, 0).order()

    def __iter__(self) -> Iterator[int]:
        if not self._is_waiting:
            self._go_to(self._epoch + 1)
        elif self.left == 0 and not self._is_wanted:
            # A state taken at an epoch's very end was loaded. The iteration that resumes it yields nothing; but DataLoaders
            # make iterators that they never use, and who asks for another one wants the next epoch.
            if self._is_resumed:
                self._go_to(self._epoch + 1)
            self._is_resumed = True
        return self._yield()

    def state_dict(self, *, position: int | None = None) -> dict[str, Any]:
        """Where in which epoch of which order this is; the same on every rank.

        `position` says how many of this rank's share have been read, where that is not all that was taken.
        """
        taken = self._position if position is None else position
        return {
            "data_root": self._manifest.data_root.uri if self._manifest is not None else "",
            "manifest": self._manifest.digest if self._manifest is not None else "",
            "ids": self._manifest.ids.digest if self._manifest is not None else "",
            "items": order_digest(self._indices),
            "kind": self.kind,
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._start + taken * self.world,  # in the global order
            "start": self._start,
            "world": self.world,
            "drop_last": self.drop_last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration go on where a state was taken, by this rank's share of what was left then.

        The order depends on the items' ids alone, so a state of an earlier listing with the same ids is as good. One of which
        nothing has been read yet begins its epoch, whatever the data root holds by now. Raises ManifestError where the state
        is that of other items, SettingsError where it is of another order or none.
        """
        own = self.state_dict()
        for field, value in own.items():
            if type(state.get(field)) is not type(value):
                raise SettingsError(f"checkpoint: field {field!r} is missing or no {type(value).__name__}: no PlannedSampler's")
        self._check_same(own, state)
        epoch, position, start, world = (int(state[field]) for field in ("epoch", "position", "start", "world"))
        items = len(self._indices)
        possible = 0 <= epoch <= LARGEST and 0 <= start <= position < items + world and world > 0 and start <= items
        if not possible:  # what is repeated at an epoch's end counts as read, too
            raise SettingsError(f"checkpoint: field 'position': {position} of {items} items, from {start} on, cannot be")
        self._go_to(epoch)
        if world == self.world and state["drop_last"] == self.drop_last:
            # The very same shares, also in what is repeated at their ends.
            self._start, self._position = start, min((position - start) // world, self._length(start))
        else:
            self._start = min(position, items)

    def turn(self) -> bool:
        """Turn to the epoch of the next iteration; False where a resumed one has nothing left: that was its iteration then."""
        if not self._is_waiting:
            self._go_to(self._epoch + 1)
        elif self.left == 0:
            self._is_waiting = False
        return self._is_waiting

    def _yield(self) -> Iterator[int]:
        # A generator: an epoch begins when its first index is taken. DataLoader makes iterators that it never uses.
        if not self._is_waiting:
            self._go_to(self._epoch + 1)
        self._is_waiting = False
        share = self._share(self._epoch, self._start)
        order, begun, sender = share.order(), self._position, self._plan_sender
        if sender is not None and begun < len(order):
            # A listed share is sent as it is: the ranks need not know each other's.
            sender.begin(share if self.shuffle else Share("listed", 0, share.epoch, order), order, begun)
        for first in range(begun, len(order), YIELDED_AT_ONCE):
            for position, index in enumerate(order[first : first + YIELDED_AT_ONCE].tolist(), first):
                if sender is not None:
                    sender.keep_told(max(position - self._read_ahead, begun))
                self._position = position + 1
                yield index

    def _checked(self, indices: Sequence[int] | NDArray[Any] | torch.Tensor, items: int) -> Indices:
        given = np.asarray(indices)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise SettingsError(f"indices must be a sequence of integers, not {given.ndim}-dimensional {given.dtype}")
        if given.size and not 0 <= int(given.min()) <= int(given.max()) < items:
            worst = int(given.min()) if given.min() < 0 else int(given.max())
            raise SettingsError(f"indices must be between 0 and {items - 1}, the items of the manifest; one is {worst}")
        if self.shuffle and not given.size:
            raise SettingsError("indices must hold at least one item to shuffle or draw from")
        return given.astype(np.uint32)

    def _length(self, start: int) -> int:
        return share_length(len(self._indices) - start, self.world, self.drop_last)

    def _share(self, epoch: int, start: int) -> Share:
        return Share(self.kind, self.seed, epoch, self._indices, self.rank, self.world, self.drop_last, start)

    def _go_to(self, epoch: int) -> None:
        """Have the next iteration be that of this epoch, from its beginning."""
        self._epoch, self._start, self._position = epoch, 0, 0
        self._is_waiting, self._is_wanted, self._is_resumed = True, False, False

    def _check_same(self, own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        is_listed = bool(own["manifest"] and state["manifest"])
        if is_listed and own["data_root"] != state["data_root"]:
            raise ManifestError(
                f"checkpoint: field 'data_root': it is of {state['data_root']}, and this sampler is of {own['data_root']};"
                " use the data root that it was made with, or begin the epoch anew with set_epoch"
            )
        # The order depends on the ids alone: objects that have changed since are no reason to refuse it.
        is_other = is_listed and own["ids"] != state["ids"]
        if is_other and state["position"] != 0:  # an epoch of which nothing was read begins with what there is now
            raise ManifestError(
                f"checkpoint: field 'ids': it is of the items of the listing {state['manifest']}, and those of"
                f" {own['manifest']} are others: the data root has changed since, and that listing is not at hand; begin"
                " the epoch anew with set_epoch"
            )
        if not is_other and own["items"] != state["items"]:
            raise ManifestError(
                "checkpoint: field 'items': it is of other indices; use the data root and the split that it was made with,"
                " or begin the epoch anew with set_epoch"
            )
        for field in ("kind", "seed"):
            if own[field] != state[field]:
                raise SettingsError(
                    f"checkpoint: field {field!r}: it was made with {state[field]!r}, and this sampler has {own[field]!r};"
                    " make the sampler as it was, or begin the epoch anew with set_epoch"
                )


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    """This process's rank and how many there are: as given, else torch.distributed's, else the only one."""
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
