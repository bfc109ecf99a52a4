"""The daemon's long-running tasks: started together, cancelled together, and none fails unnoticed."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["background_tasks"]

log = logging.getLogger(__name__)


@asynccontextmanager
async def background_tasks(
    coroutines: Iterable[Coroutine[Any, Any, None]], on_failure: Callable[[BaseException], None]
) -> AsyncIterator[None]:
    """Run the coroutines until the context is left, which cancels them. Logs a failure and passes it to `on_failure`."""

    def check(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s failed: %r", task.get_coro(), error, exc_info=error)
            on_failure(error)

    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(check)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
