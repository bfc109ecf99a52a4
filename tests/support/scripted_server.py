"""Servers that send exactly the bytes that a test chooses, and a connection pool to them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from gcs_prefetchd.gcs.connection_pool import ConnectionPool

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
READ_TIMEOUT_S = 0.3


@dataclass
class Server:
    """What a scripted server has counted."""

    port: int = 0
    opened: int = 0
    open_now: int = 0
    most_open: int = 0
    requests: list[bytes] = field(default_factory=list)
    requested: asyncio.Event = field(default_factory=asyncio.Event)
    all_closed: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[int]:
    """A server whose connections `serve` handles. Yields its port, and waits until all connections are closed."""
    tasks: list[asyncio.Task[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer)
        with suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*tasks)


@asynccontextmanager
async def scripted(serve: Serve) -> AsyncIterator[ConnectionPool]:
    """A pool connected to a server of its own."""
    async with listening(serve) as port, connected(Server(port)) as pool:
        yield pool


@asynccontextmanager
async def serving(response: Callable[[int], bytes | None], *, hold: asyncio.Event | None = None) -> AsyncIterator[Server]:
    """A server that sends `response(n)` to the n-th request, from 0; None closes the connection."""
    server = Server()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.opened += 1
        server.open_now += 1
        server.most_open = max(server.most_open, server.open_now)
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                number = len(server.requests)
                server.requests.append(request)
                server.requested.set()
                if hold is not None:
                    await hold.wait()
                data = response(number)
                if data is None:
                    break
                writer.write(data)
                await writer.drain()
        finally:
            server.open_now -= 1
            if not server.open_now:
                server.all_closed.set()

    async with listening(serve) as port:
        server.port = port
        yield server


@asynccontextmanager
async def connected(server: Server, max_connections: int = 4) -> AsyncIterator[ConnectionPool]:
    pool = ConnectionPool(f"http://127.0.0.1:{server.port}", max_connections, READ_TIMEOUT_S)
    try:
        yield pool
    finally:
        await pool.close()


def plain(body: bytes, *headers: str) -> bytes:
    """A response with its length."""
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def body_of(pool: ConnectionPool, target: str = "/x") -> bytes:
    async with pool.get(target, {}) as response:
        body = []
        while chunks := await response.read_chunks(until_complete=True):
            body += chunks
        return b"".join(body)
