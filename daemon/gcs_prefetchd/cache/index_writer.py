"""Writes the cache's changes to its index: one transaction for the changes of a tick, and a failure loses nothing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from gcs_prefetchd.cache.disk_index import INDEX_ERRORS, DiskIndex, IndexRecord

__all__ = ["IndexWriter"]

log = logging.getLogger(__name__)

TICK_S = 0.25
RETRY_S = 5.0


class IndexWriter:
    """Collects changes and writes them, from `start` to `stop`. `run_on_index` makes a blocking call in the index's thread."""

    def __init__(self, run_on_index: Callable[..., Awaitable[None]]) -> None:
        self.pending: dict[str, IndexRecord | None] = {}
        self._run_on_index = run_on_index
        self._index: DiskIndex | None = None
        self._is_failing = False
        self._applying: asyncio.Task[None] | None = None
        self._has_changes = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, index: DiskIndex) -> None:
        """Start to write."""
        self._index = index
        self._task = asyncio.create_task(self._write(), name="index writer")

    async def stop(self) -> None:
        """Stop writing; `flush` still writes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def note(self, path: str, record: IndexRecord | None) -> None:
        """Record what the index should hold for a path; None for nothing."""
        self.pending[path] = record
        self._has_changes.set()

    async def flush(self) -> None:
        """Try to write the pending changes now; those that cannot be written stay pending."""
        while self._applying is not None:  # one at a time: changes that failed go before later ones
            await asyncio.wait([self._applying])
        if self.pending and self._index is not None:
            changes, self.pending = self.pending, {}
            self._has_changes.clear()
            self._applying = asyncio.create_task(self._apply(self._index, changes))
            await asyncio.wait([self._applying])

    async def _write(self) -> None:
        while True:
            await self._has_changes.wait()
            await asyncio.sleep(RETRY_S if self._is_failing else TICK_S)
            await self.flush()

    async def _apply(self, index: DiskIndex, changes: dict[str, IndexRecord | None]) -> None:
        try:
            await self._run_on_index(index.apply, changes)
        except INDEX_ERRORS as exc:
            # Nothing is lost: the files have their stamps, and the next tick retries.
            self.pending = changes | self.pending
            self._has_changes.set()
            if not self._is_failing:
                log.warning("index: %d changes not written (%s); retrying every %g s", len(changes), exc, RETRY_S)
            self._is_failing = True
        else:
            if self._is_failing:
                log.info("index: changes written again")
            self._is_failing = False
        finally:
            self._applying = None
