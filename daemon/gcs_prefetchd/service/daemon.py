"""The daemon from start to stop: opens its parts in order, runs, and closes them in reverse order."""

import asyncio
import gc
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.file_watcher import FileWatcher
from gcs_prefetchd.cache.page_cache import ReadAhead
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.fetch.prefetch_observer import PrefetchObserver
from gcs_prefetchd.fetch.prefetcher import Prefetcher
from gcs_prefetchd.fetch.process_messages import ProcessOptions
from gcs_prefetchd.fetch.process_pool import FetchProcesses
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.credentials import Access
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.server.control_api import Control, control_app
from gcs_prefetchd.server.runtime_settings import RuntimeSettings, make_slots
from gcs_prefetchd.server.statistics_api import statistics_app
from gcs_prefetchd.server.statistics_collector import StatisticsCollector
from gcs_prefetchd.service.background_tasks import background_tasks
from gcs_prefetchd.service.bucket_sync import BucketSync
from gcs_prefetchd.service.listeners import listen_for_readers, listen_for_statistics
from gcs_prefetchd.service.signals import stop_on_signals
from gcs_prefetchd.service.systemd import notify_systemd, ping_watchdog
from gcs_prefetchd.settings import MAX_CONCURRENCY, Settings, check_cache_fits_disk
from gcs_prefetchd.shared.errors import StartError
from gcs_prefetchd.shared.malloc import return_freed_memory
from gcs_prefetchd.shared.moving_average import MovingDuration
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Daemon", "ReadyDaemon", "serve"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadyDaemon:
    """Where to find a daemon that is ready: its process, its statistics and its files."""

    pid: int
    http: str
    cache_dir: Path


async def serve(settings: Settings, on_claimed: Callable[[], None], on_ready: Callable[[ReadyDaemon], None]) -> None:
    """Run the daemon until SIGTERM, SIGINT or a stop request; a second signal ends the process at once.

    Calls `on_claimed` when the cache directory belongs to this daemon, and `on_ready` when readers can connect. Raises
    PrefetchdError if the daemon cannot start.
    """
    check_cache_fits_disk(settings)
    # Imported modules stay in memory. To scan them for garbage would block the event loop for about 30 ms each time.
    gc.freeze()
    stopping = asyncio.Event()
    with stop_on_signals(stopping):
        stack = AsyncExitStack()
        try:
            ready = await _start_unless(stopping, stack.enter_async_context(Daemon(settings, stopping.set).running(on_claimed)))
            if ready is not None:
                on_ready(ready)
                notify_systemd("READY=1")
            await stopping.wait()
            notify_systemd("STOPPING=1")
            log.info("stopping")
        finally:
            # A timer instead of a timeout: the first part that hangs would use the timeout up, and the next could hang forever.
            asyncio.get_running_loop().call_later(settings.stop_deadline_s, _exit_as_if_killed, settings.stop_deadline_s)
            await stack.aclose()


async def _start_unless(stopping: asyncio.Event, starting: Coroutine[Any, Any, ReadyDaemon]) -> ReadyDaemon | None:
    """Start, or cancel the start if a stop is requested first: a listing can take minutes."""
    start, stop = asyncio.create_task(starting), asyncio.create_task(stopping.wait())
    await asyncio.wait([start, stop], return_when=asyncio.FIRST_COMPLETED)
    if not start.done():
        start.cancel()
        await asyncio.wait([start])
    stop.cancel()
    return None if start.cancelled() else start.result()


def _exit_as_if_killed(deadline_s: float) -> None:
    log.error("the stop took longer than %g s; exiting as if killed, which the cache survives", deadline_s)
    os._exit(1)


class Daemon:
    """The parts of one daemon. The constructor only builds them; `running` opens, starts and closes them."""

    def __init__(self, settings: Settings, stop: Callable[[], None]) -> None:
        self.settings = settings
        self.directory = CacheDirectory(settings.cache_dir)
        self.instance_id = uuid.uuid4().hex
        self.registry = Registry(
            settings.seed,
            settings.cache_size,
            window_items=settings.window_items,
            lru=settings.policy == "lru",
            download_s=(download_s := MovingDuration()),
        )
        observer = PrefetchObserver(self.registry)
        self.cache = Cache(self.directory, settings.cache_size, settings.min_free, observer)
        access = Access(settings.endpoint, settings.anonymous, settings.credentials, settings.user_project)
        slots = make_slots(settings, observer.slot_freed)
        # The slots bound the downloads, by a setting that may change. Pages of listings need connections in addition.
        self.gcs_client = GCSClient(
            access, connections=2 * MAX_CONCURRENCY, deadline_s=settings.deadline_s, before_page=slots.page
        )
        self.fetch_processes = self._make_fetch_processes() if settings.fetch_process_count else None
        self.fetcher = Fetcher(self.cache, self.gcs_client, slots, download_s, self.fetch_processes)
        self.runtime_settings = RuntimeSettings(settings, slots)
        self.read_ahead = ReadAhead(self.directory.objects) if settings.read_ahead else None
        self.prefetcher = Prefetcher(self.registry, self.cache, self.fetcher, observer, self.read_ahead)
        self.statistics = StatisticsCollector(
            self.instance_id,
            self.cache,
            self.registry,
            self.fetcher,
            self.prefetcher,
            self.gcs_client.counters,
            self.fetch_processes,
        )
        self.bucket_sync = BucketSync(
            settings, self.directory, self.gcs_client, self.cache, self.registry, self.fetcher, on_adopted=self.prefetcher.wake
        )
        self._stop = stop
        self._is_ready = False
        self._failure: BaseException | None = None

    def _make_fetch_processes(self) -> FetchProcesses:
        options = ProcessOptions(
            cache_dir=str(self.directory.path),
            endpoint=self.gcs_client.endpoint,
            is_anonymous=self.settings.anonymous,
            user_project=self.settings.user_project,
            connections=2 * MAX_CONCURRENCY,
            deadline_s=self.settings.deadline_s,
        )
        return FetchProcesses(self.settings.fetch_process_count, options, self.directory, self.gcs_client)

    @asynccontextmanager
    async def running(self, on_claimed: Callable[[], None] = lambda: None) -> AsyncIterator[ReadyDaemon]:
        """Run the daemon until the context is left. Raises PrefetchdError if it cannot start.

        Each step needs the ones before it. Leaving the context undoes them in reverse order.
        """
        async with AsyncExitStack() as stack:
            # 1. Claim the cache directory: from now on no other daemon writes there.
            self.directory.claim()
            stack.callback(self.directory.close)
            on_claimed()
            # 2. Open the cache. Its index is read in the background, so a large cache does not delay the start.
            await self.cache.open()
            stack.push_async_callback(self.cache.close)
            # 3. Connect to GCS. At the stop downloads end first, then fetch processes, then connections.
            await stack.enter_async_context(self.gcs_client)
            if self.fetch_processes is not None:
                stack.push_async_callback(self.fetch_processes.close)
            stack.push_async_callback(self.fetcher.close)
            # 4. Get a listing of each data root, a saved one if possible: every reader needs a manifest.
            relist_in_s = [await self.bucket_sync.load_or_list(root) for root in self.settings.roots]
            with self._disk_errors_fail_the_start():
                self._make_folders()
                # 5. Listen for statistics and for readers.
                app = statistics_app(self.statistics.collect, lambda: self._is_ready)
                url = await listen_for_statistics(stack, app, self.settings.http_address)
                await listen_for_readers(stack, control_app(self._control()), self.directory.socket)
                # 6. Start the background tasks: prefetching, rescans, relistings, the file watcher.
                await stack.enter_async_context(background_tasks(self._tasks(relist_in_s), self._fail))
                self.prefetcher.wake()
                # 7. Announce the daemon: readers find it through daemon.json.
                self.directory.write_daemon_file(self._daemon_file(url))
            stack.callback(self.directory.remove_daemon_file)
            # 8. Ready.
            self._is_ready = True
            log.info("ready: statistics at %s, cache in %s", url, self.directory.path)
            try:
                yield ReadyDaemon(os.getpid(), url, self.directory.path)
            finally:
                self._is_ready = False
        if self._failure is not None:
            raise StartError(f"the daemon failed: {self._failure!r}") from self._failure

    @contextmanager
    def _disk_errors_fail_the_start(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StartError(f"cache directory {self.directory.path}: {exc.strerror} ({exc.filename or 'socket'})") from exc

    def _make_folders(self) -> None:
        # watchdog warns about folders that appear while it scans the tree.
        for root in self.settings.roots:
            for folder in self.settings.item_patterns.folders():
                first = cache_path(root.bucket, f"{root.folder}{folder}first")
                (self.directory.objects / first).parent.mkdir(mode=0o750, parents=True, exist_ok=True)

    def _tasks(self, relist_in_s: list[float]) -> list[Coroutine[Any, Any, None]]:
        tasks: list[Coroutine[Any, Any, None]] = [self._prefetch(), self._rescan(), self._watch(), ping_watchdog()]
        tasks += [self.fetch_processes.run()] if self.fetch_processes is not None else []
        tasks += [self.read_ahead.run()] if self.read_ahead is not None else []
        for root, wait_s in zip(self.settings.roots, relist_in_s, strict=True):
            tasks.append(self.bucket_sync.relist_periodically(root, wait_s))
        return tasks

    async def _prefetch(self) -> None:
        # The planner must know all cached objects first, or they would be fetched again.
        await self.cache.wait_until_ready()
        await self.bucket_sync.adopt(self.cache.pages())
        await asyncio.to_thread(return_freed_memory)  # of the lists that loading the index needed
        await self.cache.shrink()
        await self.prefetcher.run()

    async def _watch(self) -> None:
        async with FileWatcher(self.cache, opens=self.settings.watch_opens):
            await asyncio.Event().wait()

    async def _rescan(self) -> None:
        await self.cache.wait_until_ready()
        while True:
            added, removed = await self.cache.rescan()
            if added or removed:
                log.info("rescan: %d files added to the index, %d removed from it", added, removed)
            self.registry.forget_idle()
            await asyncio.sleep(self.settings.rescan_s)

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._stop()

    def _control(self) -> Control:
        return Control(
            os.getpid(),
            self.instance_id,
            self.settings.roots,
            self.cache,
            self.registry,
            self.prefetcher,
            self.statistics,
            self.runtime_settings,
            self.bucket_sync.load_earlier_listing,
            self._stop,
        )

    def _daemon_file(self, url: str) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "instance_id": self.instance_id,
            "http": url,
            "socket": str(self.directory.socket),
            "data_roots": [root.uri for root in self.settings.roots],
        }
