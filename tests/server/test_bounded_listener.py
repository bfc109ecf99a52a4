"""The number of connections is bounded, whatever the clients do."""

import asyncio
import socket
from contextlib import AsyncExitStack, closing
from pathlib import Path

from aiohttp import web

from gcs_prefetchd.server.bounded_listener import ConnectionLimits, listen

MAX_CONNECTIONS = 4
MORE_THAN_BUFFERS_HOLD = bytes(16_000_000)
PATIENCE_S = 10.0


async def test_clients_that_do_not_read_their_responses_hold_no_more_than_the_allowed_connections() -> None:
    responses: asyncio.Queue[None] = asyncio.Queue()

    async def respond(_: web.Request) -> web.Response:
        # The response is written before another task runs, and what the socket does not accept stays in the daemon.
        responses.put_nowait(None)
        return web.Response(body=MORE_THAN_BUFFERS_HOLD)

    app = web.Application()
    app.add_routes([web.get("/", respond)])
    async with AsyncExitStack() as stack:
        listener = await listen(stack, app, ConnectionLimits(MAX_CONNECTIONS, 60.0), host="127.0.0.1", port=0)
        address = listener.sockets[0].getsockname()
        before = open_files()
        for _ in range(5 * MAX_CONNECTIONS):
            connection = stack.enter_context(closing(socket.create_connection(address)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(responses.get(), PATIENCE_S)
        assert open_files() - before - 5 * MAX_CONNECTIONS <= MAX_CONNECTIONS


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
