"""The server: HTTP in front of `FakeGCS`, with counts, latency and faults."""

import asyncio
import math
import os
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from aiohttp import web

from gcs_prefetchd.shared.errors import StartError
from gcs_prefetchd.testing.control import CONTROL_PATHS, control
from gcs_prefetchd.testing.counters import Counts, CountsWaiter, Kind
from gcs_prefetchd.testing.directory_bucket import open_root
from gcs_prefetchd.testing.fake_gcs import FakeGCS
from gcs_prefetchd.testing.fault_effects import alter
from gcs_prefetchd.testing.faults import Fault, FaultPlan, ResponseFault, Status
from gcs_prefetchd.testing.latency import Pace, Pacer
from gcs_prefetchd.testing.requests import ParsedRequest, parse_request
from gcs_prefetchd.testing.response_writer import deliver, deliver_broken
from gcs_prefetchd.testing.responses import Response
from gcs_prefetchd.testing.stored_objects import Attributes, StoredObject
from gcs_prefetchd.testing.token_server import is_token_path, token_response

__all__ = ["GCSServer", "Seen"]

REMEMBERED_REQUESTS = 10_000


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it arrived."""

    kind: Kind
    key: str
    method: str
    raw_path: str
    headers: Mapping[str, str]


class GCSServer:
    """A GCS-speaking server on a port of this machine, for tests. Entering it starts the server, leaving it stops it.

    Lives in one event loop, and its methods are called there; `serving` does the same for threads.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        root: Path | None = None,
        latency_s: float = 0.0,
        latency_sigma: float = 0.0,
        bytes_per_s: float | None = None,
        seed: int = 0,
    ) -> None:
        self.pace = Pace(latency_s, latency_sigma, bytes_per_s)
        self.faults = FaultPlan()
        self.seen: deque[Seen] = deque(maxlen=REMEMBERED_REQUESTS)
        self._host = host
        self._port = port
        self._root = root
        self._gcs = FakeGCS()
        self._waiter = CountsWaiter()
        self._pacer = Pacer()
        self._random = random.Random(seed)  # noqa: S311 - latencies, not secrets
        self._released = asyncio.Event()
        self._runner: web.ServerRunner | None = None
        self._server: web.Server | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; raises StartError if the address is not available, SettingsError if the root cannot be served."""
        if self._root is not None:
            self._gcs.buckets.update(await asyncio.to_thread(open_root, self._root))
        self._server = web.Server(self._handle, handler_cancellation=True, access_log=None, keepalive_timeout=75.0)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, backlog=1024)
        try:
            await site.start()
        except OSError as exc:
            await self._runner.cleanup()
            # asyncio's own text names the address again; a name that cannot be resolved has a negative number.
            number = exc.errno or 0
            reason = os.strerror(number) if number > 0 else exc.strerror or str(exc)
            raise StartError(f"cannot listen on {self._host}:{self._port}: {reason}") from exc
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close every connection, whatever is in progress on it, and stop listening."""
        if self._runner is None or self._server is None:
            return
        for connection in self._server.connections:
            connection.force_close()
        await self._runner.cleanup()
        self._runner = self._server = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"http://{self._host}:{self._port}"

    @property
    def counts(self) -> Counts:
        """The requests and bytes so far."""
        return self._waiter.counts

    async def wait_for(self, condition: Callable[[Counts], bool]) -> None:
        """Return as soon as `condition` holds for the counts."""
        await self._waiter.wait_for(condition)

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
        attributes = Attributes(content_type, content_encoding, cache_control, metadata or {}, composite)
        return self._gcs.bucket(bucket).put(name, data, attributes, generation)

    def create_bucket(self, bucket: str) -> None:
        """Create an empty bucket."""
        self._gcs.bucket(bucket)

    def get(self, bucket: str, name: str) -> StoredObject | None:
        """Return the stored object, or None."""
        found = self._gcs.buckets.get(bucket)
        return None if found is None else found.get(name)

    def delete(self, bucket: str, name: str) -> bool:
        """Delete an object; returns whether it existed."""
        found = self._gcs.buckets.get(bucket)
        return found is not None and found.delete(name)

    def names(self, bucket: str) -> list[str]:
        """Return the names of a bucket's objects, sorted."""
        return list(self._gcs.bucket(bucket).names())

    def buckets(self) -> list[str]:
        """Return the names of the buckets, sorted."""
        return sorted(self._gcs.buckets)

    def require_token(self, token: str | None, bucket: str | None = None) -> None:
        """Respond 401 unless `Authorization: Bearer <token>` is sent, for one bucket or all; None undoes it."""
        self._gcs.access.require_token(token, bucket)

    def deny(self, bucket: str) -> None:
        """Respond 403 for a bucket."""
        self._gcs.access.deny(bucket)

    def allow(self, bucket: str) -> None:
        """Undo `deny`."""
        self._gcs.access.allow(bucket)

    def requester_pays(self, bucket: str) -> None:
        """Respond 400 for a bucket unless `userProject=` is sent."""
        self._gcs.access.requester_pays(bucket)

    def release(self) -> None:
        """Release all stalled responses."""
        self._released.set()
        self._released = asyncio.Event()

    def reset(self) -> None:
        """Reset the counts; forget the faults, the requests seen and the stalled responses; objects stay."""
        self.release()
        self.faults.clear()
        self.seen.clear()
        self.counts.reset()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        body = await request.content.read() if request.body_exists else b""
        if path in CONTROL_PATHS:
            return await deliver(request, control(self, request.method, request.raw_path, body), _uncounted, None)
        parsed = parse_request(request.method, request.raw_path, request.headers)
        if is_token_path(path):
            kind, key = Kind.TOKEN, path
        else:
            kind, key = parsed.kind, self._gcs.key(parsed, body)
        self.seen.append(Seen(kind, key, request.method, request.raw_path, request.headers))
        fault = self.faults.next(kind, key)
        with self._waiter.open(kind):
            self._waiter.arrived(kind, key)
            response = await self._respond(kind, parsed, body)
            if kind is not Kind.MEDIA:
                return await self._respond_late(request, response, fault, kind, key)
            if fault is None and self._pacer.is_too_fast(self.pace, asyncio.get_running_loop().time()):
                fault = Status(503)
            async with self._pacer.line(self.pace):
                return await self._respond_late(request, response, fault, kind, key)

    async def _respond_late(
        self, request: web.BaseRequest, response: Response, fault: Fault | None, kind: Kind, key: str
    ) -> web.StreamResponse:
        if latency_s := self._latency_s():
            await asyncio.sleep(latency_s)
        return await self._deliver(request, response, fault, kind, key)

    async def _respond(self, kind: Kind, parsed: ParsedRequest, body: bytes) -> Response:
        if kind is Kind.TOKEN:
            return token_response(parsed.method, parsed.path, parsed.headers, self._gcs.access.token_to_give())
        if self._gcs.is_quick(parsed):
            return self._gcs.respond(parsed, body, self.url)
        return await asyncio.to_thread(self._gcs.respond, parsed, body, self.url)

    async def _deliver(
        self, request: web.BaseRequest, response: Response, fault: Fault | None, kind: Kind, key: str
    ) -> web.StreamResponse:
        def sent(size_bytes: int) -> None:
            if kind is Kind.MEDIA and response.status in {200, 206}:
                self._waiter.sent(key, size_bytes)

        if fault is None:
            return await deliver(request, response, sent, self.pace.bytes_per_s)
        if isinstance(fault, ResponseFault):
            altered = alter(response, fault)
            return await deliver(request, altered, sent, self.pace.bytes_per_s)
        return await deliver_broken(request, response, fault, sent, self._released)

    def _latency_s(self) -> float:
        pace = self.pace
        if not pace.latency_sigma:
            return pace.latency_s
        return pace.latency_s * math.exp(self._random.gauss(0.0, pace.latency_sigma))


def _uncounted(size_bytes: int) -> None:
    """Control requests are not measured."""
