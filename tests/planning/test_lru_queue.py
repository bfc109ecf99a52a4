"""The LRU queue, compared with the obvious one: a dictionary."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.planning.lru_queue import LRUQueue


def drained(queue: LRUQueue) -> list[tuple[int, float]]:
    """Empty the queue; returns its items, oldest first."""
    found = []
    while (oldest := queue.oldest()) is not None:
        found.append(oldest)
        queue.remove(oldest[0])
    return found


def test_an_empty_queue_has_no_oldest() -> None:
    assert LRUQueue(0).oldest() is None
    assert LRUQueue(5).oldest() is None


def test_the_item_used_least_recently_is_the_oldest() -> None:
    queue = LRUQueue(10)
    for now_s, item in enumerate([3, 1, 2, 3]):
        queue.use(item, float(now_s))
    assert queue.oldest() == queue.oldest() == (1, 1.0)
    assert drained(queue) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_removed_item_returns_with_its_next_use() -> None:
    queue = LRUQueue(10)
    queue.use(3, 0.0)
    queue.use(4, 1.0)
    queue.remove(3)
    queue.remove(3)
    queue.remove(7)
    assert queue.oldest() == (4, 1.0)
    queue.use(3, 2.0)
    assert drained(queue) == [(4, 1.0), (3, 2.0)]


def test_items_that_are_put_back_are_the_oldest_again_with_their_last_use() -> None:
    queue = LRUQueue(10)
    for now_s, item in enumerate([0, 1, 0, 2, 3, 2, 4]):
        queue.use(item, float(now_s))
    removed = remove_oldest(queue, 3)
    assert removed == [(1, 1.0), (0, 2.0), (3, 4.0)]
    queue.put_back(removed)
    assert drained(queue) == [*removed, (2, 5.0), (4, 6.0)]


def test_all_items_of_a_queue_may_be_removed_and_put_back() -> None:
    queue = LRUQueue(3)
    for item in range(3):
        queue.use(item, 1.0)
    removed = remove_oldest(queue, 3)
    assert queue.oldest() is None
    queue.put_back(removed)
    assert drained(queue) == removed


def remove_oldest(queue: LRUQueue, count: int) -> list[tuple[int, float]]:
    removed = []
    for _ in range(count):
        oldest = queue.oldest()
        assert oldest is not None
        queue.remove(oldest[0])
        removed.append(oldest)
    return removed


def test_items_that_enter_with_set_members_count_as_used_before_all_others() -> None:
    queue = LRUQueue(6)
    for item in (4, 2, 0):
        queue.use(item, 7.0)
    queue.set_members(np.array([True, True, False, True, True, False]))
    assert drained(queue) == [(1, 0.0), (3, 0.0), (4, 7.0), (0, 7.0)]


def test_growing_keeps_the_items_in_the_queue() -> None:
    queue = LRUQueue(2)
    queue.use(1, 1.0)
    queue.grow(5)
    queue.use(4, 2.0)
    assert drained(queue) == [(1, 1.0), (4, 2.0)]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(0, 9)),
        st.tuples(st.just("remove"), st.integers(0, 9)),
        st.tuples(st.just("remove and put back"), st.integers(0, 9)),
        st.tuples(st.just("hold to"), st.integers(0, 1023)),
        st.tuples(st.just("hold some to"), st.integers(0, 1023)),
        st.tuples(st.just("use all, many times"), st.integers(1, 130)),
        st.tuples(st.just("grow"), st.just(3)),
    ),
    max_size=40,
)


@given(steps)
def test_the_queue_agrees_with_a_dictionary_in_order_of_use(steps: list[tuple[str, int]]) -> None:
    items, clock = 10, itertools.count(1)
    queue, model = LRUQueue(items), dict[int, float]()

    def use(item: int) -> None:
        now_s = float(next(clock))
        queue.use(item, now_s)
        model.pop(item, None)
        model[item] = now_s

    for step, number in steps:
        match step:
            case "use":
                use(number)
            case "remove":
                queue.remove(number)
                model.pop(number, None)
            case "remove and put back":
                removed = list(itertools.islice(model.items(), number))
                for item, _ in removed:
                    assert queue.oldest() is not None
                    queue.remove(item)
                queue.put_back(removed)
            case "hold to":
                wanted = [item < 10 and bool(number >> item & 1) for item in range(items)]
                queue.set_members(np.array(wanted))
                entered = {item: 0.0 for item in range(items) if wanted[item] and item not in model}
                model = entered | {item: when for item, when in model.items() if wanted[item]}
            case "hold some to":
                first, wanted = number % 7, [bool(number >> bit & 1) for bit in range(3)]
                queue.set_members(np.array(wanted), first)
                some = {first + offset: one for offset, one in enumerate(wanted)}
                entered = {item: 0.0 for item, one in some.items() if one and item not in model}
                model = entered | {item: when for item, when in model.items() if some.get(item, True)}
            case "use all, many times":
                for item in itertools.islice(itertools.cycle(range(items)), number * 10):
                    use(item)
            case "grow":
                items += number
                queue.grow(items)
        assert queue.oldest() == next(iter(model.items()), None)
    assert drained(queue) == list(model.items())


@pytest.mark.parametrize("items", [1, 1000])
def test_a_queue_does_not_grow_with_uses(items: int) -> None:
    queue = LRUQueue(items)
    for step in range(20 * items):
        queue.use(step % items, float(step))
    assert len(drained(queue)) == items


def test_a_use_costs_the_same_among_few_items_and_among_many() -> None:
    costs_s = [min(cost_s(items) for _ in range(3)) for items in (2000, 1_000_000)]
    assert costs_s[1] < 20 * costs_s[0]


def test_putting_back_costs_the_same_among_few_items_and_among_many() -> None:
    """A prefetch that finds no space does it, with every report of the readers."""
    costs_s = [min(cost_of_putting_back_s(items) for _ in range(3)) for items in (2000, 1_000_000)]
    assert costs_s[1] < 20 * costs_s[0]


def cost_of_putting_back_s(items: int) -> float:
    queue = LRUQueue(items)
    for item in range(1000):
        queue.use(item, 1.0)
    started_s = time.thread_time()
    for _ in range(100):
        queue.put_back(remove_oldest(queue, 3))
    return time.thread_time() - started_s


def test_an_item_takes_few_bytes() -> None:
    tracemalloc.start()
    try:
        queue = LRUQueue(100_000)
        queue.use(1, 1.0)
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken_bytes < 12.1 * 100_000


def cost_s(items: int) -> float:
    queue = LRUQueue(items)
    chosen = np.random.default_rng(0).integers(items, size=20_000).tolist()
    started_s = time.thread_time()
    for item in chosen:
        queue.use(item, 1.0)
    return time.thread_time() - started_s
