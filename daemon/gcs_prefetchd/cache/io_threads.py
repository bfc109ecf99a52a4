"""The threads that touch a cache's disk, so that the event loop never waits for it."""

import asyncio
import functools
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from gcs_prefetchd.cache.batch_thread import BatchThread
from gcs_prefetchd.shared.errors import CacheWriteError

__all__ = ["DISK_THREADS", "Disk", "free_bytes"]

DISK_THREADS = 8

P = ParamSpec("P")
T = TypeVar("T")


class Disk:
    """Threads that read, the thread `files` that creates and removes files, and one for the index; each starts when first used.

    `files` calls `begin` before each batch.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._any = ThreadPoolExecutor(DISK_THREADS, "disk")
        self.files = BatchThread("files", begin)
        self._index = ThreadPoolExecutor(1, "index")

    async def call(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in one of the threads that read."""
        return await _run(self._any, functools.partial(call, *args, **kwargs))

    async def on_index(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in the index's own thread: SQLite ties a connection to the thread that made it."""
        return await _run(self._index, functools.partial(call, *args, **kwargs))

    async def close(self) -> None:
        """End the threads, once all that was begun has ended."""
        # Not here: a thread that is stuck in the disk must not stop the loop, and with it the deadline for stopping.
        for end in (self.files.close, self._any.shutdown, self._index.shutdown):
            await asyncio.to_thread(end)


def free_bytes(folder: Path) -> int:
    """What can still be written to the folder's disk; raises CacheWriteError where that cannot be told."""
    try:
        about = os.statvfs(folder)
    except OSError as exc:
        raise CacheWriteError(f"{exc.strerror} ({exc.filename})") from exc
    return about.f_bavail * about.f_frsize


async def _run(threads: Executor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, call)
