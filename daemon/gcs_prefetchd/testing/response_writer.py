"""Sending a response: at once, in pieces, paced, or broken by a fault."""

import asyncio
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import responses

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from gcs_prefetchd.testing.fault_effects import read_body
from gcs_prefetchd.testing.faults import Close, Cut, DeliveryFault, Drip, Reset, Stall
from gcs_prefetchd.testing.responses import Content, Response

__all__ = ["deliver", "deliver_broken", "script"]

PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes; `body_bytes` of them belong to the body."""

    data: bytes
    body_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """Send nothing for a while."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hold:
    """Send nothing until the server releases what it holds."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Reset the connection."""


Step = Send | Wait | Hold | Abort


def script(response: Response, body: bytes, fault: DeliveryFault) -> Iterator[Step]:
    """Yield what happens on the connection, in order; unless aborted it is closed at the end."""
    length = [("Content-Length", str(len(body)))]
    match fault:
        case Close():
            return
        case Reset(after_bytes=None):
            yield Abort()
        case Reset(after_bytes=int(count)):
            yield Send(_head(response, length) + body[:count], len(body[:count]))
            yield Abort()
        case Cut(after_bytes=count, framing="length"):
            yield Send(_head(response, length) + body[:count], len(body[:count]))
        case Cut(after_bytes=count, framing="chunked"):
            chunk = b"%x\r\n%s\r\n" % (len(body[:count]), body[:count]) if body[:count] else b""
            yield Send(_head(response, [("Transfer-Encoding", "chunked")]) + chunk, len(body[:count]))
        case Cut(after_bytes=count, framing="http/1.0"):
            yield Send(_head(response, [], "HTTP/1.0") + body[:count], len(body[:count]))
        case Cut(after_bytes=count):
            yield Send(_head(response, []) + body[:count], len(body[:count]))
        case Stall(after_bytes=None):
            yield Hold()
            yield Send(_head(response, length) + body, len(body))
        case Stall(after_bytes=int(count)):
            yield Send(_head(response, length) + body[:count], len(body[:count]))
            yield Hold()
            yield Send(body[count:], len(body[count:]))
        case Drip():
            yield Send(_head(response, length))
            for start in range(0, len(body), fault.piece_bytes):
                piece = body[start : start + fault.piece_bytes]
                yield Wait(fault.interval_s)
                yield Send(piece, len(piece))


def _head(response: Response, framing: list[tuple[str, str]], version: str = "HTTP/1.1") -> bytes:
    # Written by hand: aiohttp would not send headers that the body does not keep.
    headers = [*response.headers.items(), *framing, ("Connection", "close")]
    lines = [
        f"{version} {response.status} {responses.get(response.status, '')}",
        *(f"{key}: {value}" for key, value in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class _Delivered(web.StreamResponse):
    """Signals to aiohttp that the response was already sent and that the connection ends."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self.force_close()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


async def deliver_broken(
    request: web.BaseRequest,
    response: Response,
    fault: DeliveryFault,
    sent: Callable[[int], None],
    released: asyncio.Event,
) -> web.StreamResponse:
    """Send a response under `fault` and report the body's bytes to `sent`; stops early if the client disconnects."""
    body = await asyncio.to_thread(read_body, response) if isinstance(response.body, Content) else response.body
    transport = request.transport
    for step in script(response, body, fault):
        if transport is None or transport.is_closing():
            break
        match step:
            case Send():
                transport.write(step.data)
                sent(step.body_bytes)
            case Wait():
                await asyncio.sleep(step.seconds)
            case Hold():
                await released.wait()
            case Abort():
                _reset(transport)
    return _end(transport)


def _end(transport: asyncio.Transport | None) -> web.StreamResponse:
    if transport is not None and not transport.is_closing():
        # A process forked meanwhile (a DataLoader worker) holds a copy of the socket, and closing ours would leave the
        # connection open: write_eof shuts it down for all.
        transport.write_eof()
        transport.close()
    return _Delivered()


def _reset(transport: asyncio.Transport) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def deliver(
    request: web.BaseRequest, response: Response, sent: Callable[[int], None], bytes_per_s: float | None
) -> web.StreamResponse:
    """Send a complete response and report the body's bytes to `sent`; `bytes_per_s` bounds the rate of a body."""
    body = response.body
    if isinstance(body, bytes) and (bytes_per_s is None or not body):
        complete = web.Response(status=response.status, headers=response.headers, body=body)
        await complete.prepare(request)
        await complete.write_eof()
        sent(len(body))
        return complete
    streamed = web.StreamResponse(status=response.status, headers=response.headers)
    streamed.content_length = len(body) if isinstance(body, bytes) else body.size_bytes
    if streamed.content_length is None:
        streamed.enable_chunked_encoding()
    await streamed.prepare(request)
    try:
        await _send_pieces(streamed, body, sent, bytes_per_s)
    except (OSError, zlib.error):
        # The file changed or is not gzip: the headers cannot be kept, and the client must see that.
        return _end(request.transport)
    await streamed.write_eof()
    return streamed


async def _send_pieces(
    streamed: web.StreamResponse, body: bytes | Content, sent: Callable[[int], None], bytes_per_s: float | None
) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    pieces = _cut(body) if isinstance(body, bytes) else body.chunks()
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        if bytes_per_s is not None:
            due += len(piece) / bytes_per_s
            await asyncio.sleep(due - loop.time())
        await streamed.write(piece)
        sent(len(piece))


def _cut(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]
