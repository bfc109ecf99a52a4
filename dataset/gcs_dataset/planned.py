"""The DataLoader over a PlannedSampler that knows what it has handed out."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset

from gcs_dataset.sampler import PlannedSampler

__all__ = ["PlannedDataLoader"]


class PlannedDataLoader(DataLoader[Any]):
    """torch's DataLoader over a PlannedSampler, whose `state_dict` says how much has been handed out.

    Not how much the workers have been given, which is batches more. Taken while a batch is being used, the state counts that
    batch as read; taken after an epoch, it is that of the next one's beginning. Each rank's state is the same, and any of them
    resumes any number of ranks. `batch_sampler` and `shuffle` are not for it; everything else is as in DataLoader.
    """

    sampler: PlannedSampler

    def __init__(self, dataset: Dataset[Any], batch_size: int | None = 1, *, sampler: PlannedSampler, **settings: Any) -> None:
        super().__init__(dataset, batch_size, sampler=cast(Any, sampler), **settings)
        self._read = 0  # of the sampler's share of the epoch
        self._is_ended = False

    def __iter__(self) -> Any:
        """An iterator over the next epoch's batches, or what is left of the one that a loaded state is in."""
        planned, self._is_ended = self.sampler, False
        if not planned.turn():
            self._is_ended = True
            return iter(())
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
        """Have the next iteration go on where a state was taken; raises as PlannedSampler's does."""
        self.sampler.load_state_dict(state)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            share = self.sampler.position + self.sampler.left
            self._read = min(self._read + (self.batch_size or 1), share)
            yield batch
        self._is_ended = True
