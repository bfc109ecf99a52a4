"""One reader: its stream, the plan that it registered with, and what became of its reads. Pure."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from gcs_prefetchd.planning.item_numbers import NumberedManifest
from gcs_prefetchd.planning.next_use import CachedItems
from gcs_prefetchd.planning.packed_indices import PackedIndices
from gcs_prefetchd.planning.stream import NEVER, Epoch, Stream
from gcs_prefetchd.shared.epoch_order import Indices, order_digest, plan_order
from gcs_prefetchd.shared.errors import ProtocolError
from gcs_prefetchd.shared.messages import Plan
from gcs_prefetchd.shared.moving_average import MovingDuration

__all__ = ["PreparedPlan", "Reader", "prepare_plan"]


@dataclass(frozen=True, slots=True)
class PreparedPlan:
    """A valid plan with its epoch's order in item numbers. Made in a thread."""

    plan: Plan
    indices: PackedIndices | None
    numbered: NumberedManifest
    epoch: Epoch


@dataclass(slots=True, eq=False)
class Reader:
    """A reader of one data root, whose cached items are `cached`.

    The orders of its next epochs are computed from `indices`; None if these are unknown. `missing_at_epoch_start` counts the
    items of its epoch that were not cached when it started, `prefetched_items` those that were prefetched for it since,
    `demanded_objects` the objects that it waited for.
    """

    data_root: str
    stream: Stream
    numbered: NumberedManifest
    plan: Plan
    indices: PackedIndices | None
    cached: CachedItems
    last_seen_s: float
    is_seeded: bool = False
    missing_at_epoch_start: int = 0
    prefetched_items: int = 0
    demanded_objects: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    report_gap_s: MovingDuration = field(default_factory=MovingDuration)

    @property
    def all_parts(self) -> int:
        """The bit set of all parts of an item."""
        return (1 << len(self.numbered.manifest.item_patterns.patterns)) - 1

    def is_item_ready(self, item: int) -> bool:
        """Whether every part of an item is cached."""
        return self.cached.parts_of(item) == self.all_parts

    def runway_items(self) -> int:
        """How many items from the next one on are ready without a gap, as far as prefetching has planned."""
        return self.stream.runway_items(self.cached.parts == self.all_parts)

    def count_missing(self) -> None:
        """Count the unread items of the epoch that are not ready, each once however often it occurs."""
        is_missing = (self.stream.next_places != NEVER) & (self.cached.parts != self.all_parts)
        self.missing_at_epoch_start = int(np.count_nonzero(is_missing))

    def prepare_next_epoch(self) -> Epoch | None:
        """Compute the order of the next epoch; None if the plan does not determine it. Takes a while: run it in a thread."""
        if self.indices is None:
            return None
        number, plan, indices = self.stream.epoch.number + 1, self.plan, self.indices.unpack()
        order = plan_order(
            plan.kind, plan.seed, number, indices, rank=plan.rank, world=plan.world, drop_last=bool(plan.drop_last)
        )
        return Epoch.from_order(number, self.numbered.numbers_of(order), len(self.stream.next_places))


def prepare_plan(plan: Plan, indices: Indices, numbered: NumberedManifest, items: int) -> PreparedPlan:
    """Compute a plan's order; raises ProtocolError, which names the field, if the plan is invalid."""
    if len(indices) and int(indices.max()) >= len(numbered.manifest):
        raise ProtocolError(
            f"Plan: field 'indices': index {int(indices.max())} is beyond the {len(numbered.manifest)} items of the manifest"
        )
    if not len(indices):
        raise ProtocolError("Plan: field 'indices' is empty; a plan needs at least one item")
    order = plan_order(
        plan.kind,
        plan.seed,
        plan.epoch,
        indices,
        rank=plan.rank,
        world=plan.world,
        drop_last=bool(plan.drop_last),
        start=plan.start,
    )
    if plan.position > len(order):
        raise ProtocolError(f"Plan: field 'position': {plan.position} is beyond the plan's {len(order)} items")
    if order_digest(order) != plan.digest:
        raise ProtocolError("Plan: field 'digest' does not match the order; are reader and daemon of the same version?")
    epoch = Epoch.from_order(plan.epoch, numbered.numbers_of(order).astype(np.uint32), items, plan.position)
    return PreparedPlan(plan, _indices_to_keep(plan.kind, indices), numbered, epoch)


def _indices_to_keep(kind: str, indices: Indices) -> PackedIndices | None:
    # A shuffled order does not depend on the order of its indices; sorted ones take less memory.
    return None if kind == "listed" else PackedIndices(np.sort(indices) if kind == "shuffled" else indices)
