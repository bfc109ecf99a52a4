"""Each fault looks on the wire as its name promises, and the next request gets the right response."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from typing import Literal

import pytest
import pytest_asyncio

from gcs_prefetchd.testing import (
    Close,
    Cut,
    Drip,
    EmptyBody,
    Fault,
    FlippedByte,
    GCSServer,
    HtmlPage,
    LongBody,
    MalformedHash,
    MissingHash,
    Partial,
    Reset,
    Stall,
    Status,
    WrongGeneration,
)

DATA = b"0123456789" * 100
PATH = "/storage/v1/b/bucket/o/x?alt=media"


@pytest_asyncio.fixture
async def server() -> AsyncIterator[GCSServer]:
    async with GCSServer() as server:
        server.put("bucket", "x", DATA, generation=7)
        yield server


class Wire:
    """One raw connection, which requests the object once."""

    def __init__(self, server: GCSServer) -> None:
        self._server = server

    async def __aenter__(self) -> asyncio.StreamReader:
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writer.write(f"GET {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return reader

    async def __aexit__(self, *exc_info: object) -> None:
        self._writer.close()


async def exchange(server: GCSServer, fault: Fault) -> tuple[str, bytes]:
    """Return head and body of a first response under `fault`; asserts that the second is right."""
    server.faults.add(fault, "bucket/x", requests=1)
    async with Wire(server) as wire:
        head, _, body = (await wire.read()).partition(b"\r\n\r\n")
    async with Wire(server) as wire:
        assert (await wire.read()).endswith(b"\r\n\r\n" + DATA)
    return head.decode(), body


async def test_a_status_is_sent_with_its_retry_after_and_body(server: GCSServer) -> None:
    head, body = await exchange(server, Status(429, retry_after="3", body="slow down"))
    assert head.startswith("HTTP/1.1 429 ")
    assert "Retry-After: 3\r\n" in head
    assert body == b"slow down"


async def test_a_redirect_names_its_target(server: GCSServer) -> None:
    head, _ = await exchange(server, Status(302, location="http://elsewhere/x"))
    assert head.startswith("HTTP/1.1 302 ")
    assert "Location: http://elsewhere/x\r\n" in head


async def test_a_part_is_sent_without_a_range_request(server: GCSServer) -> None:
    head, body = await exchange(server, Partial(10, 19))
    assert head.startswith("HTTP/1.1 206 ")
    assert "Content-Range: bytes 10-19/1000\r\n" in head
    assert "Content-Length: 10\r\n" in head
    assert body == DATA[10:20]


async def test_a_cut_body_promises_more_than_it_sends(server: GCSServer) -> None:
    head, body = await exchange(server, Cut(after_bytes=10))
    assert "Content-Length: 1000" in head
    assert body == DATA[:10]


async def test_a_cut_chunked_body_lacks_its_last_chunk(server: GCSServer) -> None:
    head, body = await exchange(server, Cut(after_bytes=10, framing="chunked"))
    assert "Transfer-Encoding: chunked" in head
    assert body == b"a\r\n0123456789\r\n"


@pytest.mark.parametrize(("framing", "version"), [("close", "HTTP/1.1 "), ("http/1.0", "HTTP/1.0 ")])
async def test_a_cut_body_without_any_framing_looks_complete(
    server: GCSServer, framing: Literal["close", "http/1.0"], version: str
) -> None:
    """The most dangerous one: only size and hash show the client that bytes are missing."""
    head, body = await exchange(server, Cut(after_bytes=10, framing=framing))
    assert head.startswith(version)
    assert "Content-Length: " not in head
    assert "Transfer-Encoding" not in head
    assert body == DATA[:10]


async def test_a_flipped_byte_changes_nothing_else(server: GCSServer) -> None:
    head, body = await exchange(server, FlippedByte(at=3))
    assert "Content-Length: 1000" in head
    assert body == DATA[:3] + bytes([DATA[3] ^ 1]) + DATA[4:]
    _, middle = await exchange(server, FlippedByte())
    assert [at for at in range(1000) if middle[at] != DATA[at]] == [500]


async def test_a_long_body_has_the_length_in_its_headers(server: GCSServer) -> None:
    head, body = await exchange(server, LongBody(extra_bytes=5))
    assert "Content-Length: 1005" in head
    assert body == DATA + bytes(5)


async def test_an_empty_body_keeps_the_headers_of_the_object(server: GCSServer) -> None:
    head, body = await exchange(server, EmptyBody())
    assert head.startswith("HTTP/1.1 200 ")
    assert "x-goog-stored-content-length: 1000" in head
    assert body == b""


async def test_a_hash_may_be_missing_or_malformed(server: GCSServer) -> None:
    head, body = await exchange(server, MissingHash())
    assert "x-goog-hash" not in head.lower()
    assert body == DATA
    head, body = await exchange(server, MalformedHash("crc32c=nonsense"))
    assert "x-goog-hash: crc32c=nonsense\r\n" in head
    assert body == DATA


async def test_a_wrong_generation_differs_from_the_objects(server: GCSServer) -> None:
    assert "x-goog-generation: 8\r\n" in (await exchange(server, WrongGeneration()))[0]
    assert "x-goog-generation: 5\r\n" in (await exchange(server, WrongGeneration(5)))[0]


async def test_an_html_page_is_sent_with_status_200(server: GCSServer) -> None:
    head, body = await exchange(server, HtmlPage())
    assert head.startswith("HTTP/1.1 200 ")
    assert "Content-Type: text/html" in head
    assert body.startswith(b"<!doctype html>")


async def test_a_closed_connection_sends_nothing(server: GCSServer) -> None:
    assert await exchange(server, Close()) == ("", b"")


async def test_a_reset_before_the_headers_is_a_connection_error(server: GCSServer) -> None:
    server.faults.add(Reset(), requests=1)
    async with Wire(server) as wire:
        with pytest.raises(ConnectionResetError):
            await wire.read()


async def test_a_reset_in_the_body_follows_its_first_bytes(server: GCSServer) -> None:
    server.faults.add(Reset(after_bytes=10), requests=1)
    async with Wire(server) as wire:
        assert await wire.readuntil(b"\r\n\r\n0123456789")
        with pytest.raises(ConnectionResetError):
            await wire.read()


async def test_a_stalled_body_continues_when_released(server: GCSServer) -> None:
    server.faults.add(Stall(after_bytes=10), requests=1)
    async with Wire(server) as wire:
        assert await wire.readuntil(b"\r\n\r\n0123456789")
        assert server.counts.open_media == 1
        server.release()
        assert await wire.read() == DATA[10:]
    await server.wait_for(lambda counts: counts.open_media == 0)
    assert server.counts.bytes["bucket/x"] == 1000


async def test_a_stall_before_the_headers_ends_when_the_client_leaves(server: GCSServer) -> None:
    server.faults.add(Stall(None), requests=1)
    async with Wire(server):
        await server.wait_for(lambda counts: counts.open_media == 1)
    await server.wait_for(lambda counts: counts.open_media == 0)
    assert server.counts.total_bytes == 0


async def test_a_dripping_body_arrives_completely_but_slowly(server: GCSServer) -> None:
    started = asyncio.get_running_loop().time()
    _, body = await exchange(server, Drip(piece_bytes=300, interval_s=0.01))
    assert body == DATA
    assert asyncio.get_running_loop().time() - started >= 0.03


async def test_stopping_the_server_ends_stalled_responses() -> None:
    async with GCSServer() as server:
        server.put("bucket", "x", DATA)
        server.faults.add(Stall(10))
        wires = [Wire(server) for _ in range(3)]
        readers = [await wire.__aenter__() for wire in wires]
        await server.wait_for(lambda counts: counts.peak_open_media == 3)
    assert [(await reader.read()).endswith(b"\r\n\r\n0123456789") for reader in readers] == [True] * 3
    for wire in wires:
        await wire.__aexit__()
    assert server.counts.open_media == 0


async def test_a_client_that_resets_while_it_is_served_disturbs_no_other(server: GCSServer) -> None:
    server.faults.add(Drip(piece_bytes=1, interval_s=0.001), requests=1)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n0")
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    await server.wait_for(lambda counts: counts.open_media == 0)
    async with Wire(server) as wire:
        assert (await wire.read()).endswith(DATA)


async def test_faults_of_listings_and_tokens_leave_objects_alone(server: GCSServer) -> None:
    server.faults.add(Status(500), "bucket", kind="list", requests=1)
    server.faults.add(Status(503), "/token", kind="token")
    async with Wire(server) as wire:
        assert (await wire.read()).endswith(DATA)
    for line, status in ((b"GET /storage/v1/b/bucket/o", b" 500 "), (b"POST /token", b" 503 ")):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        assert status in await reader.readline()
        await reader.read()
        writer.close()
