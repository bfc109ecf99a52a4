"""Makes the kernel read files into its page cache shortly before a reader opens them."""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from gcs_prefetchd.shared.checked_read import OPEN_FLAGS

__all__ = ["ReadAhead"]

BATCH_FILES = 64
MAX_WAITING = 4096  # files further behind are about to be opened anyway


class ReadAhead:
    """Requests files below `objects` in the order of `enqueue`; `run` does so until it is cancelled.

    One thread is enough: the kernel reads many files at a time, and the thread waits only for their inodes.
    """

    def __init__(self, objects: Path) -> None:
        self._objects = objects
        self._waiting: deque[str] = deque(maxlen=MAX_WAITING)
        self._has_work = asyncio.Event()

    def enqueue(self, paths: Iterable[str]) -> None:
        """Readers will open these files soon."""
        self._waiting.extend(paths)
        self._has_work.set()

    async def run(self) -> None:
        """Read ahead until cancelled."""
        while True:
            await self._has_work.wait()
            batch = [self._waiting.popleft() for _ in range(min(BATCH_FILES, len(self._waiting)))]
            if not self._waiting:
                self._has_work.clear()
            await asyncio.to_thread(self._advise, batch)

    def _advise(self, paths: list[str]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):  # evicted meanwhile, or unreadable: its reader will see
                file = os.open(f"{self._objects}/{path}", OPEN_FLAGS)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)
