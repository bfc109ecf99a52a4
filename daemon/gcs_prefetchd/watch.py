"""What other programs do in the tree of files: watchdog's thread tells the event loop through a janus queue. Hints only.

An open by path counts as a use, and a file deleted by hand leaves the index at once. Events get lost (a burst overflows the
kernel's queue, a system has too few inotify watches): the periodic rescan is the truth.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from queue import Full
from typing import Self

import janus
from watchdog.events import FileDeletedEvent, FileOpenedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers.inotify import InotifyObserver

from gcs_prefetchd.cache import Cache

__all__ = ["Watch"]

log = logging.getLogger(__name__)

QUEUE_LENGTH = 16_384  # as long as the kernel's own


class Watch:
    """Watches the cache's files for as long as the context is entered."""

    def __init__(self, cache: Cache, *, opens: bool) -> None:
        self._cache = cache
        self._events: list[type[FileSystemEvent]] = [FileDeletedEvent, FileOpenedEvent] if opens else [FileDeletedEvent]
        self._observer = InotifyObserver()
        self._queue: janus.Queue[FileSystemEvent]
        self._reader: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._queue = janus.Queue(QUEUE_LENGTH)
        self._reader = asyncio.create_task(self._read(), name="watch")
        handler = _Handler(self._queue.sync_q.put_nowait)
        objects = str(self._cache.directory.objects)
        try:
            self._observer.schedule(handler, objects, recursive=True, event_filter=self._events)
            await asyncio.to_thread(self._observer.start)
        except OSError as exc:
            log.warning(
                "%s: not watched (%s); a rescan finds what changes there. Raise fs.inotify.max_user_watches", objects, exc
            )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._observer.is_alive():
            self._observer.stop()
            await asyncio.to_thread(self._observer.join)
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._queue.aclose()

    async def _read(self) -> None:
        objects = self._cache.directory.objects
        while True:
            event = await self._queue.async_q.get()
            path = Path(str(event.src_path))
            relative = path.relative_to(objects).as_posix()
            if isinstance(event, FileOpenedEvent):
                self._cache.touch(relative)
            elif self._cache.stamp(relative) is not None and not await self._cache.on_disk(path.exists):
                self._cache.forget(relative)


class _Handler(FileSystemEventHandler):
    def __init__(self, put: Callable[[FileSystemEvent], None]) -> None:
        self._put = put

    def on_any_event(self, event: FileSystemEvent) -> None:
        try:
            self._put(event)
        except (Full, janus.SyncQueueShutDown):
            return  # a hint lost: the rescan will see
