"""Listening for requests, with as many connections at a time and as long ones as do no harm."""

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

__all__ = ["Bounds", "listen"]

LINGERING_S = 2.0  # for a body that nobody wants, so that its sender sees the answer before the end


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most connections at a time, and how long one may take until a request of it is there, the first or another."""

    connections: int
    idle_s: float


async def listen(stack: AsyncExitStack, app: web.Application, bounds: Bounds, **where: object) -> asyncio.Server:
    """Serve the application until the stack closes; `where` is what `loop.create_server` takes.

    A connection too many takes the place of the one that has been idle for longest, half-sent requests and answers that
    nobody fetches among them. Where all are being answered it is closed.
    """
    logging.getLogger("aiohttp.server").addFilter(_is_ours)
    answering: set[object] = set()
    app.middlewares.insert(0, _noting(answering))
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=bounds.idle_s,
        lingering_time=LINGERING_S,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    admit = partial(_admitted, runner, answering, bounds.connections)
    listener: asyncio.Server = await asyncio.get_running_loop().create_server(admit, **where)  # type: ignore[call-overload]
    stack.callback(listener.close)
    return listener


def _noting(answering: set[object]) -> Middleware:
    """Has `answering` hold the connections whose requests are being answered."""

    @web.middleware
    async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
        answering.add(request.protocol)
        try:
            return await handler(request)
        finally:
            answering.discard(request.protocol)

    return note


def _admitted(runner: web.AppRunner, answering: set[object], most: int) -> asyncio.Protocol:
    """What serves a new connection; one that is idle may have to go for it."""
    if runner.server is None:
        return _Refusal()  # it came while the daemon stops
    if len(runner.server.connections) >= most:
        there = [one for one in runner.server.connections if one.transport is not None]
        if len(there) >= most:
            idle = next((one for one in there if one not in answering), None)
            if idle is None:
                return _Refusal()
            transport = idle.transport
            idle.force_close()
            if transport is not None:
                transport.abort()  # to close it would wait until what was sent is fetched, and that may be never
    return runner.server()


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether it is no fault of a client's: anyone who reaches the port could fill the disk with tracebacks of bad requests."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


class _Refusal(asyncio.Protocol):
    """Closes its connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing is said: whoever is at the other end may not even have asked yet."""
        transport.close()
