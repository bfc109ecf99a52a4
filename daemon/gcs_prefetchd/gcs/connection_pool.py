"""The pool of connections to GCS that all downloads share: a bounded number, each reused."""

import asyncio
import socket
import ssl
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from urllib.parse import urlsplit

from aiohappyeyeballs import start_connection

from gcs_prefetchd import __version__
from gcs_prefetchd.gcs.http_connection import BrokenResponseError, Connection, Response

__all__ = ["CONNECT_TIMEOUT_S", "ConnectionPool"]

CONNECT_TIMEOUT_S = 10.0
NEXT_ADDRESS_DELAY_S = 0.25  # before another address of the same host is tried in parallel (RFC 8305)
MAX_IDLE_S = 15.0  # routers forget idle connections silently
RECEIVE_BUFFER_BYTES = 1 << 18
# gzip is accepted so that GCS sends the stored bytes: decompressed ones match neither hash nor length.
_COMMON_HEADERS = f"Host: {{host}}\r\nUser-Agent: gcs-prefetchd/{__version__}\r\nAccept: */*\r\nAccept-Encoding: gzip\r\n"


class ConnectionPool:
    """At most `max_connections` to the server of `endpoint`, an http or https URL. The owner closes the pool.

    Raises OSError (BrokenResponseError, ssl.SSLError and socket.gaierror are subclasses) and TimeoutError.
    """

    def __init__(self, endpoint: str, max_connections: int, read_timeout_s: float) -> None:
        url = urlsplit(endpoint)
        assert url.hostname is not None
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._common_headers = _COMMON_HEADERS.format(host=url.netloc.rpartition("@")[2])
        self._read_timeout_s = read_timeout_s
        self._free = asyncio.Semaphore(max_connections)
        self._buffer = memoryview(bytearray(RECEIVE_BUFFER_BYTES))
        self._idle: list[tuple[Connection, float]] = []  # and since when
        self._open: set[Connection] = set()
        self._idle_timer: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        """Close all connections."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        for connection in self._open:
            connection.close()
        await asyncio.gather(*(connection.lost for connection in self._open))

    def get(self, target: str, headers: dict[str, str]) -> AbstractAsyncContextManager[Response]:
        """GET `target`, an encoded path and query. In the context the response has its head; its body follows."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"GET {target} HTTP/1.1\r\n{self._common_headers}{lines}\r\n"
        if request.count("\n") != 2 + self._common_headers.count("\n") + len(headers):
            raise ValueError("a line break in the request's headers")
        return _Get(self, request.encode("ascii"))

    async def acquire(self, request: bytes) -> tuple[Connection, Response]:
        """Send the request; return its connection, and the response once it has its head. Pair this with `release`."""
        await self._free.acquire()
        connection: Connection | None = None
        try:
            while True:
                idle = self._pop_idle()
                connection = idle or await self._connect()
                response = connection.send(request)
                try:
                    await response.read_head()
                except BrokenResponseError:
                    if idle is None or response.has_started:
                        raise
                    continue  # it was closed while idle, or just now; a new connection follows at the latest
                return connection, response
        except BaseException:
            if connection is not None:
                connection.close()
            self._free.release()
            raise

    def release(self, connection: Connection, response: Response) -> None:
        """The request is done: keep the connection if its response is complete."""
        if response.is_complete and connection.is_reusable:
            self._idle.append((connection, asyncio.get_running_loop().time()))
            if self._idle_timer is None:
                self._idle_timer = asyncio.get_running_loop().call_later(MAX_IDLE_S, self._close_idle)
        else:
            connection.close()
        self._free.release()

    def _pop_idle(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.pop()
            if connection.is_reusable:
                return connection
        return None

    def _close_idle(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for connection, since_s in self._idle:
            if now_s - since_s >= MAX_IDLE_S:
                connection.close()
        self._idle = [(connection, since_s) for connection, since_s in self._idle if connection.is_reusable]
        self._idle_timer = asyncio.get_running_loop().call_later(MAX_IDLE_S, self._close_idle) if self._idle else None

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                connection = await self._open_connection()
        except OSError as exc:
            if isinstance(exc, TimeoutError) and exc.errno is None:  # ours, not the kernel's ETIMEDOUT
                raise TimeoutError(f"no connection to {self._host}:{self._port} within {CONNECT_TIMEOUT_S:g} s") from None
            raise ConnectionError(f"no connection to {self._host}:{self._port}: {exc.strerror or exc}") from None
        self._open.add(connection)
        connection.lost.add_done_callback(lambda _: self._open.discard(connection))
        return connection

    async def _open_connection(self) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        # Several in parallel, so that a broken IPv6 route costs a quarter of a second and not the download.
        sock = await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_DELAY_S, interleave=1, loop=loop)
        try:
            name = self._host if self._tls else None
            _, connection = await loop.create_connection(self._protocol, sock=sock, ssl=self._tls, server_hostname=name)
        except BaseException:
            sock.close()
            raise
        return connection

    def _protocol(self) -> Connection:
        return Connection(self._buffer, self._read_timeout_s)


class _Get(AbstractAsyncContextManager[Response]):
    """One request, from the wait for a connection to the end of its response."""

    def __init__(self, pool: ConnectionPool, request: bytes) -> None:
        self._pool = pool
        self._request = request

    async def __aenter__(self) -> Response:
        self._connection, self._response = await self._pool.acquire(self._request)
        return self._response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.release(self._connection, self._response)
