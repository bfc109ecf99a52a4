"""Seeded orders: the same on every machine, in every process and with every version of numpy.

Based on a keyed hash instead of a library's shuffle, whose results change between releases. The mixing function is splitmix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["Indices", "endless_order", "epoch_order", "order_digest", "plan_order", "share_length"]

Indices = NDArray[np.uint32]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = 0xFFFF_FFFF_FFFF_FFFF
_UPPER = np.uint64(0xFFFF_FFFF_0000_0000)
_BATCH = 1 << 15  # numbers hashed at once, so that they stay in the processor's cache


def plan_order(
    kind: str,
    seed: int,
    epoch: int,
    indices: Indices,
    *,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
    start: int = 0,
) -> Indices:
    """What the stream `rank` of `world` reads in an epoch. Readers and the daemon both call this, so that they agree.

    Of the epoch's global order, from `start` on, every `world`-th item from `rank`:

    - "shuffled": `epoch_order` of the indices;
    - "endless": the epoch's block of the endless stream, as many draws from the indices as there are of them;
    - "listed": the indices as they are.

    All ranks get the same number of items, as with torch's DistributedSampler: `drop_last` omits the remainder; without it the
    first items after `start` are repeated. A job that resumes with another world passes as `start` the position where the old
    one stopped, and continues the same global order.
    """
    order = _global_order(kind, seed, epoch, indices)[start:]
    share = order[rank::world]
    length = share_length(len(order), world, drop_last)
    if len(share) < length:  # at most by one: rank and world differ by less than a round
        share = np.append(share, order[(rank + (length - 1) * world) % len(order)])
    # A copy if it is only a part: a view would keep the complete order in memory.
    return share if len(share) == length == len(indices) else share[:length].copy()


def share_length(items: int, world: int, drop_last: bool) -> int:
    """The number of items for each of `world` ranks."""
    return items // world if drop_last else -(-items // world)


def epoch_order(seed: int, epoch: int, indices: Indices) -> Indices:
    """The items `indices` in the order of one epoch: each once, shuffled by (seed, epoch).

    Sorted by the upper 32 bits of their hash, then by index. So an item's rank in the order depends on its own index alone, and
    the order of a subset (the training side of a split) is the order of all items without the others: prefetching the complete
    data root serves every subset of it.
    """
    key = _key(seed, epoch)
    # Hash and index in one word are sorted in place and need no lookup afterwards: half of an argsort's memory and time.
    packed = np.empty(len(indices), dtype=np.uint64)
    for first in range(0, len(indices), _BATCH):
        values = indices[first : first + _BATCH].astype(np.uint64)
        packed[first : first + _BATCH] = (_hash(key, values) & _UPPER) | values
    packed.sort()
    return packed.astype(np.uint32)  # the lower 32 bits


def endless_order(seed: int, start: int, count: int, items: int) -> Indices:
    """Positions `start` to `start + count` of the endless stream that draws from `items` items with replacement."""
    key = _key(seed, 0)
    drawn = np.empty(count, dtype=np.uint32)
    for first in range(0, count, _BATCH):
        positions = np.arange(first, min(first + _BATCH, count), dtype=np.uint64)
        positions += np.uint64(start & _MASK)
        drawn[first : first + _BATCH] = _hash(key, positions) % np.uint64(items)
    return drawn


def order_digest(order: Indices) -> str:
    """16 hexadecimal digits that identify an order."""
    return hashlib.blake2b(np.ascontiguousarray(order, dtype="<u4").data, digest_size=8).hexdigest()


def _global_order(kind: str, seed: int, epoch: int, indices: Indices) -> Indices:
    if kind == "listed":
        return indices
    if kind == "shuffled":
        return epoch_order(seed, epoch, indices)
    if kind == "endless":
        items = len(indices)
        return indices[endless_order(seed, epoch * items, items, items)]
    raise ValueError(f"kind must be 'listed', 'shuffled' or 'endless', not {kind!r}")


def _key(seed: int, epoch: int) -> np.uint64:
    seeded = _mix(np.array([seed & _MASK], dtype=np.uint64))
    return np.uint64(_mix(seeded ^ np.array([epoch & _MASK], dtype=np.uint64))[0])


def _hash(key: np.uint64, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return _mix(values ^ key)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = values + _GOLDEN
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MIX_2
    mixed ^= mixed >> np.uint64(31)
    return mixed
