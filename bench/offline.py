"""Exact offline references for caches that know the complete future or a bounded part of it; every item has size one."""

import heapq
from collections.abc import Sequence

__all__ = ["belady_hits", "endless_misses"]

FAR = 1 << 60


def belady_hits(reads: Sequence[int], capacity: int) -> int:
    """Hits of Belady's optimal replacement over the complete sequence, from an empty cache."""
    return len(reads) - _misses(reads, capacity, FAR, 0)


def endless_misses(reads: Sequence[int], capacity: int, lookahead: int, counted_from: int) -> int:
    """Misses from a position on if the item needed farthest in the future is evicted, with only `lookahead` known reads.

    Items that are not among them count as needed last, least recently used first.
    """
    return _misses(reads, capacity, lookahead, counted_from)


def _misses(reads: Sequence[int], capacity: int, lookahead: int, counted_from: int) -> int:
    next_use = [FAR] * len(reads)
    last: dict[int, int] = {}
    for position in range(len(reads) - 1, -1, -1):
        next_use[position] = last.get(reads[position], FAR)
        last[reads[position]] = position
    cached: dict[int, tuple[int, int]] = {}  # item: next use, last use
    heap: list[tuple[int, int, int]] = []
    misses = 0
    for position, item in enumerate(reads):
        if item not in cached:
            misses += position >= counted_from
            if len(cached) >= capacity:
                _evict(cached, heap, position, lookahead)
        cached[item] = (next_use[position], position)
        heapq.heappush(heap, (-next_use[position], position, item))
    return misses


def _evict(cached: dict[int, tuple[int, int]], heap: list[tuple[int, int, int]], now: int, lookahead: int) -> None:
    unknown = [(used, item) for item, (needed, used) in cached.items() if needed > now + lookahead] if lookahead < FAR else []
    if unknown:
        del cached[min(unknown)[1]]
        return
    while True:
        needed, used, item = heapq.heappop(heap)
        if cached.get(item) == (-needed, used):
            del cached[item]
            return
