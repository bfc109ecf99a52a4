"""Seeded orders: the same on every machine, in every process and with every version of numpy.

A keyed hash and no library's shuffle, whose results change between releases. The mixing function is splitmix64 (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["Indices", "endless", "epoch_order", "order_digest"]

Indices = NDArray[np.uint32]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def epoch_order(seed: int, epoch: int, indices: Indices) -> Indices:
    """The items `indices` in the order of one epoch: each once, shuffled by (seed, epoch).

    An item's place depends on its own index alone, so the order of a subset (the training side of a split) is the order of
    the whole with the others left out: who prefetches the whole data root serves every subset of it.
    """
    keys = _hash(_key(seed, epoch), indices.astype(np.uint64))
    return indices[np.argsort(keys, kind="stable")]


def endless(seed: int, start: int, count: int, items: int) -> Indices:
    """Positions `start` to `start + count` of the endless stream that draws from `items` items with replacement."""
    positions = np.arange(start, start + count, dtype=np.uint64)
    return (_hash(_key(seed, 0), positions) % np.uint64(items)).astype(np.uint32)


def order_digest(order: Indices) -> str:
    """16 hexadecimal digits that tell two orders apart."""
    return hashlib.blake2b(np.ascontiguousarray(order, dtype="<u4").tobytes(), digest_size=8).hexdigest()


def _key(seed: int, epoch: int) -> np.uint64:
    mask = 0xFFFF_FFFF_FFFF_FFFF
    seeded = _mix(np.array([seed & mask], dtype=np.uint64))
    return np.uint64(_mix(seeded ^ np.array([epoch & mask], dtype=np.uint64))[0])


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
