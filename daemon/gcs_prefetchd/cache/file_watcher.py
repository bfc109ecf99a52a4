"""Watches what other programs do with the files: watchdog's thread reports events to the event loop through a janus queue.

An open by path counts as a use, and a file deleted by hand leaves the index at once. Both are hints only, for events get lost
(a burst overflows the kernel's queue, or the system has too few inotify watches): the periodic rescan finds the truth.
"""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from queue import Full
from typing import Self

import janus
from watchdog.events import FileDeletedEvent, FileOpenedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers.inotify import InotifyObserver

from gcs_prefetchd.cache.cache import Cache

__all__ = ["FileWatcher"]

log = logging.getLogger(__name__)

QUEUE_LENGTH = 16_384  # as long as the kernel's own
ADVICE = "Raise fs.inotify.max_user_watches and max_user_instances"
BATCH_EVENTS = 256  # handled before other tasks on the event loop have their turn


class FileWatcher:
    """Watches the cache's files for as long as the context is entered."""

    def __init__(self, cache: Cache, *, opens: bool) -> None:
        self._cache = cache
        self._events: list[type[FileSystemEvent]] = [FileDeletedEvent, FileOpenedEvent] if opens else [FileDeletedEvent]
        self._observer: InotifyObserver | None = None
        self._queue: janus.Queue[FileSystemEvent]
        self._reader: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._queue = janus.Queue(QUEUE_LENGTH)
        self._reader = asyncio.create_task(self._read(), name="file watcher")
        objects = self._cache.directory.objects
        starting = asyncio.create_task(asyncio.to_thread(self._start, objects))
        try:
            unwatched = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait([starting])  # the thread continues, and what it starts must be stopped
            await self.__aexit__()
            raise
        except OSError as exc:
            log.warning("%s: not watched (%s); a rescan finds the changes. %s", objects, exc.strerror or exc, ADVICE)
        else:
            if unwatched > 0:
                log.warning("%s: %d folders not watched; a rescan finds the changes. %s", objects, unwatched, ADVICE)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._observer is not None:
            await asyncio.to_thread(self._stop, self._observer)
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._queue.aclose()

    def _start(self, objects: Path) -> int:
        """Returns how many folders are not watched: watchdog skips folders when the system has no watch left."""
        self._observer = InotifyObserver()
        handler = _Handler(self._queue.sync_q.put_nowait)
        self._observer.schedule(handler, str(objects), recursive=True, event_filter=self._events)
        self._observer.start()
        return _count_folders(objects) - _count_inotify_watches()

    @staticmethod
    def _stop(observer: InotifyObserver) -> None:
        observer.stop()
        if observer.is_alive():
            observer.join()

    async def _read(self) -> None:
        for count in itertools.count(1):
            event = await self._queue.async_q.get()
            path = os.fsdecode(event.src_path).removeprefix(f"{self._cache.directory.objects}/")
            if isinstance(event, FileOpenedEvent):
                self._cache.record_open(path)
            else:
                await self._cache.check_file(path)
            if count % BATCH_EVENTS == 0:
                await asyncio.sleep(0)


def _count_folders(folder: Path | str) -> int:
    """Count the folders, this one included; `os.walk` would list every file."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return 1 + sum(_count_folders(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    return 0


def _count_inotify_watches() -> int:
    """Count the watches of this process."""
    watches = 0
    for descriptor in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            watches += descriptor.read_bytes().count(b"inotify wd:")
    return watches


class _Handler(FileSystemEventHandler):
    def __init__(self, put: Callable[[FileSystemEvent], None]) -> None:
        self._put = put

    def on_any_event(self, event: FileSystemEvent) -> None:
        try:
            self._put(event)
        except (Full, janus.SyncQueueShutDown):
            return  # a lost hint: the rescan will find the change
