"""The sampler whose order is known in advance: by the daemon, which prefetches along it, and by anyone with the seed."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from gcs_dataset.plans import PlanSender
from gcs_prefetchd.order import Indices, epoch_order

__all__ = ["PlannedSampler"]


class PlannedSampler(Sampler[int]):
    """Yields dataset indices in an order that depends on `seed` and the epoch alone, with and without a daemon.

    - `indices`: what to yield (1-d, of the manifest's items): a side of a split, for example.
    - `shuffle=False`: yields them as they are given.
    - `plan_sender`: tells the daemon each epoch's order before its first item; None tells nobody.
    - `read_ahead`: how many indices the DataLoader takes before their items are read (batches in flight times their size).

    Each iteration is the next epoch, from 0; `set_epoch` says which is next.
    """

    def __init__(
        self,
        indices: Sequence[int] | NDArray[Any] | torch.Tensor,
        *,
        seed: int = 0,
        shuffle: bool = True,
        plan_sender: PlanSender | None = None,
        read_ahead: int = 0,
    ) -> None:
        self.seed = seed
        self.shuffle = shuffle
        self._indices: Indices = np.asarray(indices, dtype=np.uint32)
        self._plan_sender = plan_sender
        self._read_ahead = read_ahead
        self._next_epoch = 0

    def __len__(self) -> int:
        return len(self._indices)

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be that of this epoch."""
        self._next_epoch = epoch

    def order(self, epoch: int) -> Indices:
        """The whole order of an epoch."""
        return epoch_order(self.seed, epoch, self._indices) if self.shuffle else self._indices

    def __iter__(self) -> Iterator[int]:
        # A generator: an epoch begins when its first index is taken. DataLoader makes iterators that it never uses.
        epoch = self._next_epoch
        self._next_epoch += 1
        order = self.order(epoch)
        if self._plan_sender is None:
            yield from order.tolist()
            return
        self._plan_sender.begin(epoch, order)
        for position, index in enumerate(order.tolist()):
            self._plan_sender.keep_told(max(position - self._read_ahead, 0))
            yield index
