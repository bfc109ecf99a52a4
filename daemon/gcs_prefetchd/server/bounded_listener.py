"""Listens for requests, and limits how many connections are open and how long each may be idle."""

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

__all__ = ["ConnectionLimits", "listen"]

LINGERING_S = 2.0  # for reading a body that was refused, so that its sender sees the response before the connection closes


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """`idle_s` is how long a connection may take until its next request has arrived, the first one included."""

    connections: int
    idle_s: float


async def listen(stack: AsyncExitStack, app: web.Application, limits: ConnectionLimits, **where: object) -> asyncio.Server:
    """Serve the application until the stack closes. `where` goes to `loop.create_server`.

    If all connections are in use, a new one replaces the one that has been idle for longest. A half-sent request and a
    response that the client does not read count as idle. If all connections have requests in progress, the new one is closed.
    """
    logging.getLogger("aiohttp.server").addFilter(_is_our_error)
    busy: set[object] = set()
    app.middlewares.insert(0, _track_busy(busy))
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=limits.idle_s,
        lingering_time=LINGERING_S,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    accept = partial(_accept, runner, busy, limits.connections)
    listener: asyncio.Server = await asyncio.get_running_loop().create_server(accept, **where)  # type: ignore[call-overload]
    stack.callback(listener.close)
    return listener


def _track_busy(busy: set[object]) -> Middleware:
    """Keeps in `busy` the connections whose requests are in progress."""

    @web.middleware
    async def track(request: web.Request, handler: Handler) -> web.StreamResponse:
        busy.add(request.protocol)
        try:
            return await handler(request)
        finally:
            busy.discard(request.protocol)

    return track


def _accept(runner: web.AppRunner, busy: set[object], max_connections: int) -> asyncio.Protocol:
    """The protocol of a new connection. Closes an idle connection if there are too many."""
    if runner.server is None:
        return _Refusal()  # the daemon is stopping
    if len(runner.server.connections) >= max_connections:
        open_connections = [one for one in runner.server.connections if one.transport is not None]
        if len(open_connections) >= max_connections:
            idle = next((one for one in open_connections if one not in busy), None)
            if idle is None:
                return _Refusal()
            transport = idle.transport
            idle.force_close()
            if transport is not None:
                transport.abort()  # `close` would wait until the client has read everything, which may never happen
    return runner.server()


def _is_our_error(record: logging.LogRecord) -> bool:
    """False for errors of clients: else any client that reaches the port could fill the disk with tracebacks."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


class _Refusal(asyncio.Protocol):
    """Closes its connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close without a response: the client may not have sent a request yet."""
        transport.close()
