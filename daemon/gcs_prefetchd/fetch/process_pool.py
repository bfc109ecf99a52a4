"""The daemon's fetch processes: started when the first prefetch is due, and restarted if one stops."""

import asyncio
import logging
import time

from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.fetch.process_handle import FetchProcess, ProcessDownload
from gcs_prefetchd.fetch.process_messages import ProcessOptions
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.responses import one_line
from gcs_prefetchd.gcs.retry import RequestObserver
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["FetchProcesses"]

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0  # a machine that is out of memory may take long to import anything
GRACE_S = 5.0  # a process that exceeds the deadline of an object by more than this hangs
CHECK_EVERY_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a restart


class FetchProcesses:
    """A fixed number of processes. `run` keeps them running; `close` stops them once there are no downloads.

    They inherit the lock of the cache directory, get the client's access token, and count in its `counters`.
    """

    def __init__(self, count: int, options: ProcessOptions, directory: CacheDirectory, client: GCSClient) -> None:
        self._count = count
        self._options = options
        self._directory = directory
        self._client = client
        self._needed = asyncio.Event()
        self._processes: set[FetchProcess] = set()

    @property
    def pids(self) -> list[int]:
        """The process ids of those that accept downloads."""
        return [process.pid for process in self._processes if process.is_ready]

    def start_download(
        self, version: ObjectVersion, reservation: Reservation, observer: RequestObserver
    ) -> ProcessDownload | None:
        """Give a download to the process that has the fewest; returns None if none is ready. See `FetchProcess`."""
        self._needed.set()
        ready = (process for process in self._processes if process.is_ready)
        process = min(ready, key=lambda process: process.active_downloads, default=None)
        return None if process is None else process.start_download(version, reservation, observer)

    async def run(self) -> None:
        """Keep the processes running, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._count):
                tasks.create_task(self._keep_one_running())

    async def close(self) -> None:
        """Stop all of them."""
        await asyncio.gather(*(process.close() for process in self._processes))
        self._processes.clear()

    async def _keep_one_running(self) -> None:
        pause_s = FIRST_PAUSE_S
        await self._needed.wait()
        while True:
            process, started_s = self._new_process(), time.monotonic()
            try:
                process.start()
                self._processes.add(process)
                await process.connect()
                reason = await self._watch(process)
            except (OSError, MemoryError) as exc:
                reason = f"cannot be started ({one_line(exc)})"
                process.kill()
            self._processes.discard(process)
            if time.monotonic() - started_s > LONGEST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            log.warning("fetch process: %s; the others, or the daemon itself, do its work; restarted in %g s", reason, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _watch(self, process: FetchProcess) -> str:
        """Wait until the process has stopped, and return why. One that hangs is killed."""
        reason = ""
        await asyncio.wait([process.ready], timeout=READY_TIMEOUT_S)  # cancelled if the process stops
        if not process.ready.done():
            reason = f"not ready after {READY_TIMEOUT_S:g} s"
            process.kill()
        while not process.stopped.done():
            await asyncio.wait([process.stopped], timeout=CHECK_EVERY_S)
            if process.longest_download_s > self._options.deadline_s + GRACE_S:
                reason = f"hangs (pid {process.pid})"
                process.kill()
        return reason or f"stopped with status {process.stopped.result()} (pid {process.pid})"

    def _new_process(self) -> FetchProcess:
        return FetchProcess(self._options, self._directory.lock, self._client.token, self._client.counters)
