"""Listening bounds the connections, whatever is at their other ends."""

import asyncio
import socket
from contextlib import AsyncExitStack, closing
from pathlib import Path

from aiohttp import web

from gcs_prefetchd.server.bounded_listener import Bounds, listen

MOST = 4
MORE_THAN_BUFFERS_HOLD = bytes(16_000_000)
PATIENCE_S = 10.0


async def test_answers_that_nobody_fetches_hold_no_more_connections_than_may_be() -> None:
    answered: asyncio.Queue[None] = asyncio.Queue()

    async def answer(_: web.Request) -> web.Response:
        # The answer is written before anybody else has a turn on the event loop, and what does not fit waits in the daemon.
        answered.put_nowait(None)
        return web.Response(body=MORE_THAN_BUFFERS_HOLD)

    app = web.Application()
    app.add_routes([web.get("/", answer)])
    async with AsyncExitStack() as stack:
        listener = await listen(stack, app, Bounds(MOST, 60.0), host="127.0.0.1", port=0)
        address = listener.sockets[0].getsockname()
        before = open_files()
        for _ in range(5 * MOST):
            connection = stack.enter_context(closing(socket.create_connection(address)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(answered.get(), PATIENCE_S)
        assert open_files() - before - 5 * MOST <= MOST


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
