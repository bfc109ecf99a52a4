"""The Unix socket's endpoints, for readers and the command line: demands, plans, read reports, listing, settings, stop."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from aiohttp import web

from gcs_prefetchd import __version__
from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.fetch.prefetcher import Prefetcher
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.server.report_dedup import ReportDedup
from gcs_prefetchd.server.runtime_settings import RuntimeSettings
from gcs_prefetchd.server.statistics_collector import StatisticsCollector
from gcs_prefetchd.server.statistics_json import to_json
from gcs_prefetchd.shared.errors import InvalidNameError, PrefetchdError, ProtocolError
from gcs_prefetchd.shared.messages import FetchRequest, FetchResponse, ManifestResponse, Plan, ReadReport, Status
from gcs_prefetchd.shared.objects import DataRoot, parse_object_uri
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Control", "control_app"]

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 << 20  # a plan of 64 million items
BODY_TIMEOUT_S = 5.0  # the sender is a process on this machine
MAX_LISTED_OBJECTS = 10_000

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Control:
    """Carries out the requests. It knows the messages, and nothing of HTTP."""

    pid: int
    instance_id: str
    data_roots: Sequence[DataRoot]
    cache: Cache
    registry: Registry
    prefetcher: Prefetcher
    statistics: StatisticsCollector
    runtime_settings: RuntimeSettings
    recall: Callable[[str, str], Awaitable[None]]  # loads a data root's manifest by its digest, if it is still on disk
    stop: Callable[[], None]
    report_dedup: ReportDedup = field(default_factory=ReportDedup)

    def status(self) -> Status:
        """Identify the daemon."""
        roots = [root.uri for root in self.data_roots]
        return Status(self.pid, self.instance_id, __version__, roots, self.registry.stream_ids)

    def manifest(self, data_root: str) -> ManifestResponse:
        """Return the path of a data root's newest manifest. Raises ProtocolError if the daemon does not serve the data root."""
        uri = DataRoot.parse(data_root).uri
        manifest = self.registry.catalog.newest_manifest(uri)
        if manifest is None:
            served = ", ".join(root.uri for root in self.data_roots)
            raise ProtocolError(f"data root {uri} is not served by this daemon; it serves {served}")
        return ManifestResponse(manifest.digest, str(self.cache.directory.manifests / manifest.digest), len(manifest))

    async def fetch(self, request: FetchRequest) -> FetchResponse:
        """Download the objects into the cache. The response has an empty string for each, or why it failed."""
        return FetchResponse(list(await asyncio.gather(*(self._fetch(uri) for uri in request.objects))))

    def record_reads(self, report: ReadReport) -> None:
        """Count the reads and advance the streams. A repeated report has no effect."""
        try:
            names = [parse_object_uri(uri) for uri in report.objects]
        except InvalidNameError as exc:
            raise ProtocolError(f"ReadReport: field 'objects': {exc}") from None
        if not self.report_dedup.accept(report.reporter, report.number):
            return
        self.statistics.reads.add(report)
        for name in names:
            self.cache.touch(cache_path(name.bucket, name.name))
        self.registry.record_reads(report.job, names)
        self.prefetcher.wake()

    async def add_plan(self, body: bytes) -> None:
        """Register a reader's plan. Its order is computed in a thread."""
        plan, packed = Plan.from_body(body)
        await self.recall(plan.data_root, plan.manifest)
        indices = np.frombuffer(packed, dtype="<u4").astype(np.uint32)
        reader = self.registry.register(await asyncio.to_thread(self.registry.prepare, plan, indices))
        log.info("stream %s: epoch %d of %s, %d items", plan.stream, plan.epoch, plan.data_root, len(reader.stream))
        self.prefetcher.start_epoch()

    def end_job(self, job: str) -> None:
        """Forget the streams of a job whose process has ended."""
        self.registry.end_job(job)
        self.prefetcher.wake()

    async def _fetch(self, uri: str) -> str:
        try:
            name = parse_object_uri(uri)
            root = next((root for root in self.data_roots if name in root), None)
            if root is None:
                return f"{uri}: not within a data root that this daemon serves"
            await self.prefetcher.demand(name)
        except Exception as exc:  # of any kind: the other objects still need their results
            reason = str(exc) if isinstance(exc, PrefetchdError) else f"{uri}: {exc!r}"
            log.warning("demand: %s", reason)
            return reason
        return ""


def control_app(control: Control) -> web.Application:
    """The application behind the socket; the caller binds and closes it."""
    app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY_BYTES)
    handlers = _Handlers(control)
    app.on_shutdown.append(handlers.end_leases)
    app.add_routes(
        [
            web.get("/v1/status", handlers.status),
            web.get("/v1/stats", handlers.stats),
            web.get("/v1/manifest", handlers.manifest),
            web.post("/v1/fetch", handlers.fetch),
            web.post("/v1/plan", handlers.plan),
            web.get("/v1/lease", handlers.lease),
            web.post("/v1/reads", handlers.reads),
            web.get("/v1/objects", handlers.objects),
            web.get("/v1/settings", handlers.settings),
            web.patch("/v1/settings", handlers.change_settings),
            web.post("/v1/stop", handlers.stop),
        ]
    )
    return app


@dataclass(frozen=True, slots=True)
class _Handlers:
    """Converts requests to messages, and results to responses."""

    control: Control
    leases: set[asyncio.Future[None]] = field(default_factory=set)

    async def status(self, _: web.Request) -> web.Response:
        return _json(self.control.status().to_json())

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response(to_json(self.control.statistics.collect()))

    async def manifest(self, request: web.Request) -> web.Response:
        return _json(self.control.manifest(request.query.get("data_root", "")).to_json())

    async def fetch(self, request: web.Request) -> web.Response:
        return _json((await self.control.fetch(FetchRequest.from_json(await _body(request)))).to_json())

    async def plan(self, request: web.Request) -> web.Response:
        await self.control.add_plan(await _body(request))
        return _json("{}")

    async def lease(self, request: web.Request) -> web.Response:
        """Wait until the connection closes. The kernel closes it when the reader's process ends, for whatever reason."""
        lease: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.leases.add(lease)
        try:
            await lease
        finally:
            self.leases.discard(lease)
            self.control.end_job(request.query.get("job", ""))
        return _json("{}")

    async def end_leases(self, _: web.Application) -> None:
        """Otherwise a stop would wait for the readers."""
        for lease in self.leases:
            if not lease.done():
                lease.set_result(None)

    async def reads(self, request: web.Request) -> web.Response:
        self.control.record_reads(ReadReport.from_json(await _body(request)))
        return _json("{}")

    async def objects(self, request: web.Request) -> web.Response:
        prefix = request.query.get("prefix", "")
        uris: list[str] = []
        total = 0
        for page in self.control.cache.pages():
            found = [
                name.uri
                for name in map(self.control.cache.directory.object_name, page)
                if name is not None and name.uri.startswith(prefix)
            ]
            uris += found[: MAX_LISTED_OBJECTS - len(uris)]
            total += len(found)
            await asyncio.sleep(0)
        return web.json_response({"objects": uris, "total": total})

    async def settings(self, _: web.Request) -> web.Response:
        return web.json_response(self.control.runtime_settings.values())

    async def change_settings(self, request: web.Request) -> web.Response:
        return web.json_response(self.control.runtime_settings.change(await _body(request)))

    async def stop(self, _: web.Request) -> web.Response:
        self.control.stop()
        return _json("{}")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except (ProtocolError, InvalidNameError) as exc:
        return web.Response(status=400, text=f"{exc}\n")


async def _body(request: web.Request) -> bytes:
    if (announced := request.content_length or 0) > MAX_BODY_BYTES:  # aiohttp would first read that much
        raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, announced)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body did not arrive within {BODY_TIMEOUT_S:g} s\n") from None
    except web.RequestPayloadError as exc:
        raise ProtocolError(f"the body is not valid HTTP: {' '.join(str(exc).split())[:200]}") from None


def _json(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json")
