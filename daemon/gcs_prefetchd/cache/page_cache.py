"""Has the kernel read files into its page cache shortly before a reader opens them."""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from gcs_prefetchd.shared.checksums import OPEN_FLAGS

__all__ = ["ReadAhead"]

AT_A_TIME = 64
# What falls further behind than that is about to be opened anyway.
MOST_WAITING = 4096


class ReadAhead:
    """Asks for files below `objects`, in the order in which they are wanted; `run` does so until it is cancelled.

    One thread is enough: the kernel reads many files at a time, and only their inodes are waited for.
    """

    def __init__(self, objects: Path) -> None:
        self._objects = objects
        self._waiting: deque[str] = deque(maxlen=MOST_WAITING)
        self._something = asyncio.Event()

    def want(self, paths: Iterable[str]) -> None:
        """These will be opened soon."""
        self._waiting.extend(paths)
        self._something.set()

    async def run(self) -> None:
        """Read ahead until cancelled."""
        while True:
            await self._something.wait()
            batch = [self._waiting.popleft() for _ in range(min(AT_A_TIME, len(self._waiting)))]
            if not self._waiting:
                self._something.clear()
            await asyncio.to_thread(self._advise, batch)

    def _advise(self, paths: list[str]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):  # one that has just been dropped, or cannot be read: its reader finds out
                file = os.open(f"{self._objects}/{path}", OPEN_FLAGS)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)
