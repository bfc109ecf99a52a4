"""One thread makes short calls in order, many to a hand-over, and reports each one's end to its own caller."""

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from gcs_prefetchd.cache.batch_thread import MAX_BATCH, BatchThread


@pytest.fixture
async def thread() -> AsyncIterator[BatchThread]:
    under_test = BatchThread("test")
    yield under_test
    await asyncio.to_thread(under_test.close)


async def test_one_thread_makes_the_calls_in_order(thread: BatchThread) -> None:
    made: list[int] = []
    threads: set[str] = set()

    def call(number: int) -> None:
        made.append(number)
        threads.add(threading.current_thread().name)

    await asyncio.gather(*(thread.submit(partial(call, number)) for number in range(5 * MAX_BATCH + 1)))

    assert made == list(range(5 * MAX_BATCH + 1))
    assert len(threads) == 1
    assert threads.pop().startswith("test")


async def test_a_failing_call_fails_alone(thread: BatchThread) -> None:
    def fail() -> None:
        raise FileNotFoundError("not there")

    results = await asyncio.gather(thread.submit(int), thread.submit(fail), thread.submit(int), return_exceptions=True)

    assert [repr(one) for one in results] == ["None", "FileNotFoundError('not there')", "None"]


async def test_a_cancelled_caller_cancels_no_call(thread: BatchThread) -> None:
    may_continue = threading.Event()
    made: list[str] = []
    first = thread.submit(may_continue.wait)
    second = thread.submit(lambda: made.append("second"))
    third = thread.submit(lambda: made.append("third"))
    first.cancel()
    second.cancel()
    may_continue.set()
    await third
    assert made == ["second", "third"]


async def test_calls_submitted_during_a_batch_form_the_next_batch(thread: BatchThread) -> None:
    """A hand-over costs more than a call, so the loop is called once for many."""
    may_continue = threading.Event()
    first = thread.submit(may_continue.wait)
    others = [thread.submit(lambda: None) for _ in range(MAX_BATCH)]
    may_continue.set()
    await first
    await others[0]
    assert all(other.done() for other in others)


async def test_calls_without_a_thread_fail_and_later_calls_succeed(
    thread: BatchThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(OSError, match="no thread for it: can't start new thread"):
            await thread.submit(lambda: made.append("first"))
    await thread.submit(lambda: made.append("second"))
    await thread.submit(lambda: made.append("third"))
    assert made == ["second", "third"]


async def test_outcomes_that_cannot_be_reported_for_lack_of_memory_are_reported_later(
    thread: BatchThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    report, refusals = loop.call_soon_threadsafe, iter([MemoryError(), MemoryError()])

    def fail_at_first(*arguments: Any) -> asyncio.Handle:
        for refusal in refusals:
            raise refusal
        return report(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon_threadsafe", fail_at_first)
        await asyncio.wait_for(thread.submit(int), 5.0)
    await thread.submit(int)


async def test_a_failing_call_before_a_batch_fails_that_batch_only() -> None:
    failures = iter([MemoryError()])

    def fail_once() -> None:
        for failure in failures:
            raise failure

    thread = BatchThread("test", fail_once)
    with pytest.raises(MemoryError):
        await thread.submit(int)
    await thread.submit(int)
    await asyncio.to_thread(thread.close)
