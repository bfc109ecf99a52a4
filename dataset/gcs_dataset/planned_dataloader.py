"""The DataLoader over a PlannedSampler that knows what it has handed out."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset

from gcs_dataset.planned_sampler import PlannedSampler
from gcs_dataset.relisting import Relisting

__all__ = ["PlannedDataLoader"]


class PlannedDataLoader(DataLoader[Any]):
    """torch's DataLoader over a PlannedSampler, whose `state_dict` says how much has been handed out.

    Not how much the workers have been given, which is batches more. Taken while a batch is being used, the state counts that
    batch as read; taken after an epoch, it is that of the next one's beginning. Each rank's state is the same, and any of them
    resumes any number of ranks. `batch_sampler` and `shuffle` are not for it; everything else is as in DataLoader.

    With a `relisting` of its dataset and sampler, each epoch begins with the daemon's newest listing of the data root, for
    which workers that live on are started anew, and its length may be another one. A state may then be of an earlier listing.
    Without one the items and their generations stay what they are.
    """

    sampler: PlannedSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        *,
        sampler: PlannedSampler,
        relisting: Relisting | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(dataset, batch_size, sampler=cast(Any, sampler), **settings)
        self._read = 0  # of the sampler's share of the epoch
        self._is_ended = False
        self._relisting = relisting
        self._workers_manifest = relisting.manifest if relisting is not None else None

    def __iter__(self) -> Any:
        """An iterator over the next epoch's batches, or what is left of the one that a loaded state is in."""
        planned, self._is_ended = self.sampler, False
        if not planned.turn():
            self._is_ended = True
            return iter(())
        if self._relisting is not None:
            self._relist(self._relisting)
        self._read = planned.position
        return self._counted(super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be that of this epoch, as the sampler's does."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where training is, as PlannedSampler's: each can load the other's."""
        if self.sampler.is_waiting:
            return self.sampler.state_dict()
        state = self.sampler.state_dict(position=self._read)
        return {**state, "epoch": state["epoch"] + 1, "start": 0, "position": 0} if self._is_ended else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration go on where a state was taken; raises as PlannedSampler's does.

        With a `relisting`, what is left of an epoch is read by the listing that the epoch began with, where its items are
        others by now and the cache directory still has it.
        """
        (self._relisting or self.sampler).load_state_dict(state)

    def _relist(self, relisting: Relisting) -> None:
        if self.sampler.is_whole:
            relisting.take_newest()
        if relisting.manifest is not self._workers_manifest:
            # Workers have the dataset as it was when they were started. DataLoader starts new ones where it has none.
            self._iterator, self._workers_manifest = None, relisting.manifest

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            share = self.sampler.position + self.sampler.left
            self._read = min(self._read + (self.batch_size or 1), share)
            yield batch
        self._is_ended = True
