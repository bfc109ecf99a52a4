"""The threads that make a cache's blocking calls, so that the event loop never waits for the disk."""

import asyncio
import functools
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from gcs_prefetchd.cache.batch_thread import BatchThread
from gcs_prefetchd.shared.errors import CacheWriteError

__all__ = ["READ_THREADS", "IOThreads", "free_bytes"]

READ_THREADS = 8

P = ParamSpec("P")
T = TypeVar("T")


class IOThreads:
    """Threads that read, the thread `files` that creates and removes files, and one for the index; each starts when first used.

    `files` calls `before_batch` before each batch.
    """

    def __init__(self, before_batch: Callable[[], None]) -> None:
        self.files = BatchThread("files", before_batch)
        self._readers = ThreadPoolExecutor(READ_THREADS, "disk")
        self._index = ThreadPoolExecutor(1, "index")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a blocking call in one of the threads that read."""
        return await _run(self._readers, functools.partial(call, *args, **kwargs))

    async def run_on_index(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a blocking call in the index's own thread: SQLite ties a connection to the thread that made it."""
        return await _run(self._index, functools.partial(call, *args, **kwargs))

    async def close(self) -> None:
        """Stop the threads, after the calls that were started."""
        # In other threads: one that is stuck in the disk must not stop the loop, and with it the deadline for stopping.
        for stop in (self.files.close, self._readers.shutdown, self._index.shutdown):
            await asyncio.to_thread(stop)


def free_bytes(folder: Path) -> int:
    """The bytes that can still be written to the folder's disk; raises CacheWriteError if that is not known."""
    try:
        status = os.statvfs(folder)
    except OSError as exc:
        raise CacheWriteError(f"{exc.strerror} ({exc.filename})") from exc
    return status.f_bavail * status.f_frsize


async def _run(threads: Executor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, call)
