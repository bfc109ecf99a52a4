"""The statistics over TCP, for every user of the node: a page, `/stats`, `/metrics`, `/healthz` and `/readyz`."""

import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from gcs_prefetchd.server.dashboard import render_page
from gcs_prefetchd.server.prometheus_metrics import render_metrics
from gcs_prefetchd.server.statistics import Statistics
from gcs_prefetchd.server.statistics_json import to_json

__all__ = ["statistics_app"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def statistics_app(collect: Callable[[], Statistics], is_ready: Callable[[], bool]) -> web.Application:
    """The application; the caller binds and closes it."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(text=render_page(collect()), content_type="text/html")

    async def stats(_: web.Request) -> web.Response:
        return web.json_response(to_json(collect()))

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=render_metrics(collect()), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ready\n") if is_ready() else web.Response(status=503, text="starting or stopping\n")

    app = web.Application(middlewares=[_refuse_web_pages], client_max_size=1024)
    app.on_response_prepare.append(_add_headers)
    app.add_routes(
        [
            web.get("/", page),
            web.get("/stats", stats),
            web.get("/metrics", metrics),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
        ]
    )
    return app


@web.middleware
async def _refuse_web_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests that a web page in a browser sends: with a foreign Host (DNS rebinding) or an Origin (a script)."""
    if "Origin" in request.headers:
        raise web.HTTPForbidden(text="requests from web pages are refused\n")
    if not _is_own_host(request.host):
        raise web.HTTPForbidden(text=f"unknown host {request.host[:100]!r}: use an address or this machine's name\n")
    return await handler(request)


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    """Set on every response, also on refusals: browsers must not store, reinterpret or frame it."""
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"


def _is_own_host(host: str) -> bool:
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        ip_address(name)  # a page cannot rebind a literal address
    except ValueError:
        return False
    return True
