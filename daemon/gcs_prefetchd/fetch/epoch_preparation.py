"""Prepares the orders of the epochs that will be needed next, in threads: meanwhile readers continue with what is known."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.planning.stream import Epoch

__all__ = ["EpochPreparation"]


class EpochPreparation:
    """`start_due` starts the threads. `close` must be called at the end.

    Calls `on_started` when a seeded epoch has started, `on_known` when a stream's next epoch is known, and `on_idle` when a
    thread has ended, successfully or not.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        on_started: Callable[[], None],
        on_known: Callable[[], None],
        on_idle: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._on_started = on_started
        self._on_known = on_known
        self._on_idle = on_idle
        self._prepared_after: dict[str, Epoch] = {}  # by stream, the epoch after which one is being prepared
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether an epoch is being prepared."""
        return bool(self._tasks)

    def start_due(self) -> None:
        """Start to prepare every epoch that is due."""
        for data_root, number in self._registry.seeded.pop_due():
            self._start(self._prepare_seeded(data_root, number), f"epoch {number} of {data_root}")
        for reader in self._registry:
            stream = reader.stream
            has_next_epoch = reader.indices is not None and stream.next_epoch is None
            if has_next_epoch and self._prepared_after.get(stream.id) is not stream.epoch:
                self._prepared_after[stream.id] = stream.epoch
                self._start(self._prepare_next(reader), f"next epoch of {stream.id}")

    async def close(self) -> None:
        """Cancel the tasks and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _prepare_seeded(self, data_root: str, number: int) -> None:
        self._registry.start_seeded(await asyncio.to_thread(self._registry.seeded.prepare, data_root, number))
        self._on_started()

    async def _prepare_next(self, reader: Reader) -> None:
        current = reader.stream.epoch
        epoch = await asyncio.to_thread(reader.prepare_next_epoch)
        if self._prepared_after.get(reader.stream.id) is current:
            del self._prepared_after[reader.stream.id]
        if epoch is not None and reader.stream.epoch is current:
            reader.stream.set_next_epoch(epoch)
            self._on_known()

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._on_idle()
