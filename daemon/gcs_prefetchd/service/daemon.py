"""The daemon from start to stop: opens its parts in order, runs, and closes them in reverse."""

import asyncio
import errno
import gc
import logging
import os
import resource
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.file_watcher import Watch
from gcs_prefetchd.cache.page_cache import ReadAhead
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.fetch.prefetch_observer import PrefetchObserver
from gcs_prefetchd.fetch.prefetcher import Prefetcher
from gcs_prefetchd.fetch.process_messages import ProcessOptions
from gcs_prefetchd.fetch.process_pool import FetchProcesses
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.credentials import Access
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.server.bounded_listener import ConnectionLimits, listen
from gcs_prefetchd.server.control_api import Control, control_app
from gcs_prefetchd.server.runtime_settings import RuntimeSettings, make_slots
from gcs_prefetchd.server.statistics_api import statistics_app
from gcs_prefetchd.server.statistics_collector import StatisticsCollector
from gcs_prefetchd.service.bucket_sync import BucketSync
from gcs_prefetchd.service.systemd import notify_systemd, ping_watchdog
from gcs_prefetchd.settings import MAX_CONCURRENCY, Settings, check_cache_fits_disk
from gcs_prefetchd.shared.daemon_client import short_address
from gcs_prefetchd.shared.errors import StartError
from gcs_prefetchd.shared.malloc import return_freed_memory
from gcs_prefetchd.shared.moving_average import MovingDuration
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Daemon", "ReadyDaemon", "serve"]

log = logging.getLogger(__name__)

# Anyone on the node may come for the statistics, and what asks for them asks again or comes anew.
STATISTICS_LIMITS = ConnectionLimits(connections=128, idle_s=5.0)
MOST_READERS = 4096  # two connections for each process of a job
READERS_IDLE_S = 75.0


@dataclass(frozen=True, slots=True)
class ReadyDaemon:
    """A daemon that is ready: where its statistics and its files are."""

    pid: int
    http: str
    cache_dir: Path


async def serve(settings: Settings, on_claimed: Callable[[], None], on_ready: Callable[[ReadyDaemon], None]) -> None:
    """Run the daemon until SIGTERM, SIGINT or a stop request; a second signal ends the process at once.

    `on_claimed` is called once the cache directory is ours, `on_ready` once readers can come. Raises PrefetchdError where it
    cannot start.
    """
    check_cache_fits_disk(settings)
    # What has been imported stays: to look through it for garbage would hold up the event loop for some 30 ms each time.
    gc.freeze()
    stopping = asyncio.Event()
    with _signals(stopping):
        stack = AsyncExitStack()
        try:
            started = await _unless(stopping, stack.enter_async_context(Daemon(settings, stopping.set).running(on_claimed)))
            if started is not None:
                on_ready(started)
                notify_systemd("READY=1")
            await stopping.wait()
            notify_systemd("STOPPING=1")
            log.info("stopping")
        finally:
            # A timer and no timeout: the first part that hangs would use that up, and the next could hang for ever.
            asyncio.get_running_loop().call_later(settings.stop_deadline_s, _end_as_if_killed, settings.stop_deadline_s)
            await stack.aclose()


async def _unless(stopping: asyncio.Event, starting: Coroutine[Any, Any, ReadyDaemon]) -> ReadyDaemon | None:
    """Start, or give it up where the stop comes first: a listing can take minutes."""
    start, stop = asyncio.create_task(starting), asyncio.create_task(stopping.wait())
    await asyncio.wait([start, stop], return_when=asyncio.FIRST_COMPLETED)
    if not start.done():
        start.cancel()
        await asyncio.wait([start])
    stop.cancel()
    return None if start.cancelled() else start.result()


def _end_as_if_killed(deadline_s: float) -> None:
    log.error("still busy %g s after the stop; ended as if killed, which the cache survives", deadline_s)
    os._exit(1)


class Daemon:
    """The parts of one daemon; nothing is opened before `running` is entered."""

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
        slots = make_slots(settings)
        # The slots bound the downloads, by a setting that may change; pages of listings come on top.
        self.origin = GCSClient(access, connections=2 * MAX_CONCURRENCY, deadline_s=settings.deadline_s, before_page=slots.page)
        self.fetch_processes = self._fetch_processes() if settings.fetch_process_count else None
        self.fetcher = Fetcher(self.cache, self.origin, slots, download_s, self.fetch_processes)
        self.runtime_settings = RuntimeSettings(settings, slots)
        self.read_ahead = ReadAhead(self.directory.objects) if settings.read_ahead else None
        self.prefetcher = Prefetcher(self.registry, self.cache, self.fetcher, observer, self.read_ahead)
        self.statistics = StatisticsCollector(
            self.instance_id,
            self.cache,
            self.registry,
            self.fetcher,
            self.prefetcher,
            self.origin.counters,
            self.fetch_processes,
        )
        self.bucket_sync = BucketSync(settings, self.directory, self.origin, self.cache, self.registry, self.fetcher)
        self.bucket_sync.on_adopted = self.prefetcher.wake
        self._stop = stop
        self._ready = False
        self._failed: BaseException | None = None

    def _fetch_processes(self) -> FetchProcesses:
        options = ProcessOptions(
            cache_dir=str(self.directory.path),
            endpoint=self.origin.root,
            is_anonymous=self.settings.anonymous,
            user_project=self.settings.user_project,
            connections=2 * MAX_CONCURRENCY,
            deadline_s=self.settings.deadline_s,
        )
        return FetchProcesses(self.settings.fetch_process_count, options, self.directory, self.origin)

    @asynccontextmanager
    async def running(self, on_claimed: Callable[[], None] = lambda: None) -> AsyncIterator[ReadyDaemon]:
        """The daemon at work, until the context is left. Raises PrefetchdError where it cannot start."""
        async with AsyncExitStack() as stack:
            self.directory.claim()
            stack.callback(self.directory.close)
            on_claimed()
            await self.cache.open()
            stack.push_async_callback(self.cache.close)
            await stack.enter_async_context(self.origin)
            if self.fetch_processes is not None:
                stack.push_async_callback(self.fetch_processes.close)
            stack.push_async_callback(self.fetcher.close)
            relist_in_s = [await self.bucket_sync.first(root) for root in self.settings.roots]
            with self._disk_errors():
                self._make_folders()
                url = await self._open_http(stack)
                await self._open_socket(stack)
                await stack.enter_async_context(self._background(relist_in_s))
                self.directory.announce(self._about(url))
            stack.callback(self.directory.withdraw)
            self._ready = True
            log.info("ready: statistics at %s, cache in %s", url, self.directory.path)
            try:
                yield ReadyDaemon(os.getpid(), url, self.directory.path)
            finally:
                self._ready = False
        if self._failed is not None:
            raise StartError(f"the daemon ended: {self._failed!r}") from self._failed

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StartError(f"cache directory {self.directory.path}: {exc.strerror} ({exc.filename or 'socket'})") from exc

    def _make_folders(self) -> None:
        # watchdog warns of folders that appear while it takes stock of the tree.
        for root in self.settings.roots:
            for folder in self.settings.item_patterns.folders():
                first = cache_path(root.bucket, f"{root.folder}{folder}first")
                (self.directory.objects / first).parent.mkdir(mode=0o750, parents=True, exist_ok=True)

    async def _prefetch(self) -> None:
        # What is here must be known first, or it would be fetched again.
        await self.cache.whole()
        await self.bucket_sync.adopt(self.cache.pages())
        await asyncio.to_thread(return_freed_memory)  # of the lists that taking stock took
        await self.cache.shrink()
        await self.prefetcher.run()

    async def _watch(self) -> None:
        async with Watch(self.cache, opens=self.settings.watch_opens):
            await asyncio.Event().wait()

    async def _rescan(self) -> None:
        await self.cache.whole()
        while True:
            adopted, lost = await self.cache.rescan()
            if adopted or lost:
                log.info("rescan: %d files taken into the index, %d gone from it", adopted, lost)
            self.registry.forget_idle()
            await asyncio.sleep(self.settings.rescan_s)

    @asynccontextmanager
    async def _background(self, relist_in_s: list[float]) -> AsyncIterator[None]:
        jobs: list[Coroutine[Any, Any, None]] = [self._prefetch(), self._rescan(), self._watch(), ping_watchdog()]
        jobs += [self.fetch_processes.run()] if self.fetch_processes is not None else []
        jobs += [self.read_ahead.run()] if self.read_ahead is not None else []
        jobs += [self.bucket_sync.follow(root, wait_s) for root, wait_s in zip(self.settings.roots, relist_in_s, strict=True)]
        tasks = [asyncio.create_task(job) for job in jobs]
        for task in tasks:
            task.add_done_callback(self._job_ended)
        self.prefetcher.wake()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _job_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s failed: %r", task.get_coro(), error, exc_info=error)
            self._failed = error
            self._stop()

    async def _open_http(self, stack: AsyncExitStack) -> str:
        host, port = self.settings.http_address
        app = statistics_app(self.statistics.collect, lambda: self._ready)
        try:
            listener = await listen(stack, app, STATISTICS_LIMITS, host=host, port=port)
        except OSError as exc:
            reason = "the port is in use" if exc.errno == errno.EADDRINUSE else (exc.strerror or str(exc))
            raise StartError(
                f"setting http: {host}:{port}: {reason}; choose another with --http HOST:PORT, port 0 for any"
            ) from None
        bound_host, bound_port = listener.sockets[0].getsockname()[:2]
        return f"http://{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port}"

    async def _open_socket(self, stack: AsyncExitStack) -> None:
        control = Control(
            os.getpid(),
            self.instance_id,
            self.settings.roots,
            self.cache,
            self.registry,
            self.prefetcher,
            self.statistics,
            self.runtime_settings,
            self.bucket_sync.recall,
            self._stop,
        )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.callback(listener.close)
        with short_address(self.directory.socket) as address:
            listener.bind(address)
        self.directory.socket.chmod(0o660)
        # Half of the descriptors are for files and for connections to GCS.
        most = min(MOST_READERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        await listen(stack, control_app(control), ConnectionLimits(most, READERS_IDLE_S), sock=listener, backlog=1024)

    def _about(self, url: str) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "instance_id": self.instance_id,
            "http": url,
            "socket": str(self.directory.socket),
            "data_roots": [root.uri for root in self.settings.roots],
        }


@contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def stop(signum: int) -> None:
        if stopping.is_set():
            os._exit(128 + signum)
        stopping.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop, signum)
    try:
        yield
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)
