"""What readers and the command line ask over the Unix socket: demand fetches, plans, read reports, listing, settings, stop."""

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
from gcs_prefetchd.server.report_dedup import Reporters
from gcs_prefetchd.server.runtime_settings import Tuning
from gcs_prefetchd.server.statistics_collector import StatisticsCollector
from gcs_prefetchd.server.statistics_json import to_json
from gcs_prefetchd.shared.errors import InvalidNameError, PrefetchdError, ProtocolError
from gcs_prefetchd.shared.messages import FetchRequest, FetchResponse, ManifestResponse, Plan, ReadReport, Status
from gcs_prefetchd.shared.objects import DataRoot, parse_object_uri
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Control", "control_app"]

log = logging.getLogger(__name__)

LARGEST_BODY = 256 << 20  # a plan of 64 million items
BODY_S = 5.0  # a body comes from a process on this machine
LISTED_AT_MOST = 10_000

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Control:
    """Answers each message; the web part is only around it."""

    pid: int
    instance_id: str
    data_roots: Sequence[DataRoot]
    cache: Cache
    registry: Registry
    prefetcher: Prefetcher
    statistics: StatisticsCollector
    tuning: Tuning
    recall: Callable[[str, str], Awaitable[None]]  # of a data root, the listing with this digest, where it can be had
    stop: Callable[[], None]
    reporters: Reporters = field(default_factory=Reporters)

    def status(self) -> Status:
        """Who the daemon is."""
        roots = [root.uri for root in self.data_roots]
        return Status(self.pid, self.instance_id, __version__, roots, self.registry.stream_ids)

    def manifest(self, data_root: str) -> ManifestResponse:
        """Where the latest manifest of a data root lies; raises ProtocolError where it is not served."""
        uri = DataRoot.parse(data_root).uri
        manifest = self.registry.catalog.newest_manifest(uri)
        if manifest is None:
            served = ", ".join(root.uri for root in self.data_roots)
            raise ProtocolError(f"data root {uri} is not served by this daemon; it serves {served}")
        return ManifestResponse(manifest.digest, str(self.cache.directory.manifests / manifest.digest), len(manifest))

    async def fetch(self, request: FetchRequest) -> FetchResponse:
        """Have the objects in the cache; for each the empty string, or why it is not there."""
        return FetchResponse(list(await asyncio.gather(*(self._fetch(uri) for uri in request.objects))))

    def note_reads(self, report: ReadReport) -> None:
        """Count what was read and move the streams on; once, however often the report comes."""
        try:
            names = [parse_object_uri(uri) for uri in report.objects]
        except InvalidNameError as exc:
            raise ProtocolError(f"ReadReport: field 'objects': {exc}") from None
        if not self.reporters.is_new(report.reporter, report.number):
            return
        self.statistics.reads.add(report)
        for name in names:
            self.cache.touch(cache_path(name.bucket, name.name))
        self.registry.note_reads(report.job, names)
        self.prefetcher.wake()

    async def add_plan(self, body: bytes) -> None:
        """Take a reader's plan; its order is worked out in a thread."""
        plan, packed = Plan.from_body(body)
        await self.recall(plan.data_root, plan.manifest)
        indices = np.frombuffer(packed, dtype="<u4").astype(np.uint32)
        reader = self.registry.register(await asyncio.to_thread(self.registry.prepare, plan, indices))
        log.info("stream %s: epoch %d of %s, %d items", plan.stream, plan.epoch, plan.data_root, len(reader.stream))
        self.prefetcher.begin()

    def end_job(self, job: str) -> None:
        """The process of this job has ended."""
        self.registry.end_job(job)
        self.prefetcher.wake()

    async def _fetch(self, uri: str) -> str:
        try:
            name = parse_object_uri(uri)
            root = next((root for root in self.data_roots if name in root), None)
            if root is None:
                return f"{uri}: not within a data root that this daemon serves"
            await self.prefetcher.demand(name)
        except Exception as exc:  # whatever it is, it must not take the other objects' answers with it
            why = str(exc) if isinstance(exc, PrefetchdError) else f"{uri}: {exc!r}"
            log.warning("demand: %s", why)
            return why
        return ""


def control_app(control: Control) -> web.Application:
    """The application behind the socket; whoever runs it binds and closes it."""
    app = web.Application(middlewares=[_errors], client_max_size=LARGEST_BODY)
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
    """From request to message and back."""

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
        """Held open by a reader for as long as its process lives: the kernel closes it, whatever ends the process."""
        lease: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.leases.add(lease)
        try:
            await lease
        finally:
            self.leases.discard(lease)
            self.control.end_job(request.query.get("job", ""))
        return _json("{}")

    async def end_leases(self, _: web.Application) -> None:
        """A stop would wait for them otherwise."""
        for lease in self.leases:
            if not lease.done():
                lease.set_result(None)

    async def reads(self, request: web.Request) -> web.Response:
        self.control.note_reads(ReadReport.from_json(await _body(request)))
        return _json("{}")

    async def objects(self, request: web.Request) -> web.Response:
        prefix = request.query.get("prefix", "")
        uris: list[str] = []
        total = 0
        for page in self.control.cache.pages():
            found = [
                name.uri for name in map(self.control.cache.name_at, page) if name is not None and name.uri.startswith(prefix)
            ]
            uris += found[: LISTED_AT_MOST - len(uris)]
            total += len(found)
            await asyncio.sleep(0)
        return web.json_response({"objects": uris, "total": total})

    async def settings(self, _: web.Request) -> web.Response:
        return web.json_response(self.control.tuning.values())

    async def change_settings(self, request: web.Request) -> web.Response:
        return web.json_response(self.control.tuning.change(await _body(request)))

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
    if (announced := request.content_length or 0) > LARGEST_BODY:  # aiohttp would wait until so much has come
        raise web.HTTPRequestEntityTooLarge(LARGEST_BODY, announced)
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body did not come within {BODY_S:g} s\n") from None
    except web.RequestPayloadError as exc:
        raise ProtocolError(f"the body is no HTTP: {' '.join(str(exc).split())[:200]}") from None


def _json(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json")
