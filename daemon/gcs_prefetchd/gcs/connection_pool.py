"""The connections to GCS that all downloads share: so many at most, each used again and again."""

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
NEXT_ADDRESS_S = 0.25  # before another address of the same host is tried as well (RFC 8305)
LONGEST_IDLE_S = 15.0  # routers forget idle connections without a word
RECEIVED_AT_ONCE = 1 << 18
# gzip is accepted so that GCS sends stored bytes: decompressed ones match neither hash nor length.
_COMMON = f"Host: {{host}}\r\nUser-Agent: gcs-prefetchd/{__version__}\r\nAccept: */*\r\nAccept-Encoding: gzip\r\n"


class ConnectionPool:
    """To the server of `root`, an http or https URL; at most `most` of them. The owner closes them.

    Raised are OSError (BrokenResponseError, ssl.SSLError and socket.gaierror are some) and TimeoutError.
    """

    def __init__(self, root: str, most: int, read_timeout_s: float) -> None:
        url = urlsplit(root)
        assert url.hostname is not None
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._common = _COMMON.format(host=url.netloc.rpartition("@")[2])
        self._read_timeout_s = read_timeout_s
        self._room = asyncio.Semaphore(most)
        self._buffer = memoryview(bytearray(RECEIVED_AT_ONCE))
        self._idle: list[tuple[Connection, float]] = []  # and since when
        self._open: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        """Close all of them."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in self._open:
            connection.close()
        await asyncio.gather(*(connection.lost for connection in self._open))

    def get(self, target: str, headers: dict[str, str]) -> AbstractAsyncContextManager[Response]:
        """GET `target`, a path and query as they are sent. In the context the answer's head is here, and its body comes."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"GET {target} HTTP/1.1\r\n{self._common}{lines}\r\n"
        if request.count("\n") != 2 + self._common.count("\n") + len(headers):
            raise ValueError("a line break in the request's headers")
        return _Get(self, request.encode("ascii"))

    async def begin(self, request: bytes) -> tuple[Connection, Response]:
        """A connection on which this request was sent, and the answer, whose head is here."""
        await self._room.acquire()
        connection: Connection | None = None
        try:
            while True:
                idle = self._take_idle()
                connection = idle or await self._connect()
                answer = connection.ask(request)
                try:
                    await answer.head()
                except BrokenResponseError:
                    if idle is None or answer.has_begun:
                        raise
                    continue  # it was closed while idle, or as it was taken; in the end there is a new one
                return connection, answer
        except BaseException:
            if connection is not None:
                connection.close()
            self._room.release()
            raise

    def end(self, connection: Connection, answer: Response) -> None:
        """The request is done with: keep the connection, if all of its answer was received."""
        if answer.is_whole and connection.is_reusable:
            self._idle.append((connection, asyncio.get_running_loop().time()))
            if self._sweeper is None:
                self._sweeper = asyncio.get_running_loop().call_later(LONGEST_IDLE_S, self._sweep)
        else:
            connection.close()
        self._room.release()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.pop()
            if connection.is_reusable:
                return connection
        return None

    def _sweep(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for connection, since_s in self._idle:
            if now_s - since_s >= LONGEST_IDLE_S:
                connection.close()
        self._idle = [(connection, since_s) for connection, since_s in self._idle if connection.is_reusable]
        self._sweeper = asyncio.get_running_loop().call_later(LONGEST_IDLE_S, self._sweep) if self._idle else None

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                connection = await self._connected()
        except OSError as exc:
            if isinstance(exc, TimeoutError) and exc.errno is None:  # ours, and not the kernel's ETIMEDOUT
                raise TimeoutError(f"no connection to {self._host}:{self._port} within {CONNECT_TIMEOUT_S:g} s") from None
            raise ConnectionError(f"no connection to {self._host}:{self._port}: {exc.strerror or exc}") from None
        self._open.add(connection)
        connection.lost.add_done_callback(lambda _: self._open.discard(connection))
        return connection

    async def _connected(self) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        # Several at once, so that an IPv6 that leads nowhere costs a quarter of a second and not the download.
        sock = await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_S, interleave=1, loop=loop)
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
    """One request, from the wait for a connection to the end of its answer."""

    def __init__(self, connections: ConnectionPool, request: bytes) -> None:
        self._connections = connections
        self._request = request

    async def __aenter__(self) -> Response:
        self._connection, self._answer = await self._connections.begin(self._request)
        return self._answer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connections.end(self._connection, self._answer)
