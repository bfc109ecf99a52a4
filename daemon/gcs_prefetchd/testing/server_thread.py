"""The server in a thread with its own event loop, for tests that are not async and for DataLoader workers."""

import asyncio
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import uvloop

from gcs_prefetchd.testing.counters import Counts, Kind
from gcs_prefetchd.testing.faults import Fault, Rule
from gcs_prefetchd.testing.latency import Pace
from gcs_prefetchd.testing.server import GCSServer, Seen
from gcs_prefetchd.testing.stored_objects import StoredObject

__all__ = ["ServingFaults", "ServingGCS", "serving"]

T = TypeVar("T")


class _Loop:
    """Calls functions in the server's event loop, from any other thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the loop and return what it returns; raises RuntimeError once the server has stopped."""

        result: Future[T] = Future()

        def called() -> None:
            try:
                result.set_result(function())
            except Exception as exc:
                result.set_exception(exc)

        self._loop.call_soon_threadsafe(called)
        return result.result()

    def wait(self, server: GCSServer, condition: Callable[[Counts], bool], timeout_s: float) -> None:
        """Block until `condition` holds; raises TimeoutError."""

        async def waited() -> None:
            async with asyncio.timeout(timeout_s):
                await server.wait_for(condition)

        asyncio.run_coroutine_threadsafe(waited(), self._loop).result()


class ServingFaults:
    """The fault plan of a server in a thread."""

    def __init__(self, loop: _Loop, server: GCSServer) -> None:
        self._loop = loop
        self._server = server

    def add(
        self,
        fault: Fault,
        object: str = "*",  # noqa: A002 - the field's word
        *,
        kind: Kind | str = Kind.MEDIA,
        requests: Container[int] | int | None = None,
        together: bool = False,
    ) -> Rule:
        """Add a rule; see `FaultPlan.add`."""
        plan = self._server.faults
        return self._loop.call(lambda: plan.add(fault, object, kind=kind, requests=requests, together=together))

    def clear(self) -> None:
        """Remove all rules."""
        self._loop.call(self._server.faults.clear)


class ServingGCS:
    """A server that runs in a thread: the methods of `GCSServer`, callable from any other thread."""

    def __init__(self, loop: _Loop, server: GCSServer) -> None:
        self._loop = loop
        self._server = server
        self.faults = ServingFaults(loop, server)
        self.url = server.url
        self.port = server.port

    @property
    def counts(self) -> Counts:
        """A copy of the counts so far."""
        return self._loop.call(lambda: self._server.counts.copy())

    @property
    def seen(self) -> list[Seen]:
        """A copy of the latest requests."""
        return self._loop.call(lambda: list(self._server.seen))

    @property
    def pace(self) -> Pace:
        """How slow the server is; may be set."""
        return self._server.pace

    @pace.setter
    def pace(self, pace: Pace) -> None:
        self._server.pace = pace

    def wait_for(self, condition: Callable[[Counts], bool], timeout_s: float = 30.0) -> None:
        """Block until `condition` holds for the counts; it is evaluated in the server's thread. Raises TimeoutError."""
        self._loop.wait(self._server, condition, timeout_s)

    def put(
        self,
        bucket: str,
        name: str,
        data: bytes,
        *,
        content_type: str = "application/octet-stream",
        content_encoding: str | None = None,
        cache_control: str | None = None,
        metadata: Mapping[str, str] | None = None,
        composite: bool = False,
        generation: int | None = None,
    ) -> StoredObject:
        """Store an object as a new generation, in a bucket that is created if it does not exist."""
        return self._loop.call(
            lambda: self._server.put(
                bucket,
                name,
                data,
                content_type=content_type,
                content_encoding=content_encoding,
                cache_control=cache_control,
                metadata=metadata,
                composite=composite,
                generation=generation,
            )
        )

    def create_bucket(self, bucket: str) -> None:
        """Create an empty bucket."""
        self._loop.call(lambda: self._server.create_bucket(bucket))

    def get(self, bucket: str, name: str) -> StoredObject | None:
        """Return the stored object, or None."""
        return self._loop.call(lambda: self._server.get(bucket, name))

    def delete(self, bucket: str, name: str) -> bool:
        """Delete an object; returns whether it existed."""
        return self._loop.call(lambda: self._server.delete(bucket, name))

    def names(self, bucket: str) -> list[str]:
        """Return the names of a bucket's objects, sorted."""
        return self._loop.call(lambda: self._server.names(bucket))

    def buckets(self) -> list[str]:
        """Return the names of the buckets, sorted."""
        return self._loop.call(self._server.buckets)

    def require_token(self, token: str | None, bucket: str | None = None) -> None:
        """Respond 401 unless `Authorization: Bearer <token>` is sent, for one bucket or all; None undoes it."""
        self._loop.call(lambda: self._server.require_token(token, bucket))

    def deny(self, bucket: str) -> None:
        """Respond 403 for a bucket."""
        self._loop.call(lambda: self._server.deny(bucket))

    def allow(self, bucket: str) -> None:
        """Undo `deny`."""
        self._loop.call(lambda: self._server.allow(bucket))

    def requester_pays(self, bucket: str) -> None:
        """Respond 400 for a bucket unless `userProject=` is sent."""
        self._loop.call(lambda: self._server.requester_pays(bucket))

    def release(self) -> None:
        """Release all stalled responses."""
        self._loop.call(self._server.release)

    def reset(self) -> None:
        """Reset the counts; forget the faults, the requests seen and the stalled responses; objects stay."""
        self._loop.call(self._server.reset)


@contextmanager
def serving(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    root: Path | None = None,
    latency_s: float = 0.0,
    latency_sigma: float = 0.0,
    bytes_per_s: float | None = None,
    seed: int = 0,
) -> Iterator[ServingGCS]:
    """Run a `GCSServer` in a thread of its own, with the same arguments, until the `with` ends."""

    def make() -> GCSServer:
        return GCSServer(
            host=host,
            port=port,
            root=root,
            latency_s=latency_s,
            latency_sigma=latency_sigma,
            bytes_per_s=bytes_per_s,
            seed=seed,
        )

    started: Future[tuple[ServingGCS, Callable[[], None]]] = Future()
    # A daemon thread, so that a test that hangs in here cannot keep the interpreter from ending.
    thread = threading.Thread(target=_run, args=(make, started), name="gcs-emulator", daemon=True)
    thread.start()
    server, stop = started.result()
    try:
        yield server
    finally:
        stop()
        thread.join()


def _run(make: Callable[[], GCSServer], started: Future[tuple[ServingGCS, Callable[[], None]]]) -> None:
    """Run a server in this thread until a stop is requested; `started` gets it and what stops it, or why it did not start."""

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with make() as server:
            started.set_result((ServingGCS(_Loop(loop), server), lambda: _set(loop, stop)))
            await stop.wait()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())
    except BaseException as exc:
        if started.done():
            raise
        started.set_exception(exc)


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)
