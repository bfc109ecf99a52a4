"""The DataLoader over a PlannedSampler that knows which batches it has returned."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset

from gcs_dataset.planned_sampler import PlannedSampler
from gcs_dataset.relisting import Relisting

__all__ = ["PlannedDataLoader"]


class PlannedDataLoader(DataLoader[Any]):
    """torch's DataLoader over a PlannedSampler, with a `state_dict` that counts the batches that were returned.

    It does not count what the workers have been given, which is batches more. A state saved while a batch is being used counts
    that batch as read; one saved after an epoch is that of the next epoch's start. Each rank's state is the same, and any of
    them resumes any number of ranks. `batch_sampler` and `shuffle` are not accepted; everything else is as in DataLoader.

    With a `relisting` of its dataset and sampler, each epoch starts with the daemon's newest listing of the data root.
    Persistent workers are restarted for a new listing, and the epoch's length may change. A state may then be of an earlier
    listing. Without a `relisting` the items and their generations never change.
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
        self._read = 0  # items of the sampler's share of the epoch
        self._is_finished = False
        self._relisting = relisting
        self._workers_manifest = relisting.manifest if relisting is not None else None

    def __iter__(self) -> Any:
        """An iterator over the next epoch's batches, or over what is left of the epoch that a loaded state is in."""
        self._is_finished = False
        if not self.sampler.prepare_iteration():
            self._is_finished = True
            return iter(())
        if self._relisting is not None:
            self._update_listing(self._relisting)
        self._read = self.sampler.taken
        return self._counted(super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        """Make this epoch the next iteration's, as the sampler's `set_epoch` does."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where training is. In PlannedSampler's form: each can load the other's."""
        if not self.sampler.has_started:
            return self.sampler.state_dict()
        checkpoint = self.sampler.checkpoint(self._read)
        return (checkpoint.at_next_epoch() if self._is_finished else checkpoint).to_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue where a state was saved; raises as PlannedSampler's does.

        With a `relisting`: if the data root has other items by now, the rest of the epoch is read from the listing that it
        started with, as long as the cache directory still has that listing.
        """
        (self._relisting or self.sampler).load_state_dict(state)

    def _update_listing(self, relisting: Relisting) -> None:
        if self.sampler.is_at_epoch_start:
            relisting.use_newest_listing()
        if relisting.manifest is not self._workers_manifest:
            # Workers have the dataset as it was when they started. DataLoader starts new ones if it has no iterator.
            self._iterator, self._workers_manifest = None, relisting.manifest

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            share = self.sampler.taken + self.sampler.remaining
            self._read = min(self._read + (self.batch_size or 1), share)
            yield batch
        self._is_finished = True
