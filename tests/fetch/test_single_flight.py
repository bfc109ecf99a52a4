"""One task per key at a time, shared by any number of callers."""

import asyncio

import pytest

from gcs_prefetchd.fetch.single_flight import SingleFlight


class Work:
    """Work that ends when a test sets an event; `runs` counts how often it was started."""

    def __init__(self, error: Exception | None = None) -> None:
        self.runs = 0
        self.may_end = asyncio.Event()
        self._error = error

    async def run(self) -> None:
        self.runs += 1
        await self.may_end.wait()
        if self._error is not None:
            raise self._error


async def settle() -> None:
    """Run every task until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_callers_share_a_running_task() -> None:
    flights, work = SingleFlight[str](), Work()
    flight = flights.get_or_start("a", "terms of a", work.run, "fetch a")
    assert flights.get("a") is flight
    assert (flight.terms, flight.task.get_name()) == ("terms of a", "fetch a")
    callers = [asyncio.create_task(flight.join()) for _ in range(5)]
    await settle()
    work.may_end.set()
    assert await asyncio.gather(*callers) == [True] * 5
    assert work.runs == 1


async def test_a_second_start_of_a_key_gets_the_running_task_with_its_terms() -> None:
    flights, first, second = SingleFlight[str](), Work(), Work()
    flight = flights.get_or_start("a", "first", first.run, "a")
    assert flights.get_or_start("a", "second", second.run, "a") is flight
    await settle()
    assert (flight.terms, first.runs, second.runs) == ("first", 1, 0)
    await flights.close()


async def test_tasks_of_different_keys_run_side_by_side() -> None:
    flights, works = SingleFlight[None](), {"a": Work(), "b": Work()}
    for key, work in works.items():
        flights.get_or_start(key, None, work.run, key)
    await settle()
    assert [work.runs for work in works.values()] == [1, 1]
    assert set(flights.tasks) == {"a", "b"}
    await flights.close()


async def test_a_key_is_free_again_once_its_task_has_ended() -> None:
    flights = SingleFlight[None]()
    for _ in range(2):
        work = Work()
        work.may_end.set()
        assert await flights.get_or_start("a", None, work.run, "a").join()
        await settle()
        assert flights.get("a") is None


async def test_every_caller_gets_the_error() -> None:
    flights, work = SingleFlight[None](), Work(ValueError("broken"))
    flight = flights.get_or_start("a", None, work.run, "a")
    callers = [asyncio.create_task(flight.join()) for _ in range(3)]
    await settle()
    work.may_end.set()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert [str(error) for error in errors] == ["broken"] * 3


async def test_an_error_without_a_waiting_caller_is_not_reported() -> None:
    flights, work = SingleFlight[None](), Work(ValueError("broken"))
    reports: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    task = flights.get_or_start("a", None, work.run, "a").task
    work.may_end.set()
    await asyncio.wait([task])
    await settle()
    del task
    assert reports == []


async def test_a_caller_that_is_cancelled_leaves_the_task_to_the_others() -> None:
    flights, work = SingleFlight[None](), Work()
    flight = flights.get_or_start("a", None, work.run, "a")
    leaving, staying = (asyncio.create_task(flight.join()) for _ in range(2))
    await settle()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    work.may_end.set()
    assert await staying


async def test_close_cancels_every_task_and_its_callers_are_informed() -> None:
    flights, work = SingleFlight[None](), Work()
    flight = flights.get_or_start("a", None, work.run, "a")
    caller = asyncio.create_task(flight.join())
    await settle()
    await flights.close()
    assert await caller is False
    assert flight.task.cancelled()
    assert flights.is_closed
    assert flights.tasks == {}


async def test_a_caller_that_is_cancelled_during_close_is_cancelled() -> None:
    flights, work = SingleFlight[None](), Work()
    caller = asyncio.create_task(flights.get_or_start("a", None, work.run, "a").join())
    await settle()
    caller.cancel()
    await flights.close()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_close_without_tasks_returns() -> None:
    flights = SingleFlight[None]()
    await flights.close()
    assert flights.is_closed
