"""One HTTP/1.1 connection to GCS, for one GET at a time. httptools parses the answers; nothing is decoded or followed.

aiohttp's client takes 100 us of CPU for a request, as much as all else that is done for a small object: hence this.
"""

import asyncio
import time
from enum import IntEnum
from typing import cast

import httptools
from multidict import CIMultiDict

__all__ = ["BrokenResponseError", "Connection", "Response"]

LARGEST_HEAD = 65_536  # of headers, and of whatever else comes without a byte of a body: trailers, for one
MOST_UNREAD = 1 << 20  # bytes of a body that may wait here before GCS is made to wait; twice that for a moment


class BrokenResponseError(ConnectionError):
    """The connection was lost, or what came over it is no HTTP."""


class _Come(IntEnum):
    """How much of an answer has come."""

    NOTHING = 0
    HEAD = 1
    PIECE = 2
    ALL = 3


class Response:
    """One answer, as it comes: once `head` has returned, `status` and `headers`; then the body, by `pieces`.

    They raise BrokenResponseError where the connection is lost before the end, and TimeoutError where nothing has come for
    the connection's `read_timeout_s`, or not all of the head. `received_bytes` are those of the body so far.
    """

    def __init__(self, connection: "Connection") -> None:
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.received_bytes = 0
        self.is_whole = False
        self._connection = connection
        self._pieces: list[bytes] = []
        self._unread_bytes = 0
        self._error: Exception | None = None
        self._wanted = _Come.NOTHING
        self._waiter: asyncio.Future[None] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether anything of it has come."""
        return self.status != 0 or bool(self.headers)

    async def head(self) -> None:
        """Wait for status and headers."""
        if not self.status:
            await self._wait(_Come.HEAD)

    async def pieces(self, *, together: bool = False) -> list[bytes]:
        """Wait for more of the body and return what has come since; empty at the end.

        `together` waits for the end as long as more comes in time, whatever its length: to be woken once, and not for each
        piece, halves what a body costs.
        """
        if not self.is_whole and (together or not self._pieces):
            await self._wait(_Come.ALL if together else _Come.PIECE)
        pieces, self._pieces, self._unread_bytes = self._pieces, [], 0
        self._connection.flow()
        return pieces

    def hurry(self) -> None:
        """The end is long in coming: wake who waits for it."""
        if self._pieces:
            self.came(_Come.ALL)

    async def first(self, at_most: int) -> bytes:
        """The first bytes of the body, so many or all of it; what is left of it is for nobody.

        TimeoutError where they take longer than the connection's `read_timeout_s`, however steadily they drip.
        """
        body, began_s = bytearray(), time.monotonic()
        while len(body) < at_most and (pieces := await self.pieces()):
            body += b"".join(pieces)
            if time.monotonic() - began_s > self._connection.read_timeout_s:
                raise TimeoutError(f"only {len(body)} bytes of the body with status {self.status} arrived in that time")
        return bytes(body[:at_most])

    def came(self, much: _Come) -> None:
        """Wake who waits for that much."""
        if self._waiter is not None and not self._waiter.done() and much >= self._wanted:
            self._waiter.set_result(None)

    def add(self, piece: bytes) -> None:
        """More of the body."""
        self._pieces.append(piece)
        self.received_bytes += len(piece)
        self._unread_bytes += len(piece)
        self.came(_Come.PIECE)

    def end(self) -> None:
        """All has come."""
        self.is_whole = True
        self.came(_Come.ALL)

    def fail(self, error: Exception) -> None:
        """No more will come."""
        if not self.is_whole and self._error is None:
            self._error = error
            self.came(_Come.ALL)

    @property
    def is_too_far_ahead(self) -> bool:
        """Whether more of the body waits here than whoever reads it in pieces can be expected to take at once."""
        return self._unread_bytes > MOST_UNREAD and self._wanted is not _Come.ALL

    async def _wait(self, much: _Come) -> None:
        if self._error is None:
            self._wanted = much
            self._connection.flow()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        if self._error is not None and not self._pieces:  # what came before it comes first
            raise self._error


class Connection(asyncio.BufferedProtocol):
    """`ask` sends a request; when its answer is whole and `is_reusable`, the next may follow.

    What comes is received into `buffer`, which all connections of an event loop may share, because it is parsed before any
    other receives. `close` gives the connection up, and `lost` is done when it is gone.
    """

    def __init__(self, buffer: memoryview, read_timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost = self._loop.create_future()
        self.is_reusable = True
        self.read_timeout_s = read_timeout_s
        self._buffer = buffer
        self._look_every_s = read_timeout_s / 4  # so late what came of an answer that drips is handed on
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._answer: Response | None = None
        self._useless_bytes = 0  # since the head was whole, or the last byte of the body
        self._has_length = False
        self._heard_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_paused = False

    def ask(self, request: bytes) -> Response:
        """Send a request's head; its answer comes."""
        self._answer = answer = Response(self)
        self._useless_bytes, self._has_length = 0, False
        self._heard_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._look_every_s, self._look_at_the_clock)
        self._transport.write(request)
        return answer

    def close(self) -> None:
        """Give it up at once, whatever is under way."""
        self.is_reusable = False
        self._transport.abort()

    def flow(self) -> None:
        """Make GCS wait, or not, as what is unread of the answer says."""
        wait = self._answer is not None and self._answer.is_too_far_ahead
        if wait != self._is_paused and not self._transport.is_closing():
            self._is_paused = wait
            self._heard_s = self._loop.time()
            (self._transport.pause_reading if wait else self._transport.resume_reading)()

    # --- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their type

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._useless_bytes += nbytes
        try:
            self._parser.feed_data(self._buffer[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(BrokenResponseError(f"the response is not valid HTTP: {exc.__context__ or exc}"))
        if self._answer is not None:
            if self._answer.status:
                self._heard_s = self._loop.time()
            if self._useless_bytes > LARGEST_HEAD:
                self._fail(BrokenResponseError("the headers do not end"))

    def eof_received(self) -> None:
        """The other end sends no more, and so nor do we: the transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        if self._timer is not None:
            self._timer.cancel()
        answer = self._answer
        if answer is not None and not answer.is_whole:
            if exc is None and answer.status and not self._has_length:
                answer.end()  # its end is that of the connection
            else:
                when = f"after {answer.received_bytes} bytes of a body" if answer.status else "before a response arrived"
                how = f": {exc}" if exc is not None and str(exc) else ""
                answer.fail(BrokenResponseError(f"the connection was lost {when}{how}"))
        if not self.lost.done():
            self.lost.set_result(None)

    # --- what httptools calls

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is None:
            raise BrokenResponseError("a response without a request")
        if not self._answer.status:  # what follows a body says nothing that is asked for, and need not end
            self._answer.headers.add(name.decode("latin-1"), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        answer, status = self._answer, self._parser.get_status_code()
        if answer is None:
            raise BrokenResponseError("a response without a request")
        if status < 200:
            answer.headers.clear()  # of an interim answer; the real one follows
            return
        answer.status = status
        self._useless_bytes = 0
        self._has_length = "Content-Length" in answer.headers or "Transfer-Encoding" in answer.headers
        answer.came(_Come.HEAD)

    def on_body(self, body: bytes) -> None:
        self._useless_bytes = 0
        if self._answer is not None:
            self._answer.add(body)
            if self._answer.is_too_far_ahead:
                self.flow()

    def on_message_complete(self) -> None:
        if self._answer is not None and self._answer.status:
            self.is_reusable = self.is_reusable and self._parser.should_keep_alive()
            answer, self._answer = self._answer, None
            answer.end()

    def _look_at_the_clock(self) -> None:
        """One timer for many requests: it looks how long nothing has come, and sets itself again."""
        self._timer = None
        if self._answer is None:
            return
        self._answer.hurry()
        now_s = self._loop.time()
        if self._is_paused:
            self._heard_s = now_s
        left_s = self._heard_s + self.read_timeout_s - now_s
        if left_s <= 0:
            is_in_head = not self._answer.status and self._useless_bytes > 0
            what = "the response's headers did not end within" if is_in_head else "nothing arrived for"
            self._fail(TimeoutError(f"{what} {self.read_timeout_s:g} s"))
        else:
            self._timer = self._loop.call_later(min(left_s, self._look_every_s), self._look_at_the_clock)

    def _fail(self, error: Exception) -> None:
        if self._answer is not None:
            self._answer.fail(error)
        self.close()
