"""The cached items of one data root, and which of them some stream reads last."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gcs_prefetchd.planning.next_use import PLACES_PER_SCAN, CachedItems
from gcs_prefetchd.planning.stream import Epoch, Stream

ITEMS = 12
LONG = 3 * PLACES_PER_SCAN


def epoch_of(order: Iterable[int], items: int, number: int = 0) -> Epoch:
    return Epoch.from_order(number, np.array(list(order), dtype=np.uint32), items)


def stream_of(order: Sequence[int], items: int = ITEMS, name: str = "s") -> Stream:
    stream = Stream(name, "", epoch_of(order, items))
    stream.set_next_epoch(epoch_of(order, items, 1))
    return stream


def cached_items(*streams: Stream, holding: Iterable[int] = (), items: int = ITEMS) -> CachedItems:
    cached = CachedItems(items)
    cached.streams.extend(streams)
    for item in holding:
        cached.set_parts(item, 1)
    cached.start_sorting(lru=False)
    return cached


def pop_all(cached: CachedItems, now_s: float = 0.0) -> list[tuple[str, int]]:
    """All streams and places that `farthest_next_use` returns, each of them removed."""
    found = []
    while (farthest := cached.farthest_next_use(now_s)) is not None:
        _, stream, place = farthest
        found.append((stream.id, place))
        cached.remove_next_use(stream, place)
    return found


def test_each_cached_part_of_an_item_is_a_bit() -> None:
    cached = CachedItems(3)
    cached.set_parts(1, 0b10)
    assert [cached.parts_of(item) for item in range(3)] == [0, 0b10, 0]


def test_growing_keeps_the_cached_items() -> None:
    cached = cached_items(holding=[1, 2])
    cached.grow(ITEMS + 3)
    cached.set_parts(ITEMS + 2, 1)
    assert [item for item in range(ITEMS + 3) if cached.parts_of(item)] == [1, 2, ITEMS + 2]
    assert cached.unneeded.oldest() == (1, 0.0)


def test_the_next_use_of_an_item_is_that_of_the_first_stream_that_reads_it() -> None:
    cached = cached_items(stream_of([1, 2, 3, 4], name="a"), stream_of([4, 3, 5], name="b"))
    assert [cached.is_needed(item) for item in (1, 4, 5, 6)] == [True, True, True, False]
    assert [cached.next_use_s(item, 0.0) for item in (1, 2, 3, 4, 5, 6)] == [0.0, 0.01, 0.01, 0.0, 0.02, math.inf]


def test_cached_items_that_no_stream_needs_are_unneeded() -> None:
    cached = cached_items(stream_of([1, 2, 3]), holding=[2, 5, 7])
    assert cached.unneeded.oldest() == (5, 0.0)
    cached.unneeded.remove(5)
    cached.unneeded.remove(7)
    assert cached.unneeded.oldest() is None


def test_under_lru_all_cached_items_are_unneeded() -> None:
    cached = cached_items(stream_of([1, 2, 3]), holding=[2, 5])
    cached.start_sorting(lru=True)
    assert cached.unneeded.oldest() == (2, 0.0)


def test_cached_items_are_found_from_the_far_end() -> None:
    assert pop_all(cached_items(stream_of([1, 2, 3, 4, 5]), holding=[1, 3, 4, 9])) == [
        ("s", 3),
        ("s", 2),
        ("s", 0),
    ]


def test_a_long_epoch_is_scanned_in_steps() -> None:
    cached = cached_items(stream_of(range(LONG), LONG), holding=range(0, LONG, 7), items=LONG)
    assert pop_all(cached) == [("s", place) for place in reversed(range(0, LONG, 7))]


def test_the_known_head_of_the_next_epoch_is_found_first() -> None:
    stream = stream_of([1, 2, 3, 4])
    cached = cached_items(stream, holding=[1, 2, 3])
    for item in (1, 2):
        stream.mark_read(item)
    assert cached.extend_known(stream, 4) == [1, 2]
    assert pop_all(cached) == [("s", 5), ("s", 4), ("s", 2)]


def test_a_next_use_that_the_scan_has_passed_is_found_once_when_it_is_queued() -> None:
    stream = stream_of(range(6))
    cached = cached_items(stream, holding=[1])
    assert cached.farthest_next_use(0.0) == (0.01, stream, 1)
    cached.set_parts(4, 1)
    cached.queue_next_use(4, 0.0)
    cached.queue_next_use(4, 0.0)
    assert pop_all(cached) == [("s", 4), ("s", 1)]


def test_next_uses_around_the_end_of_the_scan_are_found() -> None:
    cached = cached_items(stream_of(range(LONG), LONG), holding=[LONG - 1], items=LONG)
    cached.farthest_next_use(0.0)
    arrived = range(LONG - PLACES_PER_SCAN - 1, LONG - PLACES_PER_SCAN + 2)
    for item in arrived:
        cached.set_parts(item, 1)
        cached.queue_next_use(item, 0.0)
    assert pop_all(cached) == [("s", place) for place in (LONG - 1, *reversed(arrived))]


def test_a_next_use_that_the_scan_will_reach_is_not_queued() -> None:
    """Otherwise every read of an epoch that fits into the cache would be queued."""
    stream = stream_of([1, 2, 3, 1, 2, 3])
    cached = cached_items(stream, holding=[1, 2, 3])
    for item in (1, 2, 3, 1, 2):
        stream.mark_read(item)
        cached.queue_next_use(item, 0.0)
        for revealed in cached.extend_known(stream, 6):
            cached.queue_next_use(revealed, 0.0)
    assert cached._scans["s"].queued == []
    assert pop_all(cached) == [("s", 7), ("s", 6), ("s", 5)]


def test_an_item_that_was_read_or_evicted_is_not_found() -> None:
    stream = stream_of(range(6))
    cached = cached_items(stream, holding=range(6))
    assert cached.farthest_next_use(0.0) == (0.05, stream, 5)
    cached.set_parts(5, 0)
    stream.mark_read(4)
    assert pop_all(cached) == [("s", place) for place in (3, 2, 1, 0)]


def test_a_removed_next_use_returns_when_it_is_queued() -> None:
    stream = stream_of(range(6))
    cached = cached_items(stream, holding=[2, 4])
    assert pop_all(cached) == [("s", 4), ("s", 2)]
    for item in (4, 2):
        cached.queue_next_use(item, 0.0)
    assert pop_all(cached) == [("s", 4), ("s", 2)]


def test_of_two_streams_the_farther_next_use_is_found_first() -> None:
    cached = cached_items(stream_of([1, 2], name="a"), stream_of([5, 6, 7], name="b"), holding=[1, 2, 5, 6, 7])
    assert pop_all(cached)[0] == ("b", 2)
    assert sorted(pop_all(cached_items(stream_of([1, 2], name="a"), stream_of([2, 1], name="b"), holding=[1, 2]))) == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    ]


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=20),
    st.sets(st.integers(0, ITEMS - 1)),
    st.lists(st.tuples(st.sampled_from(["read", "fetch", "evict", "scan", "extend"]), st.integers(0, ITEMS - 1)), max_size=40),
)
def test_through_any_events_all_needed_cached_items_are_found_from_the_far_end(
    order: list[int], held: set[int], steps: list[tuple[str, int]]
) -> None:
    stream = stream_of(order)
    cached = cached_items(stream, holding=held)
    for step, item in steps:
        match step:
            case "read" if stream.mark_read(item) and cached.parts_of(item):
                cached.queue_next_use(item, 0.0)
            case "fetch" if not cached.parts_of(item):
                cached.set_parts(item, 1)
                cached.queue_next_use(item, 0.0)
            case "evict":
                cached.set_parts(item, 0)
            case "scan":
                cached.farthest_next_use(0.0)
            case "extend":
                for revealed in cached.extend_known(stream, item):
                    if cached.parts_of(revealed):
                        cached.queue_next_use(revealed, 0.0)
    needed = [item for item in range(ITEMS) if cached.parts_of(item) and cached.is_needed(item)]
    assert pop_all(cached) == [("s", place) for place in sorted((stream.next_place(item) for item in needed), reverse=True)]
