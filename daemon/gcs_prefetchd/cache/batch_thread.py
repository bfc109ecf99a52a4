"""Short blocking calls, done one after another by one thread that is handed whatever waits at once."""

import asyncio
import errno
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["Batches"]

# Whoever waits for the first of a batch waits for all of it: a few milliseconds.
LARGEST_BATCH = 32
NO_MEMORY_PAUSE_S = 0.1

_Call = tuple[Callable[[], object], asyncio.Future[None]]


class Batches:
    """Calls in the order in which they came, in a thread named `name`. Nothing is begun before the first; `close` ends it.

    `begin` is called in that thread before each batch. Where there is no thread to be had, or no memory, calls fail with
    OSError and are not made; those that come later may be.

    For files that are made and unlinked in few folders: the kernel lets one thread at a time into a folder, and those that
    wait there burn their processor. To hand a call over takes a third of what it takes itself, so many go together.
    """

    def __init__(self, name: str, begin: Callable[[], None] = lambda: None) -> None:
        self._begin = begin
        self._thread = ThreadPoolExecutor(1, name)
        self._waiting: list[_Call] = []
        self._busy = False

    def do(self, call: Callable[[], object]) -> asyncio.Future[None]:
        """Have the call done; the future tells how it ended. To cancel it does not keep the call from being made."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((call, future))
        if not self._busy:
            self._hand_over()
        return future

    def close(self) -> None:
        """Wait for the thread to end. Blocks."""
        self._thread.shutdown()

    def _hand_over(self) -> None:
        self._busy = bool(self._waiting)
        if self._busy:
            batch, self._waiting = self._waiting[:LARGEST_BATCH], self._waiting[LARGEST_BATCH:]
            try:
                self._thread.submit(self._run, batch, asyncio.get_running_loop())
            except (RuntimeError, MemoryError) as exc:
                self._fail(batch, exc)

    def _fail(self, batch: list[_Call], error: Exception) -> None:
        """Nobody makes these calls, nor those behind them: say so, or all would wait for ever."""
        self._busy = False
        futures = [future for _, future in batch + self._waiting if not future.done()]
        batch.clear()  # it may stand in line for the next thread all the same
        self._waiting.clear()
        for future in futures:
            future.set_exception(OSError(errno.ENOMEM, f"no thread for it: {error}"))

    def _run(self, batch: list[_Call], loop: asyncio.AbstractEventLoop) -> None:
        outcomes: list[BaseException | None] = [None] * len(batch)
        for number, (call, _) in enumerate(batch):
            try:
                if number == 0:
                    self._begin()
                call()
            except BaseException as exc:
                outcomes[number] = exc
        while True:
            try:
                loop.call_soon_threadsafe(self._done, batch, outcomes)
                break
            except MemoryError:  # else nobody would ever hear of these calls, nor any other be made
                time.sleep(NO_MEMORY_PAUSE_S)

    def _done(self, batch: list[_Call], outcomes: list[BaseException | None]) -> None:
        self._hand_over()
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if future.done():
                continue  # cancelled by who waited for it
            if outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)
