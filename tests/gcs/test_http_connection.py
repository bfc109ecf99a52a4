"""One connection: every valid response is parsed, an invalid or late one is an error, and memory is bounded."""

import asyncio
import re

import pytest

from gcs_prefetchd.gcs.http_connection import MAX_UNREAD_BYTES, BrokenResponseError
from support.scripted_server import READ_TIMEOUT_S, Serve, body_of, connected, plain, scripted, serving


async def test_a_request_is_sent_and_its_response_received_byte_by_byte() -> None:
    async with (
        serving(lambda _: plain(b"abc", "x-goog-hash: crc32c=AAAA", "X-Goog-Hash: md5=BBBB")) as server,
        connected(server) as pool,
        pool.get("/o/a%20b?alt=media", {"Authorization": "Bearer t"}) as response,
    ):
        assert response.status == 200
        assert response.headers.getall("X-GOOG-HASH") == ["crc32c=AAAA", "md5=BBBB"]
        assert await response.read_chunks(until_complete=True) == [b"abc"]
    first, *headers = server.requests[0].decode().split("\r\n")
    assert first == "GET /o/a%20b?alt=media HTTP/1.1"
    assert {f"Host: 127.0.0.1:{server.port}", "Accept-Encoding: gzip", "Authorization: Bearer t"} <= set(headers)


@pytest.mark.parametrize(
    ("response", "body"),
    [
        (plain(b""), b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: x\r\n\r\n", b"abcde"),
        (b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" + plain(b"abc"), b"abc"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + plain(b"abc"), b"abc"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", b""),
    ],
    ids=["empty", "chunked", "100", "103", "204", "304"],
)
async def test_every_way_to_send_a_body_is_parsed_and_the_connection_reused(response: bytes, body: bytes) -> None:
    async with serving(lambda _: response) as server, connected(server) as pool:
        assert [await body_of(pool), await body_of(pool)] == [body, body]
        assert server.opened == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_body_without_a_length_ends_with_the_connection(version: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/{version} 200 OK\r\n\r\nabc".encode())
        writer.close()

    async with scripted(serve) as pool:
        assert [await body_of(pool), await body_of(pool)] == [b"abc", b"abc"]


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (b"220 mail.example.com ESMTP\r\n", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "not valid HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Fill: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 9000, "do not end"),
        (b"HTTP/1.1 200 OK\r\nX-Fill: " + b"y" * 300_000, "do not end"),
    ],
    ids=["mail", "two lengths", "negative length", "bad chunk", "upgrade", "many headers", "long header"],
)
async def test_an_invalid_response_is_an_error_and_closes_its_connection(response: bytes, reason: str) -> None:
    async with serving(lambda _: response) as server, connected(server) as pool:
        with pytest.raises(BrokenResponseError, match=reason):
            await body_of(pool)
        await server.all_closed.wait()


async def test_a_truncated_body_is_an_error_that_names_the_received_length() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(plain(b"abcdef")[:-2])
        writer.close()

    async with scripted(serve) as pool, pool.get("/x", {}) as response:
        assert await response.read_chunks() == [b"abcd"]
        with pytest.raises(BrokenResponseError, match="after 4 bytes"):
            await response.read_chunks()
        assert response.received_bytes == 4


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "nothing arrived for 0.3 s"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "the response's headers did not end within 0.3 s"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "the response's headers did not end within 0.3 s"),
        (plain(b"abcdef")[:-2], "nothing arrived for 0.3 s"),
    ],
    ids=["nothing", "head", "interim response", "body"],
)
async def test_silence_is_an_error_after_the_read_timeout_and_closes_the_connection(sent: bytes, reason: str) -> None:
    async with serving(lambda _: sent) as server, connected(server) as pool:
        with pytest.raises(TimeoutError, match=f"^{re.escape(reason)}$"):
            await body_of(pool)
        await server.all_closed.wait()


async def test_a_slow_body_is_read_to_its_end() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(plain(b"abc" * 10)[:-30])
        for byte in b"abc" * 10:
            await asyncio.sleep(READ_TIMEOUT_S / 10)
            writer.write(bytes([byte]))

    async with scripted(serve) as pool:
        assert await body_of(pool) == b"abc" * 10


async def test_a_slow_reader_pauses_the_server() -> None:
    size = 64 * MAX_UNREAD_BYTES
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        for _ in range(size // 65_536):
            writer.write(bytes(65_536))
            await writer.drain()
            sent += 65_536

    async with scripted(serve) as pool, pool.get("/x", {}) as response:
        received = len(b"".join(await response.read_chunks()))
        while received < size:
            most = max(map(len, chunks := await response.read_chunks()))
            received += sum(map(len, chunks))
            assert sum(map(len, chunks)) <= 2 * MAX_UNREAD_BYTES
            assert most <= MAX_UNREAD_BYTES
            # Longer than the server may stay silent.
            await asyncio.sleep(2 * READ_TIMEOUT_S if received < MAX_UNREAD_BYTES else 0)
        assert received == sent == size


@pytest.mark.parametrize("endless", [b"X-T: abc\r\n", b"X-T" + b"c" * 1000], ids=["many", "one"])
async def test_trailers_without_end_are_an_error_and_take_little_memory(endless: bytes) -> None:
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n")
        while True:
            writer.write(endless * 100)
            await writer.drain()
            sent += 100 * len(endless)

    async with scripted(serve) as pool, pool.get("/x", {}) as response:
        assert await response.read_chunks(until_complete=True) == [b"abc"]
        with pytest.raises(BrokenResponseError, match="the headers do not end"):
            await response.read_chunks()
        assert len(response.headers) == 1
    assert sent < 10_000_000


async def test_trailers_are_ignored() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"
    async with serving(lambda _: chunked) as server, connected(server) as pool:
        async with pool.get("/x", {}) as response:
            assert await response.read_chunks(until_complete=True) == [b"abc"]
            assert not await response.read_chunks()
            assert "X-T" not in response.headers
        assert await body_of(pool) == b"abc"
        assert server.opened == 1


def dripping(start: bytes) -> Serve:
    """Sends `start` at once and then bytes without end, none of them late enough to count as silence."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(start)
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(READ_TIMEOUT_S / 10)

    return serve


async def test_headers_that_drip_time_out_as_silence_does() -> None:
    async with scripted(dripping(b"HTTP/1.1 200 OK\r\nX-A: ")) as pool:
        with pytest.raises(TimeoutError, match=r"^the response's headers did not end within 0\.3 s$"):
            await asyncio.wait_for(body_of(pool), 10 * READ_TIMEOUT_S)


async def test_an_error_body_that_drips_times_out_as_silence_does() -> None:
    start = b"HTTP/1.1 503 Unavailable\r\nContent-Length: 1000\r\n\r\n"
    async with scripted(dripping(start)) as pool, pool.get("/x", {}) as response:
        with pytest.raises(TimeoutError, match="bytes of the body with status 503 arrived in that time"):
            await asyncio.wait_for(response.read_first(1000), 10 * READ_TIMEOUT_S)
