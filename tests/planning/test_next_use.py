"""What is here of one data root, and which of it some stream reads last."""

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


def cached_items(*streams: Stream, here: Iterable[int] = (), items: int = ITEMS) -> CachedItems:
    cached = CachedItems(items)
    cached.streams.extend(streams)
    for item in here:
        cached.set_parts(item, 1)
    cached.start_sorting(lru=False)
    return cached


def told(cached: CachedItems, now_s: float = 0.0) -> list[tuple[str, int]]:
    """Everything that `farthest` comes to, taken one by one: the stream and the place."""
    found = []
    while (farthest := cached.farthest_next_use(now_s)) is not None:
        _, stream, place = farthest
        found.append((stream.id, place))
        cached.remove_next_use(stream, place)
    return found


def test_the_parts_of_an_item_are_known_by_a_bit_each() -> None:
    cached = CachedItems(3)
    cached.set_parts(1, 0b10)
    assert [cached.parts_of(item) for item in range(3)] == [0, 0b10, 0]


def test_room_for_more_items_keeps_what_is_here() -> None:
    cached = cached_items(here=[1, 2])
    cached.grow(ITEMS + 3)
    cached.set_parts(ITEMS + 2, 1)
    assert [item for item in range(ITEMS + 3) if cached.parts_of(item)] == [1, 2, ITEMS + 2]
    assert cached.unneeded.oldest() == (1, 0.0)


def test_an_item_is_needed_by_the_first_stream_that_reads_it() -> None:
    cached = cached_items(stream_of([1, 2, 3, 4], name="a"), stream_of([4, 3, 5], name="b"))
    assert [cached.is_needed(item) for item in (1, 4, 5, 6)] == [True, True, True, False]
    assert [cached.next_use_s(item, 0.0) for item in (1, 2, 3, 4, 5, 6)] == [0.0, 0.01, 0.01, 0.0, 0.02, math.inf]


def test_what_is_here_and_needed_by_nobody_is_idle() -> None:
    cached = cached_items(stream_of([1, 2, 3]), here=[2, 5, 7])
    assert cached.unneeded.oldest() == (5, 0.0)
    cached.unneeded.remove(5)
    cached.unneeded.remove(7)
    assert cached.unneeded.oldest() is None


def test_without_knowledge_of_the_future_all_that_is_here_is_idle() -> None:
    cached = cached_items(stream_of([1, 2, 3]), here=[2, 5])
    cached.start_sorting(lru=True)
    assert cached.unneeded.oldest() == (2, 0.0)


def test_what_is_here_is_told_from_the_far_end() -> None:
    assert told(cached_items(stream_of([1, 2, 3, 4, 5]), here=[1, 3, 4, 9])) == [("s", 3), ("s", 2), ("s", 0)]


def test_a_long_epoch_is_looked_through_piece_by_piece() -> None:
    cached = cached_items(stream_of(range(LONG), LONG), here=range(0, LONG, 7), items=LONG)
    assert told(cached) == [("s", place) for place in reversed(range(0, LONG, 7))]


def test_what_is_known_of_the_next_epoch_is_told_first() -> None:
    stream = stream_of([1, 2, 3, 4])
    cached = cached_items(stream, here=[1, 2, 3])
    for item in (1, 2):
        stream.mark_read(item)
    assert cached.extend_known(stream, 4) == [1, 2]
    assert told(cached) == [("s", 5), ("s", 4), ("s", 2)]


def test_what_comes_to_lie_where_the_scan_has_passed_is_told_once_it_is_noted() -> None:
    stream = stream_of(range(6))
    cached = cached_items(stream, here=[1])
    assert cached.farthest_next_use(0.0) == (0.01, stream, 1)
    cached.set_parts(4, 1)
    cached.queue_next_use(4, 0.0)
    cached.queue_next_use(4, 0.0)
    assert told(cached) == [("s", 4), ("s", 1)]


def test_what_comes_to_lie_where_the_scan_has_stopped_is_told() -> None:
    cached = cached_items(stream_of(range(LONG), LONG), here=[LONG - 1], items=LONG)
    cached.farthest_next_use(0.0)
    arrived = range(LONG - PLACES_PER_SCAN - 1, LONG - PLACES_PER_SCAN + 2)
    for item in arrived:
        cached.set_parts(item, 1)
        cached.queue_next_use(item, 0.0)
    assert told(cached) == [("s", place) for place in (LONG - 1, *reversed(arrived))]


def test_what_the_scan_will_come_to_anyway_is_not_noted() -> None:
    """Else an epoch that fits into the cache would have every read of it noted."""
    stream = stream_of([1, 2, 3, 1, 2, 3])
    cached = cached_items(stream, here=[1, 2, 3])
    for item in (1, 2, 3, 1, 2):
        stream.mark_read(item)
        cached.queue_next_use(item, 0.0)
        for revealed in cached.extend_known(stream, 6):
            cached.queue_next_use(revealed, 0.0)
    assert cached._scans["s"].queued == []
    assert told(cached) == [("s", 7), ("s", 6), ("s", 5)]


def test_what_has_been_read_or_has_gone_is_told_no_more() -> None:
    stream = stream_of(range(6))
    cached = cached_items(stream, here=range(6))
    assert cached.farthest_next_use(0.0) == (0.05, stream, 5)
    cached.set_parts(5, 0)
    stream.mark_read(4)
    assert told(cached) == [("s", place) for place in (3, 2, 1, 0)]


def test_what_was_taken_comes_back_when_it_is_noted() -> None:
    stream = stream_of(range(6))
    cached = cached_items(stream, here=[2, 4])
    assert told(cached) == [("s", 4), ("s", 2)]
    for item in (4, 2):
        cached.queue_next_use(item, 0.0)
    assert told(cached) == [("s", 4), ("s", 2)]


def test_of_two_streams_the_one_that_reads_farther_ahead_is_told_first() -> None:
    cached = cached_items(stream_of([1, 2], name="a"), stream_of([5, 6, 7], name="b"), here=[1, 2, 5, 6, 7])
    assert told(cached)[0] == ("b", 2)
    assert sorted(told(cached_items(stream_of([1, 2], name="a"), stream_of([2, 1], name="b"), here=[1, 2]))) == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    ]


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=20),
    st.sets(st.integers(0, ITEMS - 1)),
    st.lists(st.tuples(st.sampled_from(["read", "come", "go", "look", "reveal"]), st.integers(0, ITEMS - 1)), max_size=40),
)
def test_whatever_happened_everything_here_that_is_needed_is_told_from_the_far_end(
    order: list[int], here: set[int], steps: list[tuple[str, int]]
) -> None:
    stream = stream_of(order)
    cached = cached_items(stream, here=here)
    for step, item in steps:
        match step:
            case "read" if stream.mark_read(item) and cached.parts_of(item):
                cached.queue_next_use(item, 0.0)
            case "come" if not cached.parts_of(item):
                cached.set_parts(item, 1)
                cached.queue_next_use(item, 0.0)
            case "go":
                cached.set_parts(item, 0)
            case "look":
                cached.farthest_next_use(0.0)
            case "reveal":
                for revealed in cached.extend_known(stream, item):
                    if cached.parts_of(revealed):
                        cached.queue_next_use(revealed, 0.0)
    needed = [item for item in range(ITEMS) if cached.parts_of(item) and cached.is_needed(item)]
    assert told(cached) == [("s", place) for place in sorted((stream.next_place(item) for item in needed), reverse=True)]
