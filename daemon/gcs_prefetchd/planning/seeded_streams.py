"""The seeded stream of each data root: the order in which its items are prefetched before any reader sends a plan. Pure."""

import numpy as np

from gcs_prefetchd.planning.catalog import Catalog
from gcs_prefetchd.planning.packed_indices import PackedIndices
from gcs_prefetchd.planning.reader import PreparedPlan
from gcs_prefetchd.planning.stream import Epoch
from gcs_prefetchd.shared.epoch_order import plan_order
from gcs_prefetchd.shared.messages import Plan

__all__ = ["SeededStreams", "seeded_stream_id"]


class SeededStreams:
    """Knows which seeded streams are due to start an epoch, and prepares their plans.

    To compute an order takes a while, so the caller does it in a thread: `pop_due`, then `prepare`, then
    `Registry.start_seeded`.
    """

    def __init__(self, seed: int, catalog: Catalog) -> None:
        self._seed = seed
        self._catalog = catalog
        self._due: dict[str, int] = {}  # the number of the epoch to start, by data root

    def is_due(self, data_root: str) -> bool:
        """Whether a data root's seeded stream is due to start an epoch."""
        return data_root in self._due

    def mark_due(self, data_root: str, epoch: int) -> None:
        """A data root's seeded stream is to start an epoch."""
        self._due[data_root] = epoch

    def cancel_due(self, data_root: str) -> None:
        """A reader has replaced a data root's seeded stream."""
        self._due.pop(data_root, None)

    def pop_due(self) -> list[tuple[str, int]]:
        """The data roots whose seeded stream is due, and the epochs to start; each is returned once."""
        due = list(self._due.items())
        self._due.clear()
        return due

    def prepare(self, data_root: str, epoch: int) -> PreparedPlan:
        """Compute an epoch of a seeded stream, for `Registry.start_seeded`. Takes a while: run it in a thread."""
        history = self._catalog.history(data_root)
        numbered = history.newest
        plan = Plan(
            job="", stream=seeded_stream_id(data_root), data_root=data_root, manifest=numbered.manifest.digest,
            kind="shuffled", seed=self._seed, epoch=epoch, position=0, rank=0, world=1, drop_last=0, start=0, digest="",
        )  # fmt: skip
        indices = np.arange(len(numbered.manifest), dtype=np.uint32)
        order = numbered.numbers_of(plan_order(plan.kind, plan.seed, epoch, indices))
        return PreparedPlan(plan, PackedIndices(indices), numbered, Epoch.from_order(epoch, order, history.end))


def seeded_stream_id(data_root: str) -> str:
    """The id of a data root's seeded stream."""
    return f"seeded {data_root}"
