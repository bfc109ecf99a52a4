"""The life of a path: a file is published there, evicted, or found to be gone. Lives on the event loop; a thread unlinks."""

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

from gcs_prefetchd.cache.file_scan import unlink_all
from gcs_prefetchd.cache.io_threads import IOThreads
from gcs_prefetchd.cache.memory_index import MemoryIndex
from gcs_prefetchd.cache.observer import CacheObserver
from gcs_prefetchd.cache.path_states import PathState, PathStates
from gcs_prefetchd.cache.safe_folders import SafeFolders
from gcs_prefetchd.shared.checked_read import Stamp

__all__ = ["PathLifecycle"]

log = logging.getLogger(__name__)


class PathLifecycle:
    """Keeps each path's state, its entry in the memory index and its file in step, and reports changes to `observer`.

    Every `claim` must be followed by `commit` or `abandon`. Between them the path is left alone, so that no unlink meant for
    the older file removes the new one.
    """

    def __init__(self, memory_index: MemoryIndex, observer: CacheObserver, io: IOThreads, folders: SafeFolders) -> None:
        self.states = PathStates(memory_index.__contains__)
        self._memory_index = memory_index
        self._observer = observer
        self._io = io
        self._folders = folders
        self._unlinking: set[asyncio.Task[None]] = set()
        self._held: set[asyncio.Task[None]] = set()

    def evictable_bytes(self, path: str) -> int:
        """Bytes freed by evicting `path`; 0 if it is not cached or is being replaced."""
        return 0 if self.states.is_publishing(path) else self._memory_index.size(path)

    async def claim(self, path: str) -> None:
        """Return when a file may be published at the path: when no older one is being unlinked there."""
        while self.states.state(path) is PathState.UNLINKING:
            await asyncio.wait(self._unlinking)
        if not self.states.is_publishing(path):  # else the clean-up of a cancelled download is still going on
            self.states.move(path, PathState.PUBLISHING)

    def commit(self, path: str, stamp: Stamp) -> None:
        """A file was published at the path."""
        self.states.move(path, PathState.CACHED)
        self._memory_index.put(path, stamp)
        self._observer.arrived(path, stamp)

    def abandon(self, path: str) -> None:
        """No file will be published at the path."""
        if path not in self._memory_index:
            self.states.move(path, PathState.ABSENT)
        elif self.states.state(path) is PathState.PUBLISHING_OR_EVICTING:
            self.unlink([path])
        else:
            self.states.move(path, PathState.CACHED)

    async def evict(self, path: str) -> None:
        """Remove a file; if it is being replaced, the replacement removes it; if that fails, it is evicted then."""
        if self.states.is_publishing(path):
            self.states.move(path, PathState.PUBLISHING_OR_EVICTING)
        elif path in self._memory_index:
            self.unlink([path])
        await self.wait_for_unlinks()

    def evict_all(self, paths: Iterable[str]) -> int:
        """Start to remove those files that are cached and are not being replaced; returns how many."""
        victims = [path for path in paths if path in self._memory_index and not self.states.is_publishing(path)]
        self.unlink(victims)
        return len(victims)

    def forget(self, path: str) -> None:
        """The file is gone: some other program deleted it."""
        if self._memory_index.remove(path):
            self._observer.lost(path)

    def unlink(self, paths: list[str]) -> None:
        """Start to remove files, which need not have entries."""
        stamps = {path: self._memory_index.get(path) for path in paths}
        for path in stamps:
            self.states.move(path, PathState.UNLINKING)
            self.forget(path)
        if stamps:
            _keep(asyncio.create_task(self._unlink(stamps), name="unlink"), self._unlinking)

    @property
    def is_unlinking(self) -> bool:
        """Whether any file is being removed."""
        return bool(self._unlinking)

    async def wait_for_unlinks(self) -> None:
        """Wait until the files that are being removed now are gone, or are known to stay."""
        if self._unlinking:
            await asyncio.wait(self._unlinking)

    def hold(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that runs to its end even if its caller is cancelled: at the latest, `close` waits for it."""
        return _keep(asyncio.create_task(work), self._held)

    async def close(self) -> None:
        """Wait for everything that was started."""
        while self._unlinking or self._held:
            await asyncio.wait(self._unlinking | self._held)

    async def _unlink(self, stamps: dict[str, Stamp | None]) -> None:
        failed: dict[str, str] = {}
        try:
            await self._io.files.submit(lambda: failed.update(unlink_all(self._folders, stamps)))
        except OSError as exc:
            log.warning("%d cached files: cannot be unlinked: %s", len(stamps), exc.strerror)
            failed = dict.fromkeys(stamps, str(exc.strerror))
        finally:
            for path in stamps:
                self.states.move(path, PathState.ABSENT)
        for path in failed:  # it is still on the disk, and counts
            if (stamp := stamps[path]) is not None:
                self.commit(path, stamp)


def _keep(task: asyncio.Task[None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
