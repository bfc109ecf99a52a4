"""One HTTP/1.1 connection to GCS, for one GET at a time. httptools parses the responses; nothing is decoded or redirected.

aiohttp's client takes 100 us of CPU for a request, as much as everything else that a small object needs: hence this.
"""

import asyncio
import time
from enum import IntEnum
from typing import cast

import httptools
from multidict import CIMultiDict

__all__ = ["BrokenResponseError", "Connection", "Response"]

MAX_HEAD_BYTES = 65_536  # of headers, and of anything else that arrives without a byte of a body, such as trailers
MAX_UNREAD_BYTES = 1 << 20  # of a body that may wait here before GCS is paused; twice that for a moment


class BrokenResponseError(ConnectionError):
    """The connection was lost, or the received bytes are not valid HTTP."""


class _Progress(IntEnum):
    """How much of a response has arrived."""

    NOTHING = 0
    HEAD = 1
    CHUNK = 2
    COMPLETE = 3


class Response:
    """One response as it arrives: once `read_head` has returned, `status` and `headers`; then the body, by `read_chunks`.

    Both raise BrokenResponseError if the connection is lost before the end, and TimeoutError if nothing arrives, or the
    headers do not end, within the connection's `read_timeout_s`. `received_bytes` counts the body so far.
    """

    def __init__(self, connection: "Connection") -> None:
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.received_bytes = 0
        self.is_complete = False
        self._connection = connection
        self._chunks: list[bytes] = []
        self._unread_bytes = 0
        self._error: Exception | None = None
        self._wanted = _Progress.NOTHING
        self._waiter: asyncio.Future[None] | None = None

    @property
    def has_started(self) -> bool:
        """Whether any part of it has arrived."""
        return self.status != 0 or bool(self.headers)

    async def read_head(self) -> None:
        """Wait for status and headers."""
        if not self.status:
            await self._wait(_Progress.HEAD)

    async def read_chunks(self, *, until_complete: bool = False) -> list[bytes]:
        """Wait for more of the body and return the chunks received since the last call; an empty list at the end.

        With `until_complete` it waits for the end for as long as chunks keep arriving, whatever their total length: waking the
        reader once, and not for each chunk, halves the cost of a body.
        """
        if not self.is_complete and (until_complete or not self._chunks):
            await self._wait(_Progress.COMPLETE if until_complete else _Progress.CHUNK)
        chunks, self._chunks, self._unread_bytes = self._chunks, [], 0
        self._connection.update_flow()
        return chunks

    def deliver_pending(self) -> None:
        """The end is slow to arrive: give the pending chunks to a reader that waits for it."""
        if self._chunks:
            self.wake_reader(_Progress.COMPLETE)

    async def read_first(self, max_bytes: int) -> bytes:
        """The first bytes of the body, or all of a shorter one; the rest is lost.

        Raises TimeoutError if they take longer than the connection's `read_timeout_s`, however steadily they arrive.
        """
        body, started_s = bytearray(), time.monotonic()
        while len(body) < max_bytes and (chunks := await self.read_chunks()):
            body += b"".join(chunks)
            if time.monotonic() - started_s > self._connection.read_timeout_s:
                raise TimeoutError(f"only {len(body)} bytes of the body with status {self.status} arrived in that time")
        return bytes(body[:max_bytes])

    def wake_reader(self, progress: _Progress) -> None:
        """Wake the reader if it waits for no more than this progress."""
        if self._waiter is not None and not self._waiter.done() and progress >= self._wanted:
            self._waiter.set_result(None)

    def add_chunk(self, chunk: bytes) -> None:
        """Add the next bytes of the body."""
        self._chunks.append(chunk)
        self.received_bytes += len(chunk)
        self._unread_bytes += len(chunk)
        self.wake_reader(_Progress.CHUNK)

    def complete(self) -> None:
        """Everything has arrived."""
        self.is_complete = True
        self.wake_reader(_Progress.COMPLETE)

    def fail(self, error: Exception) -> None:
        """Nothing more will arrive."""
        if not self.is_complete and self._error is None:
            self._error = error
            self.wake_reader(_Progress.COMPLETE)

    @property
    def has_too_much_unread(self) -> bool:
        """Whether more of the body waits here than a reader of single chunks is likely to read at once."""
        return self._unread_bytes > MAX_UNREAD_BYTES and self._wanted is not _Progress.COMPLETE

    async def _wait(self, progress: _Progress) -> None:
        if self._error is None:
            self._wanted = progress
            self._connection.update_flow()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        if self._error is not None and not self._chunks:  # chunks that arrived before it are delivered before it
            raise self._error


class Connection(asyncio.BufferedProtocol):
    """`send` sends a request; after its complete response the next may follow if the connection `is_reusable`.

    Bytes are received into `buffer`, which all connections of an event loop may share, because they are parsed before any
    other connection receives. `close` aborts the connection; the future `lost` is done when it is closed.
    """

    def __init__(self, buffer: memoryview, read_timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost = self._loop.create_future()
        self.is_reusable = True
        self.read_timeout_s = read_timeout_s
        self._buffer = buffer
        self._check_every_s = read_timeout_s / 4  # the longest delay before the chunks of a slow response are delivered
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._response: Response | None = None
        self._bytes_without_body = 0  # since the headers were complete, or since the last byte of the body
        self._has_length = False
        self._received_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_paused = False

    def send(self, request: bytes) -> Response:
        """Send a request's head and return its response, which is yet to arrive."""
        self._response = response = Response(self)
        self._bytes_without_body, self._has_length = 0, False
        self._received_at_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._check_every_s, self._check_timeout)
        self._transport.write(request)
        return response

    def close(self) -> None:
        """Abort the connection at once, even during a response."""
        self.is_reusable = False
        self._transport.abort()

    def update_flow(self) -> None:
        """Pause or resume GCS, depending on how much of the response is unread."""
        pause = self._response is not None and self._response.has_too_much_unread
        if pause != self._is_paused and not self._transport.is_closing():
            self._is_paused = pause
            self._received_at_s = self._loop.time()
            (self._transport.pause_reading if pause else self._transport.resume_reading)()

    # --- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not have this type

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._bytes_without_body += nbytes
        try:
            self._parser.feed_data(self._buffer[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(BrokenResponseError(f"the response is not valid HTTP: {exc.__context__ or exc}"))
        if self._response is not None:
            if self._response.status:
                self._received_at_s = self._loop.time()
            if self._bytes_without_body > MAX_HEAD_BYTES:
                self._fail(BrokenResponseError("the headers do not end"))

    def eof_received(self) -> None:
        """The server sends no more, and neither do we: the transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        if self._timer is not None:
            self._timer.cancel()
        response = self._response
        if response is not None and not response.is_complete:
            if exc is None and response.status and not self._has_length:
                response.complete()  # without a length the body ends with the connection
            else:
                when = f"after {response.received_bytes} bytes of a body" if response.status else "before a response arrived"
                how = f": {exc}" if exc is not None and str(exc) else ""
                response.fail(BrokenResponseError(f"the connection was lost {when}{how}"))
        if not self.lost.done():
            self.lost.set_result(None)

    # --- called by httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is None:
            raise BrokenResponseError("a response without a request")
        if not self._response.status:  # trailers hold nothing that we need, and may never end
            self._response.headers.add(name.decode("latin-1"), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        response, status = self._response, self._parser.get_status_code()
        if response is None:
            raise BrokenResponseError("a response without a request")
        if status < 200:
            response.headers.clear()  # of an interim response; the final one follows
            return
        response.status = status
        self._bytes_without_body = 0
        self._has_length = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
        response.wake_reader(_Progress.HEAD)

    def on_body(self, body: bytes) -> None:
        self._bytes_without_body = 0
        if self._response is not None:
            self._response.add_chunk(body)
            if self._response.has_too_much_unread:
                self.update_flow()

    def on_message_complete(self) -> None:
        if self._response is not None and self._response.status:
            self.is_reusable = self.is_reusable and self._parser.should_keep_alive()
            response, self._response = self._response, None
            response.complete()

    def _check_timeout(self) -> None:
        """Check how long nothing has arrived, and check again later: one timer for many requests."""
        self._timer = None
        if self._response is None:
            return
        self._response.deliver_pending()
        now_s = self._loop.time()
        if self._is_paused:
            self._received_at_s = now_s
        left_s = self._received_at_s + self.read_timeout_s - now_s
        if left_s <= 0:
            is_in_head = not self._response.status and self._bytes_without_body > 0
            what = "the response's headers did not end within" if is_in_head else "nothing arrived for"
            self._fail(TimeoutError(f"{what} {self.read_timeout_s:g} s"))
        else:
            self._timer = self._loop.call_later(min(left_s, self._check_every_s), self._check_timeout)

    def _fail(self, error: Exception) -> None:
        if self._response is not None:
            self._response.fail(error)
        self.close()
