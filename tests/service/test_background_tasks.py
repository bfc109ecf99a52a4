"""Background tasks: a failure is reported, and leaving the context cancels what still runs."""

import asyncio
import logging

import pytest

from gcs_prefetchd.service.background_tasks import background_tasks


async def test_leaving_the_context_cancels_the_tasks_and_waits_for_their_cleanup() -> None:
    has_started = asyncio.Event()
    cleaned_up: list[bool] = []
    failures: list[BaseException] = []

    async def run_forever() -> None:
        try:
            has_started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.to_thread(cleaned_up.append, True)

    async with background_tasks([run_forever()], failures.append):
        await has_started.wait()
    assert (cleaned_up, failures) == ([True], [])


async def test_a_failure_is_logged_and_reported_while_the_other_tasks_keep_running(caplog: pytest.LogCaptureFixture) -> None:
    failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    is_cancelled = asyncio.Event()

    async def fail() -> None:
        raise ValueError("broken")

    async def run_forever() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            is_cancelled.set()
            raise

    with caplog.at_level(logging.CRITICAL):
        async with background_tasks([fail(), run_forever()], failure.set_result):
            assert str(await asyncio.wait_for(failure, 10)) == "broken"
            assert not is_cancelled.is_set()
    assert is_cancelled.is_set()
    (message,) = caplog.messages
    assert "fail" in message
    assert "broken" in message


async def test_a_task_that_returns_is_not_a_failure() -> None:
    is_done = asyncio.Event()
    failures: list[BaseException] = []

    async def finish() -> None:
        is_done.set()

    async with background_tasks([finish()], failures.append):
        await asyncio.wait_for(is_done.wait(), 10)
    assert failures == []
