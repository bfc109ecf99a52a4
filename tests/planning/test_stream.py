"""A reader's position in its order, and what is known of its future: tables, and a plain list as the model."""

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.planning.stream import NEVER, Epoch, Stream
from gcs_prefetchd.shared.epoch_order import epoch_order

ITEMS = 20


def epoch_of(order: Sequence[int], number: int = 0, items: int = ITEMS, position: int = 0) -> Epoch:
    return Epoch.from_order(number, np.array(order, dtype=np.uint32), items, position)


def stream_of(
    order: Sequence[int], position: int = 0, *, upcoming: Sequence[int] | None = None, endless: bool = False
) -> Stream:
    stream = Stream("s", "job", epoch_of(order, position=position), is_endless=endless)
    if upcoming is not None:
        stream.set_next_epoch(epoch_of(upcoming, 1))
    return stream


def places(stream: Stream, *items: int) -> list[int | None]:
    """The next place of each item; None if it is unknown."""
    return [None if (place := stream.next_place(item)) == NEVER else place for item in items]


# The order


def test_each_item_of_the_epoch_has_its_place_and_no_other_item_has_one() -> None:
    assert places(stream_of([4, 2, 9]), 4, 2, 9, 5) == [0, 1, 2, None]


def test_an_item_that_occurs_several_times_is_read_as_often() -> None:
    stream = stream_of([4, 4, 2, 4])
    assert [(places(stream, 4), stream.mark_read(4)) for _ in range(4)] == [
        ([0], True),
        ([1], True),
        ([3], True),
        ([None], False),
    ]
    assert (stream.position, stream.first_unread, stream.front) == (3, 2, 4)


def test_an_order_without_repetitions_stores_none() -> None:
    assert epoch_of([4, 2, 9]).following is None
    assert epoch_of([]).following is None
    assert epoch_of([4, 2, 4]).following is not None


def test_an_empty_epoch_is_finished() -> None:
    stream = stream_of([])
    assert stream.is_finished
    assert not stream.mark_read(1)
    assert stream.extend_known(10) == []


def test_a_resumed_epoch_starts_at_its_position() -> None:
    stream = stream_of([4, 2, 9, 2], position=2)
    assert (stream.position, stream.first_unread, stream.front, stream.planned_end, len(stream)) == (2, 2, 2, 2, 4)
    assert places(stream, 4, 2, 9) == [None, 3, 2]
    assert not stream.mark_read(4)
    assert stream.mark_read(9)
    assert stream.mark_read(2)
    assert stream.is_finished


def test_an_epoch_that_is_resumed_at_its_end_is_finished() -> None:
    assert stream_of([4, 2], position=2).is_finished


# Reads


def test_reads_may_be_out_of_order() -> None:
    stream = stream_of([4, 2, 9, 1])
    assert stream.mark_read(9)
    assert (stream.position, stream.first_unread, stream.front) == (1, 0, 3)
    assert stream.mark_read(4)
    assert (stream.position, stream.first_unread, stream.front) == (2, 1, 3)
    assert stream.mark_read(2)
    assert (stream.position, stream.first_unread, stream.front) == (3, 3, 3)


def test_a_read_of_an_item_without_an_unread_place_is_not_counted() -> None:
    stream = stream_of([4, 2])
    assert not stream.mark_read(5)
    assert stream.mark_read(4)
    assert not stream.mark_read(4)
    assert stream.position == 1


def test_one_lost_report_leaves_half_of_the_window_ahead_of_the_reader() -> None:
    stream = stream_of(range(20))
    for item in range(1, 12):
        stream.mark_read(item)
    assert (stream.first_unread, stream.front) == (0, 12)
    assert [stream.window_start(window) for window in (100, 24, 4, 1)] == [0, 0, 10, 12]


@pytest.mark.parametrize("endless", [False, True])
def test_one_lost_report_does_not_limit_what_is_known(endless: bool) -> None:
    stream = stream_of(range(20), upcoming=range(20), endless=endless)
    for item in range(1, 19):
        stream.mark_read(item)
    assert 1 in stream.extend_known(5)


def test_the_next_epoch_makes_up_for_a_lost_report() -> None:
    stream = stream_of([4, 2, 9])
    stream.mark_read(2)
    stream.mark_read(9)
    stream.start_epoch(epoch_of([9, 4, 2], 1))
    assert (stream.position, stream.first_unread, stream.front, stream.epoch.number) == (0, 0, 0, 1)
    assert places(stream, 9, 4, 2) == [0, 1, 2]


# What is known of the next epoch


def test_of_the_next_epoch_nothing_is_known_before_the_window_reaches_it() -> None:
    stream = stream_of([4, 2, 9], upcoming=[9, 4, 2])
    assert stream.extend_known(2) == []
    assert stream.known_end == 3
    stream.mark_read(4)
    assert places(stream, 4) == [None]


def test_the_head_of_the_next_epoch_is_known_as_far_as_the_window_reaches() -> None:
    stream = stream_of([4, 2, 9], upcoming=[4, 9, 2])
    stream.mark_read(4)
    stream.mark_read(2)
    assert stream.extend_known(3) == [4]  # 9 occurs there, too, but before that in this epoch
    assert stream.known_end == 5
    assert places(stream, 4, 9, 2) == [3, 2, None]
    stream.mark_read(9)
    assert places(stream, 9) == [4]
    assert stream.extend_known(3) == [2]
    assert places(stream, 2) == [5]
    assert [stream.item_at(place) for place in range(6)] == [4, 2, 9, 4, 9, 2]


def test_the_window_ends_at_the_next_epochs_end() -> None:
    stream = stream_of([4, 2, 9], upcoming=[2, 9])
    stream.extend_known(100)
    assert stream.known_end == 5
    assert stream_of([4, 2, 9]).extend_known(100) == []


def test_an_endless_stream_is_known_one_length_ahead() -> None:
    stream = stream_of([4, 2, 4, 9], upcoming=[2, 2, 9, 4], endless=True)
    assert stream.extend_known(1) == []
    stream.mark_read(4)
    assert stream.extend_known(1) == []  # 2 occurs in this epoch first
    assert stream.known_end == 5
    stream.mark_read(2)
    assert places(stream, 2) == [4]
    stream.extend_known(1)
    stream.mark_read(4)
    assert stream.known_end == 6
    assert places(stream, 4) == [None]  # its place is beyond what is known


def test_the_known_places_of_the_next_epoch_are_the_same_when_it_starts() -> None:
    current, following = epoch_of([4, 2, 9]), epoch_of([9, 4, 2], 1)
    stream = Stream("s", "job", current)
    stream.set_next_epoch(following)
    for item in (4, 2, 9):
        stream.mark_read(item)
    stream.extend_known(3)
    before = places(stream, 9, 4, 2)
    stream.start_epoch(following)
    assert [place - 3 for place in before if place is not None] == places(stream, 9, 4, 2)
    assert stream.next_epoch is None


def test_reads_of_the_next_epoch_count_before_its_plan_arrives() -> None:
    stream = stream_of([4, 2], upcoming=[2, 4])
    for item in (4, 2):
        stream.mark_read(item)
    stream.extend_known(2)
    assert stream.mark_read(2)
    assert stream.first_unread == 3


def test_new_item_numbers_have_no_place() -> None:
    stream = stream_of([4, 2])
    stream.grow(ITEMS + 5)
    assert places(stream, ITEMS + 4, 4, 2) == [None, 0, 1]
    assert not stream.mark_read(ITEMS + 4)
    assert stream.mark_read(4)


# Planning


def test_a_lost_item_is_planned_again_from_its_next_place() -> None:
    stream = stream_of([4, 2, 9, 1])
    stream.planned_end = 4
    stream.plan_again(2)
    assert stream.planned_end == 1


@pytest.mark.parametrize("item", [4, 9, 7])
def test_an_item_that_is_read_or_not_planned_yet_or_unknown_is_not_planned_again(item: int) -> None:
    stream = stream_of([4, 2, 9])
    stream.planned_end = 2
    stream.mark_read(4)
    stream.plan_again(item)
    assert stream.planned_end == 2


def test_the_time_until_a_place_is_its_distance_at_the_current_rate() -> None:
    stream = stream_of(range(20))
    for step in range(11):
        stream.rate.add(2, step / 10)
    for item in range(5):
        stream.mark_read(item)
    assert stream.time_until_s(15, 1.0) == pytest.approx(0.5, rel=0.02)
    assert stream.time_until_s(3, 1.0) == 0.0


# Whatever happens


@given(
    st.lists(st.integers(0, ITEMS - 1), max_size=25),
    st.lists(st.integers(0, ITEMS - 1), max_size=25),
    st.integers(0, 25),
    st.booleans(),
    st.lists(st.one_of(st.integers(0, ITEMS - 1), st.tuples(st.integers(0, 30))), max_size=60),
)
def test_a_stream_agrees_with_a_list_of_unread_places(
    order: list[int], following: list[int], position: int, endless: bool, steps: list[int | tuple[int]]
) -> None:
    position = min(position, len(order))
    stream = stream_of(order, position, upcoming=following, endless=endless)
    full_order = order + following
    known, front, reads, unread = len(order), position, position, list(range(position, len(order)))
    for step in steps:
        if isinstance(step, tuple):
            (window,) = step
            revealed = stream.extend_known(window)
            start = max(unread[0] if unread else known, front - window // 2)
            reach = min(start + (len(order) if endless else window), len(full_order))
            before, new_places = {full_order[place] for place in unread}, list(range(known, reach))
            assert sorted(revealed) == sorted({full_order[place] for place in new_places} - before)
            unread, known = unread + new_places, max(known, reach)
        else:
            place = next((place for place in unread if full_order[place] == step), None)
            assert stream.mark_read(step) == (place is not None)
            if place is not None:
                unread.remove(place)
                front, reads = max(front, place + 1), reads + 1
        assert (stream.known_end, stream.front, stream.position) == (known, front, reads)
        assert stream.first_unread == (unread[0] if unread else known)
        first: dict[int, int | None] = {}
        for place in unread:
            first.setdefault(full_order[place], place)
        assert places(stream, *range(ITEMS)) == [first.get(item) for item in range(ITEMS)]


@given(
    st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=25),
    st.lists(st.integers(0, ITEMS - 1), max_size=20),
    st.lists(st.integers(0, 3), min_size=ITEMS, max_size=ITEMS),
    st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
def test_cached_items_are_found_at_their_next_places(
    order: list[int], read: list[int], present: list[int], ends: tuple[int, int]
) -> None:
    stream = stream_of(order, upcoming=order[::-1])
    stream.extend_known(2 * len(order))
    for item in read:
        stream.mark_read(item)
    length = len(order)
    first, end = sorted(min(end, 2 * length) for end in ends)
    if first < length < end:
        first = length
    found = stream.cached_places(first, end, np.array(present, dtype=np.uint8))
    expected = [place for place in range(first, end) if present[stream.item_at(place)]]
    assert found == [place for place in expected if stream.next_place(stream.item_at(place)) == place]


# Costs


def test_a_read_costs_the_same_in_a_small_epoch_and_in_a_large_one() -> None:
    """The event loop marks thousands of reads a second."""
    costs_s = [min(cost_of_reads_s(items) for _ in range(3)) for items in (2000, 1_000_000)]
    assert costs_s[1] < 20 * costs_s[0]


def cost_of_reads_s(items: int) -> float:
    order = epoch_order(0, 0, np.arange(items, dtype=np.uint32))
    stream = Stream("s", "job", Epoch.from_order(0, order, items))
    read = order[:2000].tolist()
    started_s = time.thread_time()
    for item in read:
        stream.mark_read(item)
    return time.thread_time() - started_s


@pytest.mark.parametrize("endless", [False, True])
def test_a_stream_takes_few_bytes_an_item(endless: bool) -> None:
    items = 100_000
    order = np.random.default_rng(0).integers(items, size=items) if endless else np.random.default_rng(0).permutation(items)
    epoch = Epoch.from_order(0, order.astype(np.uint32), items)
    stream = Stream("s", "job", epoch)
    assert stream.next_places is epoch.first_places
    arrays = [epoch.order, epoch.first_places, epoch.following]
    assert sum(array.nbytes for array in arrays if array is not None) <= (12 if endless else 8) * items
