"""The state of a sampler as a checkpoint keeps it, and what it must have in common with the sampler that loads it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from gcs_dataset.epoch_position import Position
from gcs_prefetchd.shared.epoch_order import share_length
from gcs_prefetchd.shared.errors import ManifestError, PrefetchdError, SettingsError

__all__ = ["COMPARISONS", "LARGEST_EPOCH", "Checkpoint", "Comparison", "check_comparable", "resumed_position"]

LARGEST_EPOCH = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How much of which epoch of which order has been read. The same on every rank."""

    data_root: str  # empty without a manifest, as are the next two
    manifest: str  # digest of the listing
    ids: str  # digest of the ids of the listing's items
    items: str  # digest of the indices that the sampler yields
    kind: str  # of order, as in `epoch_order.plan_order`
    seed: int
    epoch: int
    position: int  # in the epoch's global order
    start: int  # where in the global order the shares of the `world` ranks start
    world: int
    drop_last: bool

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The checkpoint that a `state_dict` holds; raises SettingsError if a field is missing or has another type."""
        for field in fields(cls):
            if type(state.get(field.name)) is not field.type:
                kind = getattr(field.type, "__name__", field.type)
                raise SettingsError(
                    f"checkpoint: field {field.name!r} is missing or not of type {kind}: not the state of a PlannedSampler"
                )
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    def to_state(self) -> dict[str, Any]:
        """Plain data, for `state_dict`."""
        return asdict(self)

    @property
    def is_at_epoch_start(self) -> bool:
        """Whether nothing of its epoch has been read. Such an epoch starts with the items that the data root has by then."""
        return self.position == 0

    def at_next_epoch(self) -> Self:
        """The start of the epoch after this one."""
        return replace(self, epoch=self.epoch + 1, start=0, position=0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A field in which a saved checkpoint must equal a sampler's own, unless it does not apply to the two.

    `reason` and `advice` explain what is wrong and what to do; in `reason`, `{saved}` and `{own}` are the two checkpoints.
    """

    field: str
    applies: Callable[[Checkpoint, Checkpoint], bool]
    error: type[PrefetchdError]
    reason: str
    advice: str

    def check(self, saved: Checkpoint, own: Checkpoint) -> None:
        """Raise `error` if the field applies and differs."""
        if self.applies(saved, own) and getattr(saved, self.field) != getattr(own, self.field):
            advice = f"{self.advice}, or " if self.advice else ""
            reason = self.reason.format(saved=saved, own=own)
            raise self.error(f"checkpoint: field {self.field!r}: {reason}; {advice}restart the epoch with set_epoch")


def _always(saved: Checkpoint, own: Checkpoint) -> bool:
    return True


def _both_have_a_listing(saved: Checkpoint, own: Checkpoint) -> bool:
    return bool(saved.manifest and own.manifest)


def _is_mid_epoch_with_a_listing(saved: Checkpoint, own: Checkpoint) -> bool:
    return _both_have_a_listing(saved, own) and not saved.is_at_epoch_start


def _have_the_same_ids(saved: Checkpoint, own: Checkpoint) -> bool:
    return not _both_have_a_listing(saved, own) or saved.ids == own.ids


# In the order in which they are checked. `manifest` is not compared: the order depends on the items' ids alone, so objects
# that changed since are no reason to refuse. `epoch`, `position`, `start`, `world`, `drop_last`: `resumed_position`.
COMPARISONS = (
    Comparison(
        "data_root",
        _both_have_a_listing,
        ManifestError,
        "it was saved for {saved.data_root}, but this sampler reads {own.data_root}",
        "use the data root that it was saved for",
    ),
    Comparison(
        "ids",
        _is_mid_epoch_with_a_listing,
        ManifestError,
        "it was saved for the items of listing {saved.manifest}, which differ from those of {own.manifest}: the data root has"
        " changed since, and the earlier listing is not available",
        "",
    ),
    Comparison(
        "items",
        _have_the_same_ids,
        ManifestError,
        "it was saved for other indices",
        "use the data root and the split that it was saved for",
    ),
    Comparison(
        "kind",
        _always,
        SettingsError,
        "it was saved with {saved.kind!r}, but this sampler has {own.kind!r}",
        "create the sampler as it was",
    ),
    Comparison(
        "seed",
        _always,
        SettingsError,
        "it was saved with {saved.seed}, but this sampler has {own.seed}",
        "create the sampler as it was",
    ),
)


def check_comparable(saved: Checkpoint, own: Checkpoint) -> None:
    """Raise the error of the first comparison that fails."""
    for comparison in COMPARISONS:
        comparison.check(saved, own)


def resumed_position(saved: Checkpoint, own: Checkpoint, items: int) -> Position:
    """Where a sampler of `items` items whose state is `own` continues from a saved checkpoint.

    Raises SettingsError if the saved numbers contradict each other.
    """
    is_possible = 0 <= saved.epoch <= LARGEST_EPOCH and saved.world > 0 and 0 <= saved.start <= items
    # Items that are repeated at an epoch's end count as read, too.
    if not is_possible or not saved.start <= saved.position < items + saved.world:
        numbers = f"{saved.position} of {items} items, starting at {saved.start}, epoch {saved.epoch}, world {saved.world}"
        raise SettingsError(f"checkpoint: field 'position': {numbers}: not a valid position")
    if (saved.world, saved.drop_last) != (own.world, own.drop_last):
        return Position(saved.epoch, start=min(saved.position, items))
    # The very same shares, including what is repeated at their ends.
    length = share_length(items - saved.start, saved.world, saved.drop_last)
    return Position(saved.epoch, saved.start, min((saved.position - saved.start) // saved.world, length))
