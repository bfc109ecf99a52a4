"""Why a reader waited for an object that was not in the cache. Pure."""

from collections.abc import Mapping

from gcs_prefetchd.planning.item_refs import PartRef
from gcs_prefetchd.planning.next_use import CachedItems

__all__ = ["WAIT_REASONS", "wait_reason"]

# In this order: no plan names the object; its download had not finished; it was evicted although it was needed; prefetching
# had no free slot or no free space; the cached object is of another generation.
WAIT_REASONS = ("not_planned", "late", "evicted", "throttled", "changed")


def wait_reason(part: PartRef | None, cached: Mapping[str, CachedItems], *, is_blocked: bool, is_other_generation: bool) -> str:
    """The reason, one of `WAIT_REASONS`.

    `part` is the object as part of an item, `cached` the cached items of each data root. `is_blocked`: prefetching has no free
    slot or no free space. `is_other_generation`: the object is cached in another generation.
    """
    if is_other_generation:
        return "changed"
    if part is None or not cached[part.data_root].is_needed(part.item):
        return "not_planned"
    if cached[part.data_root].evicted_while_needed[part.item]:
        return "evicted"
    return "throttled" if is_blocked else "late"
