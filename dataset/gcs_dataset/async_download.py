"""Downloads objects in a thread with an event loop of its own, many at a time, and yields them in the requested order.

Loads aiohttp, so only an iteration of AsyncImageDataset imports it. It uses the daemon's client, because google-cloud-storage
needs a thread for each download in flight. No other module imports anything of gcs_prefetchd outside `shared`.
"""

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from typing import Any, Self

import janus

from gcs_dataset.gcs_client import emulator_endpoint
from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.objects import parse_object_uri

__all__ = ["Downloads"]

Uris = list[str]
Fetched = tuple[Uris, list[bytes]]

QUEUED_ITEMS = 8  # downloaded and not yet read; a full queue pauses further downloads
MAX_CONNECTIONS = 256  # more do not help at a latency of 30 ms
DEADLINE_S = 120.0
STOP_TIMEOUT_S = 10.0


class Downloads:
    """Iterates over `(uris, their bytes)` for each list of URIs in `requests`, `concurrency` lists of which are in flight.

    Entering it starts the thread; leaving it, garbage collection or the interpreter's exit stops it. If an object cannot be
    read, its error is raised at its position in the order and ends the iteration.
    """

    def __init__(self, requests: Iterator[Uris], concurrency: int) -> None:
        self._requests = requests
        self._concurrency = concurrency
        self._queue: janus.Queue[Fetched | Exception] = janus.Queue(QUEUED_ITEMS)
        self._stop: weakref.finalize[..., Downloads] | None = None

    def __enter__(self) -> Self:
        running: Future[_Running] = Future()
        # The thread must not refer to this object, or it would never be collected.
        arguments = (running, self._requests, self._concurrency, self._queue)
        thread = threading.Thread(target=_run, args=arguments, name="gcs-dataset-downloads", daemon=True)
        thread.start()
        self._stop = weakref.finalize(self, _stop, os.getpid(), running.result(), thread)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._stop is not None:
            self._stop()

    def __iter__(self) -> Iterator[Fetched]:
        while True:
            try:
                fetched = self._queue.sync_q.get()
            except janus.SyncQueueShutDown:
                return
            if isinstance(fetched, Exception):
                raise fetched
            yield fetched


_Running = tuple[asyncio.AbstractEventLoop, "asyncio.Task[Any]"]


def _run(
    running: "Future[_Running]", requests: Iterator[Uris], concurrency: int, queue: "janus.Queue[Fetched | Exception]"
) -> None:
    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        running.set_result((asyncio.get_running_loop(), task))
        try:
            await _fetch_all(requests, concurrency, queue)
        except Exception as exc:  # raised in the reader
            await queue.async_q.put(exc)
        finally:
            queue.shutdown()

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        pass
    except BaseException as exc:
        if running.done():
            raise
        running.set_exception(exc)


def _stop(pid: int, running: _Running, thread: threading.Thread) -> None:
    loop, task = running
    if pid != os.getpid():
        return  # a fork copied the object and not the thread
    with suppress(RuntimeError):  # the loop is closed: it has finished
        loop.call_soon_threadsafe(task.cancel)
    if thread is not threading.current_thread():  # garbage may be collected in any thread, this one too
        thread.join(STOP_TIMEOUT_S)


async def _fetch_all(requests: Iterator[Uris], concurrency: int, queue: "janus.Queue[Fetched | Exception]") -> None:
    in_flight: deque[tuple[Uris, asyncio.Task[list[bytes]]]] = deque()
    async with GCSClient(_access(), connections=min(2 * concurrency, MAX_CONNECTIONS), deadline_s=DEADLINE_S) as client:
        try:
            while True:
                for uris in islice(requests, concurrency - len(in_flight)):
                    in_flight.append((uris, asyncio.create_task(_read_all(client, uris))))
                if not in_flight:
                    return
                uris, task = in_flight.popleft()
                await queue.async_q.put((uris, await task))
        finally:
            tasks = [task for _, task in in_flight]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _read_all(client: GCSClient, uris: Uris) -> list[bytes]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client.read(parse_object_uri(uri))) for uri in uris]
    except ExceptionGroup as group_of_errors:
        raise group_of_errors.exceptions[0] from None
    return [task.result()[1] for task in tasks]


def _access() -> Access:
    endpoint = emulator_endpoint()
    return Access(endpoint=endpoint, anonymous=endpoint is not None)
