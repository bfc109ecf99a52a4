"""One reader's order and the window ahead of it."""

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gcs_prefetchd.manifest import Layout, Manifest, ObjectVersion, build_manifest
from gcs_prefetchd.names import DataRoot, ObjectName
from gcs_prefetchd.order import Indices, epoch_order
from gcs_prefetchd.streams import Stream, path_of

ROOT = DataRoot.parse("gs://pictures/train")


def manifest_of(items: int) -> Manifest:
    names = [Layout().part_name(f"{i:03}", part) for i in range(items) for part in (0, 1)]
    return build_manifest(ROOT, Layout(), [ObjectVersion(ObjectName("pictures", f"train/{name}"), 1, 1, 1) for name in names])


MANIFEST = manifest_of(20)


def paths(items: list[int]) -> set[str]:
    folder = "pictures/train"
    return {path for i in items for path in (f"{folder}/images/{i:03}.jpg", f"{folder}/labels/{i:03}.png")}


def indices(items: list[int]) -> Indices:
    return np.array(items, dtype=np.uint32)


def stream_of(items: list[int], position: int = 0) -> Stream:
    return Stream("s", "job", MANIFEST, 0, indices(items), position)


def test_a_path_is_the_objects_in_the_cache() -> None:
    assert path_of(MANIFEST.version(7, 0)) == "pictures/train/images/007.jpg"


def test_the_window_holds_image_and_label_of_what_is_planned() -> None:
    stream = stream_of([4, 2, 9])
    assert (stream.advance(), stream.advance()) == (4, 2)
    assert stream.held == paths([4, 2])
    assert stream.window() == [4, 2]
    assert stream.ahead == 2


def test_planning_ends_with_the_epoch() -> None:
    stream = stream_of([4, 2])
    assert [stream.advance() for _ in range(4)] == [4, 2, None, None]
    assert not stream.ended
    assert stream.mark_read(4)
    assert stream.mark_read(2)
    assert stream.ended
    assert stream.held == set()


def test_an_epoch_without_items_has_ended() -> None:
    stream = stream_of([])
    assert stream.ended
    assert stream.advance() is None
    assert stream.window() == []
    assert not stream.mark_read(0)


def test_what_was_read_is_held_no_longer_and_makes_room_in_the_window() -> None:
    stream = stream_of([4, 2, 9])
    stream.advance()
    stream.advance()
    assert stream.mark_read(4)
    assert stream.held == paths([2])
    assert (stream.position, stream.start, stream.ahead) == (1, 1, 1)


def test_reads_may_come_out_of_order() -> None:
    stream = stream_of([4, 2, 9, 1])
    for _ in range(3):
        stream.advance()
    stream.mark_read(9)
    assert (stream.position, stream.start) == (1, 0)
    assert stream.window() == [4, 2]
    stream.mark_read(4)
    assert (stream.position, stream.start) == (2, 1)
    stream.mark_read(2)
    assert (stream.position, stream.start) == (3, 3)
    assert stream.advance() == 1


def test_what_was_read_before_its_turn_is_never_planned() -> None:
    stream = stream_of([4, 2, 9])
    assert stream.mark_read(2)
    assert [stream.advance() for _ in range(3)] == [4, 9, None]
    assert stream.held == paths([4, 9])


def test_a_read_of_nothing_that_is_awaited_is_none_of_this_stream() -> None:
    stream = stream_of([4, 2])
    assert not stream.mark_read(5)
    assert stream.mark_read(4)
    assert not stream.mark_read(4)
    assert stream.position == 1


def test_a_resumed_epoch_begins_where_it_was_left() -> None:
    stream = stream_of([4, 2, 9], position=2)
    assert (stream.position, stream.length) == (2, 3)
    assert not stream.mark_read(4)
    assert [stream.advance(), stream.advance()] == [9, None]
    assert stream.mark_read(9)
    assert stream.ended


def test_an_item_that_comes_twice_is_read_twice() -> None:
    stream = stream_of([4, 4, 2, 4])
    assert [stream.advance() for _ in range(4)] == [4, 4, 2, 4]
    assert [stream.mark_read(4), stream.mark_read(4), stream.mark_read(4), stream.mark_read(4)] == [True, True, True, False]
    assert (stream.position, stream.start) == (3, 2)


def test_an_item_that_comes_again_within_the_window_stays_held() -> None:
    """Else it would be dropped as soon as it was read once, and nothing would bring it back in time."""
    stream = stream_of([4, 2, 4, 9, 4])
    for _ in range(3):
        stream.advance()
    stream.mark_read(4)
    assert stream.held == paths([2, 4])
    stream.mark_read(4)
    assert stream.held == paths([2])


def test_what_was_lost_is_planned_again() -> None:
    stream = stream_of([4, 2, 9])
    for _ in range(3):
        stream.advance()
    stream.plan_again(2)
    assert [stream.advance() for _ in range(3)] == [2, 9, None]


def test_of_an_item_that_comes_twice_the_place_not_read_yet_is_planned_again() -> None:
    stream = stream_of([9, 4, 2, 4])
    for _ in range(4):
        stream.advance()
    stream.mark_read(4)
    stream.plan_again(4)
    assert [stream.advance(), stream.advance()] == [4, None]


@pytest.mark.parametrize("item", [4, 9, 7])
def test_what_is_read_or_not_yet_planned_or_unknown_is_not_planned_again(item: int) -> None:
    stream = stream_of([4, 2, 9])
    stream.advance()
    stream.advance()
    stream.mark_read(4)
    stream.plan_again(item)
    assert stream.advance() == 9


steps = st.lists(st.tuples(st.sampled_from(["advance", "read", "lose"]), st.integers(0, 19)), max_size=80)


@given(st.lists(st.integers(0, 19), max_size=30), st.integers(0, 30), steps)
@example([1, 2, 1, 3, 1], 0, [("advance", 0)] * 5 + [("lose", 1), ("read", 1), ("read", 1), ("advance", 0), ("read", 1)])
def test_whatever_happens_the_window_holds_what_is_planned_and_unread(
    order: list[int], position: int, steps: list[tuple[str, int]]
) -> None:
    position = min(position, len(order))
    stream = stream_of(order, position)
    unread = list(range(position, len(order)))
    for step, item in steps:
        if step == "advance":
            before, advanced = set(stream.window()), stream.advance()
            assert advanced is None or set(stream.window()) == before | {advanced}
        elif step == "lose":
            stream.plan_again(item)
        else:
            place = next((place for place in unread if order[place] == item), None)
            assert stream.mark_read(item) == (place is not None)
            unread = [other for other in unread if other != place]
        assert stream.position == len(order) - len(unread)
        assert stream.start == (unread[0] if unread else len(order))
        assert 0 <= stream.ahead <= len(order) - stream.start
        assert stream.window() == [order[place] for place in unread if place < stream.start + stream.ahead]
        assert paths(stream.window()) <= stream.held <= paths([order[place] for place in unread])
    while (item_or_none := stream.advance()) is not None:
        assert item_or_none in stream.window()
    assert stream.window() == [order[place] for place in unread]
    for place in list(unread):
        assert stream.mark_read(order[place])
    assert stream.ended
    assert stream.held == set()


def test_a_read_costs_the_same_in_a_small_epoch_and_in_a_large_one() -> None:
    """Thousands of reads a second are noted on the event loop."""
    small, large = (Stream("s", "", MANIFEST, 0, epoch_order(0, 0, np.arange(n, dtype=np.uint32))) for n in (20, 2_000_000))
    costs_s = {stream.length: min(cost_s(stream) for _ in range(5)) for stream in (small, large)}
    assert costs_s[2_000_000] < 10 * costs_s[20]


def cost_s(stream: Stream) -> float:
    began_s = time.perf_counter()
    for _ in range(100):
        stream.mark_read(19)
    return time.perf_counter() - began_s
