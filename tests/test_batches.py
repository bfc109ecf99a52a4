"""Short calls are done in their order by one thread, many at a hop, and each tells its own caller how it ended."""

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial

import pytest

from gcs_prefetchd.batches import LARGEST_BATCH, Batches


@pytest.fixture
async def batches() -> AsyncIterator[Batches]:
    under_test = Batches("test")
    yield under_test
    await asyncio.to_thread(under_test.close)


async def test_calls_are_made_in_their_order_by_one_thread(batches: Batches) -> None:
    made: list[int] = []
    threads: set[str] = set()

    def call(number: int) -> None:
        made.append(number)
        threads.add(threading.current_thread().name)

    await asyncio.gather(*(batches.do(partial(call, number)) for number in range(5 * LARGEST_BATCH + 1)))

    assert made == list(range(5 * LARGEST_BATCH + 1))
    assert len(threads) == 1
    assert threads.pop().startswith("test")


async def test_a_call_that_fails_fails_alone(batches: Batches) -> None:
    def fail() -> None:
        raise FileNotFoundError("not there")

    results = await asyncio.gather(batches.do(int), batches.do(fail), batches.do(int), return_exceptions=True)

    assert [repr(one) for one in results] == ["None", "FileNotFoundError('not there')", "None"]


async def test_a_caller_that_goes_away_keeps_nothing_from_being_done(batches: Batches) -> None:
    may_go_on = threading.Event()
    made: list[str] = []
    first = batches.do(may_go_on.wait)
    second = batches.do(lambda: made.append("second"))
    third = batches.do(lambda: made.append("third"))
    first.cancel()
    second.cancel()
    may_go_on.set()
    await third
    assert made == ["second", "third"]


async def test_what_comes_while_a_batch_is_under_way_goes_together_in_the_next(batches: Batches) -> None:
    """A hop to the thread and back costs more than a call: the loop is called once for many."""
    may_go_on = threading.Event()
    first = batches.do(may_go_on.wait)
    others = [batches.do(lambda: None) for _ in range(LARGEST_BATCH)]
    may_go_on.set()
    await first
    await others[0]
    assert all(other.done() for other in others)
