"""One task per key at a time, which any number of callers share, as in groupcache's singleflight."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Flight", "SingleFlight"]

Terms = TypeVar("Terms")


@dataclass(frozen=True, slots=True)
class Flight(Generic[Terms]):
    """A running task, and the terms on which it was started: by them a caller decides whether to share it.

    The task belongs to all callers: only `SingleFlight.close` may cancel it.
    """

    terms: Terms
    task: asyncio.Task[None]

    async def join(self) -> bool:
        """Wait for the task and raise its error; returns False if `close` cancelled it.

        A caller that is cancelled leaves the task running, for the other callers and because its work is half done.
        """
        try:
            await asyncio.shield(self.task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self.task.cancelled() and caller is not None and not caller.cancelling():
                return False
            raise
        return True


class SingleFlight(Generic[Terms]):
    """The running tasks by key."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight[Terms]] = {}
        self.is_closed = False

    @property
    def tasks(self) -> dict[str, asyncio.Task[None]]:
        """The running tasks by key."""
        return {key: flight.task for key, flight in self._flights.items()}

    def get(self, key: str) -> Flight[Terms] | None:
        """The running task of this key."""
        return self._flights.get(key)

    def get_or_start(self, key: str, terms: Terms, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> Flight[Terms]:
        """The running task of this key, or a new one, which then has these `terms`. Not after `close`."""
        assert not self.is_closed
        if (running := self._flights.get(key)) is not None:
            return running
        task = asyncio.create_task(work(), name=name)
        flight = self._flights[key] = Flight(terms, task)
        task.add_done_callback(lambda done: self._end(key, done))
        return flight

    async def close(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        self.is_closed = True
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, key: str, task: asyncio.Task[None]) -> None:
        del self._flights[key]
        if not task.cancelled():
            task.exception()  # every caller got it; if none is left, it is not needed
