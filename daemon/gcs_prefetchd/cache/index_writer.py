"""Writes the cache's changes to its index: what changes within a tick shares one transaction, and a failure loses nothing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from gcs_prefetchd.cache.disk_index import INDEX_ERRORS, DiskIndex, IndexRecord

__all__ = ["IndexWriter"]

log = logging.getLogger(__name__)

TICK_S = 0.25
RETRY_S = 5.0


class IndexWriter:
    """Holds changes and writes them; `on_index` runs a blocking call in the index's own thread. `start` it, `stop` it."""

    def __init__(self, on_index: Callable[..., Awaitable[None]]) -> None:
        self.pending: dict[str, IndexRecord | None] = {}
        self._on_index = on_index
        self._index: DiskIndex | None = None
        self._failing = False
        self._applying: asyncio.Task[None] | None = None
        self._something = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    def start(self, index: DiskIndex) -> None:
        """Begin to write."""
        self._index = index
        self._writer = asyncio.create_task(self._write(), name="index writer")

    async def stop(self) -> None:
        """Write no more by itself; `flush` still does."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])

    def note(self, path: str, record: IndexRecord | None) -> None:
        """What the index should say of a path; None for nothing."""
        self.pending[path] = record
        self._something.set()

    async def flush(self) -> None:
        """Write what is pending now, or find that it cannot be written yet."""
        while self._applying is not None:  # one at a time: changes that could not be written come before later ones
            await asyncio.wait([self._applying])
        if self.pending and self._index is not None:
            changes, self.pending = self.pending, {}
            self._something.clear()
            self._applying = asyncio.create_task(self._apply(self._index, changes))
            await asyncio.wait([self._applying])

    async def _write(self) -> None:
        while True:
            await self._something.wait()
            await asyncio.sleep(RETRY_S if self._failing else TICK_S)
            await self.flush()

    async def _apply(self, index: DiskIndex, changes: dict[str, IndexRecord | None]) -> None:
        try:
            await self._on_index(index.apply, changes)
        except INDEX_ERRORS as exc:
            # Degraded, not lost: the files carry their stamps, and the next tick tries again.
            self.pending = changes | self.pending
            self._something.set()
            if not self._failing:
                log.warning("index: %d changes not written (%s); tried again every %g s", len(changes), exc, RETRY_S)
            self._failing = True
        else:
            if self._failing:
                log.info("index: written again")
            self._failing = False
        finally:
            self._applying = None
