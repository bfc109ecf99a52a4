"""One reader's stream with what it was registered by, so that its next epochs can be told, and what became of it. Pure."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from gcs_prefetchd.planning.item_numbers import Listing
from gcs_prefetchd.planning.packed_indices import Packed
from gcs_prefetchd.planning.stream import Epoch, Stream
from gcs_prefetchd.shared.epoch_order import Indices, order_digest, plan_order
from gcs_prefetchd.shared.errors import ProtocolError
from gcs_prefetchd.shared.messages import Plan
from gcs_prefetchd.shared.moving_average import Spread

__all__ = ["WAIT_REASONS", "Prepared", "Reader", "prepare", "prepare_seeded", "seeded_id"]

# Why a reader had to wait for an item: no plan named it; its download had not ended; it had been dropped although it was
# needed; prefetching had no slot or no room; the object is another generation than the one that was here.
WAIT_REASONS = ("not_planned", "late", "evicted", "throttled", "changed")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan that has been found possible, with its epoch's order in numbers. Made in a thread."""

    plan: Plan
    indices: Packed | None
    listing: Listing
    epoch: Epoch


@dataclass(slots=True, eq=False)
class Reader:
    """A stream on the node.

    `indices` are what its next epochs' orders come from, None where nothing tells those. `missing_at_epoch_start` is how
    many items of its epoch were not in the cache when it started. Since then, `prefetched_items` were prefetched for it, and it
    waited for `demanded_objects`.
    """

    key: str
    stream: Stream
    listing: Listing
    plan: Plan
    indices: Packed | None
    last_seen_s: float
    seeded: bool = False
    missing_at_epoch_start: int = 0
    prefetched_items: int = 0
    demanded_objects: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    report_gap_s: Spread = field(default_factory=Spread)

    @property
    def every_part(self) -> int:
        """All parts of an item, a bit each."""
        return (1 << len(self.listing.manifest.layout.patterns)) - 1

    def next_epoch(self) -> Epoch | None:
        """The order of the epoch after this one, where the plan tells it. Takes a while: for a thread."""
        if self.indices is None:
            return None
        number, plan, indices = self.stream.current.number + 1, self.plan, self.indices.unpack()
        order = plan_order(
            plan.kind, plan.seed, number, indices, rank=plan.rank, world=plan.world, drop_last=bool(plan.drop_last)
        )
        return Epoch.of(number, self.listing.numbers_of(order), len(self.stream.place))


def prepare(plan: Plan, indices: Indices, listing: Listing, items: int) -> Prepared:
    """Work out a plan's order; raises ProtocolError, naming the field, where that cannot be."""
    if len(indices) and int(indices.max()) >= len(listing.manifest):
        raise ProtocolError(
            f"Plan: field 'indices': index {int(indices.max())} is beyond the {len(listing.manifest)} items of the manifest"
        )
    if not len(indices):
        raise ProtocolError("Plan: field 'indices': no item at all; what is there to read?")
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
        raise ProtocolError("Plan: field 'digest' is not that of the order; are reader and daemon of one version?")
    epoch = Epoch.of(plan.epoch, listing.numbers_of(order).astype(np.uint32), items, plan.position)
    return Prepared(plan, _to_keep(plan.kind, indices), listing, epoch)


def prepare_seeded(data_root: str, seed: int, number: int, listing: Listing, items: int) -> Prepared:
    """Work out an epoch of a data root's seeded stream. Takes a while: for a thread."""
    plan = Plan(
        job="", stream=seeded_id(data_root), data_root=data_root, manifest=listing.manifest.digest, kind="shuffled", seed=seed,
        epoch=number, position=0, rank=0, world=1, drop_last=0, start=0, digest="",
    )  # fmt: skip
    indices = np.arange(len(listing.manifest), dtype=np.uint32)
    order = plan_order(plan.kind, seed, number, indices)
    return Prepared(plan, Packed(indices), listing, Epoch.of(number, listing.numbers_of(order), items))


def seeded_id(data_root: str) -> str:
    """The stream that stands for the data root's readers before one has sent its plan."""
    return f"seeded {data_root}"


def _to_keep(kind: str, indices: Indices) -> Packed | None:
    # Shuffled, they come in the same order however they are sorted.
    return None if kind == "listed" else Packed(np.sort(indices) if kind == "shuffled" else indices)
