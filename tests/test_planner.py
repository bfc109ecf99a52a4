"""What to fetch next and what to drop: tables, and what must hold for any."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.manifest import Layout, ObjectVersion, build_manifest
from gcs_prefetchd.names import DataRoot, ObjectName
from gcs_prefetchd.planner import choose_victims, next_items
from gcs_prefetchd.streams import Stream

ROOT = DataRoot.parse("gs://pictures/train")
MANIFEST = build_manifest(
    ROOT,
    Layout(),
    [
        ObjectVersion(ObjectName("pictures", f"train/{Layout().part_name(f'{i:02}', part)}"), 1, 1, 1)
        for i in range(20)
        for part in (0, 1)
    ],
)

orders = st.lists(st.integers(0, 19), max_size=25)


def stream_of(items: list[int], name: str = "s") -> Stream:
    return Stream(name, "job", MANIFEST, 0, np.array(items, dtype=np.uint32))


def planned(streams: list[Stream], window: int) -> list[tuple[str, int]]:
    return [(stream.id, item) for stream, item in next_items(streams, window)]


def test_without_streams_there_is_nothing_to_fetch() -> None:
    assert planned([], 10) == []


def test_the_window_ahead_of_a_reader_is_fetched_in_its_order() -> None:
    stream = stream_of([4, 2, 9, 1])
    assert planned([stream], 3) == [("s", 4), ("s", 2), ("s", 9)]
    assert planned([stream], 3) == []


def test_a_read_brings_the_next_item_into_the_window() -> None:
    stream = stream_of([4, 2, 9, 1])
    planned([stream], 2)
    stream.mark_read(4)
    assert planned([stream], 2) == [("s", 9)]


def test_a_read_out_of_order_brings_nothing_in_before_the_first_unread_one_is_read() -> None:
    stream = stream_of([4, 2, 9, 1])
    planned([stream], 2)
    stream.mark_read(2)
    assert planned([stream], 2) == []
    stream.mark_read(4)
    assert planned([stream], 2) == [("s", 9), ("s", 1)]


def test_streams_take_turns_the_one_with_the_least_ahead_first() -> None:
    one, other = stream_of([1, 2, 3, 4], "one"), stream_of([5, 6, 7, 8], "other")
    planned([one], 2)
    assert planned([one, other], 3) == [("other", 5), ("other", 6), ("one", 3), ("other", 7)]


def test_an_ended_stream_takes_no_turn_from_another() -> None:
    assert planned([stream_of([], "empty"), stream_of([1], "short"), stream_of([2, 3, 4], "long")], 2) == [
        ("short", 1),
        ("long", 2),
        ("long", 3),
    ]


def test_what_is_not_asked_for_is_not_planned() -> None:
    """The caller stops where the slots end, and goes on later."""
    stream = stream_of([1, 2, 3])
    assert next(next_items([stream], 3)) == (stream, 1)
    assert stream.window() == [1]
    assert planned([stream], 3) == [("s", 2), ("s", 3)]


@given(st.lists(orders, min_size=1, max_size=4), st.integers(1, 8), st.lists(st.integers(0, 10**6), max_size=150))
def test_each_read_is_fetched_for_once_and_never_further_ahead_than_the_window(
    orders: list[list[int]], window: int, choices: list[int]
) -> None:
    """Readers that read some item of their window, not always the first, until all is read."""
    streams = [stream_of(order, f"{i}") for i, order in enumerate(orders)]
    fetched: dict[str, Counter[int]] = {stream.id: Counter() for stream in streams}
    numbers = iter(choices)
    while not all(stream.ended for stream in streams):
        for stream, item in next_items(streams, window):
            fetched[stream.id][item] += 1
        assert all(len(stream.window()) <= window for stream in streams)
        assert all(stream.window() or stream.ended for stream in streams)
        reading = [stream for stream in streams if not stream.ended]
        stream = reading[next(numbers, 0) % len(reading)]
        assert stream.mark_read(stream.window()[next(numbers, 0) % len(stream.window())])
    for stream, order in zip(streams, orders, strict=True):
        assert fetched[stream.id] == Counter(order)
        assert stream.held == set()


CACHED = [("a", 10), ("b", 20), ("c", 30)]


@pytest.mark.parametrize(
    ("short_bytes", "keep", "victims"),
    [
        (0, set(), []),
        (-5, set(), []),
        (1, set(), ["a"]),
        (10, set(), ["a"]),
        (11, set(), ["a", "b"]),
        (60, set(), ["a", "b", "c"]),
        (61, set(), None),
        (1, {"a"}, ["b"]),
        (50, {"b"}, None),
        (40, {"b"}, ["a", "c"]),
        (1, {"a", "b", "c"}, None),
        (0, {"a", "b", "c"}, []),
    ],
)
def test_the_least_recently_used_go_first_and_what_is_kept_never(
    short_bytes: int, keep: set[str], victims: list[str] | None
) -> None:
    assert choose_victims(CACHED, short_bytes, keep) == victims


def test_from_an_empty_cache_nothing_can_be_dropped() -> None:
    assert choose_victims([], 0, ()) == []
    assert choose_victims([], 1, ()) is None


sizes = st.dictionaries(st.integers(0, 30).map(str), st.integers(0, 100), max_size=20)


@given(sizes, st.integers(-10, 1000), st.sets(st.integers(0, 30).map(str)))
def test_victims_are_enough_and_none_too_many(cached: dict[str, int], short_bytes: int, keep: set[str]) -> None:
    victims = choose_victims(cached.items(), short_bytes, keep)
    droppable = [path for path in cached if path not in keep]
    if victims is None:
        assert sum(cached[path] for path in droppable) < short_bytes
    else:
        assert victims == droppable[: len(victims)]
        assert sum(cached[path] for path in victims) >= short_bytes
        assert sum(cached[path] for path in victims[:-1]) < short_bytes or not victims


def test_no_more_is_looked_at_than_is_needed() -> None:
    """The cache holds millions of objects, and each download asks."""
    entries = iter([("a", 10), ("b", 20), ("c", 30), ("d", 40)])
    assert choose_victims(entries, 25, ()) == ["a", "b"]
    assert len(list(entries)) >= 1
