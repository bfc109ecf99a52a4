"""Short calls are done in their order by one thread, many at a hop, and each tells its own caller how it ended."""

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from gcs_prefetchd.cache.batch_thread import LARGEST_BATCH, Batches


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


async def test_calls_that_get_no_thread_fail_and_later_ones_are_made(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(OSError, match="no thread for it: can't start new thread"):
            await batches.do(lambda: made.append("first"))
    await batches.do(lambda: made.append("second"))
    await batches.do(lambda: made.append("third"))
    assert made == ["second", "third"]


async def test_without_memory_to_say_that_calls_were_made_it_is_said_later(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    say, refusals = loop.call_soon_threadsafe, iter([MemoryError(), MemoryError()])

    def refuse_at_first(*arguments: Any) -> asyncio.Handle:
        for refusal in refusals:
            raise refusal
        return say(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon_threadsafe", refuse_at_first)
        await asyncio.wait_for(batches.do(int), 5.0)
    await batches.do(int)


async def test_what_is_to_be_called_before_a_batch_may_fail() -> None:
    failures = iter([MemoryError()])

    def fail_once() -> None:
        for failure in failures:
            raise failure

    batches = Batches("test", fail_once)
    with pytest.raises(MemoryError):
        await batches.do(int)
    await batches.do(int)
    await asyncio.to_thread(batches.close)
