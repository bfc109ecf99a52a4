"""A thread that makes short blocking calls in order; each hand-over passes it all the calls that wait."""

import asyncio
import errno
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["BatchThread"]

MAX_BATCH = 32  # the caller of a batch's first call waits for all of it: a few milliseconds
NO_MEMORY_PAUSE_S = 0.1

_Call = tuple[Callable[[], object], asyncio.Future[None]]


class BatchThread:
    """Makes calls in the order of `submit`, in a thread named `name` that the first call starts and `close` stops.

    `before_batch` is called in that thread before each batch. If no thread or memory is available, the waiting calls
    fail with OSError and are not made; later calls may succeed.

    For files that are created and unlinked in few folders: the kernel lets one thread at a time into a folder, and threads that
    wait there burn their processor. Handing a call over costs a third of the call itself, so many are handed over together.
    """

    def __init__(self, name: str, before_batch: Callable[[], None] = lambda: None) -> None:
        self._before_batch = before_batch
        self._thread = ThreadPoolExecutor(1, name)
        self._waiting: list[_Call] = []
        self._is_busy = False

    def submit(self, call: Callable[[], object]) -> asyncio.Future[None]:
        """Queue the call; the future reports its end. Cancelling the future does not cancel the call."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((call, future))
        if not self._is_busy:
            self._hand_over()
        return future

    def close(self) -> None:
        """Wait for the thread to stop. Blocks."""
        self._thread.shutdown()

    def _hand_over(self) -> None:
        self._is_busy = bool(self._waiting)
        if self._is_busy:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            try:
                self._thread.submit(self._run, batch, asyncio.get_running_loop())
            except (RuntimeError, MemoryError) as exc:
                self._fail(batch, exc)

    def _fail(self, batch: list[_Call], error: Exception) -> None:
        """Fail this batch and all calls behind it, which would otherwise wait forever."""
        self._is_busy = False
        futures = [future for _, future in batch + self._waiting if not future.done()]
        batch.clear()  # the executor may keep it for its next thread all the same
        self._waiting.clear()
        for future in futures:
            future.set_exception(OSError(errno.ENOMEM, f"no thread for it: {error}"))

    def _run(self, batch: list[_Call], loop: asyncio.AbstractEventLoop) -> None:
        outcomes: list[BaseException | None] = [None] * len(batch)
        for number, (call, _) in enumerate(batch):
            try:
                if number == 0:
                    self._before_batch()
                call()
            except BaseException as exc:
                outcomes[number] = exc
        while True:
            try:
                loop.call_soon_threadsafe(self._report, batch, outcomes)
                break
            except MemoryError:  # otherwise these calls would never be reported, and no other call would be made
                time.sleep(NO_MEMORY_PAUSE_S)

    def _report(self, batch: list[_Call], outcomes: list[BaseException | None]) -> None:
        self._hand_over()
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if future.done():
                continue  # its caller was cancelled
            if outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)
