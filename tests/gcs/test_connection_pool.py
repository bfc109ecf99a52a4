"""The connections to GCS, against servers that answer to the byte what a test wants."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from gcs_prefetchd.gcs.connection_pool import ConnectionPool
from gcs_prefetchd.gcs.http_connection import MOST_UNREAD, BrokenResponseError

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
READ_TIMEOUT_S = 0.3


@dataclass
class Server:
    """What a scripted server has seen."""

    port: int = 0
    opened: int = 0
    open_now: int = 0
    most_open: int = 0
    requests: list[bytes] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    all_closed: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[int]:
    """A server of connections that `serve` answers; yields its port, and waits for the end of all of them."""
    tasks: list[asyncio.Task[None]] = []

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer)
        with suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(begin, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*tasks)


@asynccontextmanager
async def scripted(serve: Serve) -> AsyncIterator[ConnectionPool]:
    """ConnectionPool to a server of one's own."""
    async with listening(serve) as port, connected(Server(port)) as connections:
        yield connections


@asynccontextmanager
async def serving(answer: Callable[[int], bytes | None], *, hold: asyncio.Event | None = None) -> AsyncIterator[Server]:
    """A server that sends `answer(n)` for the n-th request, from 0, and with None closes the connection."""
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
                server.asked.set()
                if hold is not None:
                    await hold.wait()
                data = answer(number)
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
async def connected(server: Server, most: int = 4) -> AsyncIterator[ConnectionPool]:
    connections = ConnectionPool(f"http://127.0.0.1:{server.port}", most, READ_TIMEOUT_S)
    try:
        yield connections
    finally:
        await connections.close()


def plain(body: bytes, *headers: str) -> bytes:
    """An answer with its length."""
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def body_of(connections: ConnectionPool, target: str = "/x") -> bytes:
    async with connections.get(target, {}) as answer:
        body = []
        while pieces := await answer.pieces(together=True):
            body += pieces
        return b"".join(body)


async def test_a_request_is_what_was_asked_and_an_answer_what_was_sent() -> None:
    async with (
        serving(lambda _: plain(b"abc", "x-goog-hash: crc32c=AAAA", "X-Goog-Hash: md5=BBBB")) as server,
        connected(server) as connections,
        connections.get("/o/a%20b?alt=media", {"Authorization": "Bearer t"}) as answer,
    ):
        assert answer.status == 200
        assert answer.headers.getall("X-GOOG-HASH") == ["crc32c=AAAA", "md5=BBBB"]
        assert await answer.pieces(together=True) == [b"abc"]
    first, *headers = server.requests[0].decode().split("\r\n")
    assert first == "GET /o/a%20b?alt=media HTTP/1.1"
    assert {f"Host: 127.0.0.1:{server.port}", "Accept-Encoding: gzip", "Authorization: Bearer t"} <= set(headers)


async def test_a_connection_is_used_again_and_again() -> None:
    async with serving(lambda number: plain(b"%d" % number)) as server, connected(server) as connections:
        assert [await body_of(connections) for _ in range(50)] == [b"%d" % number for number in range(50)]
        assert server.opened == 1


@pytest.mark.parametrize("most", [1, 3])
async def test_there_are_never_more_connections_than_allowed(most: int) -> None:
    async with serving(lambda _: plain(b"x")) as server, connected(server, most) as connections:
        assert await asyncio.gather(*(body_of(connections) for _ in range(40))) == [b"x"] * 40
        assert server.most_open == most


@pytest.mark.parametrize(
    ("answer", "body"),
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
async def test_every_way_to_send_a_body_is_understood_and_the_connection_used_again(answer: bytes, body: bytes) -> None:
    async with serving(lambda _: answer) as server, connected(server) as connections:
        assert [await body_of(connections), await body_of(connections)] == [body, body]
        assert server.opened == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_body_without_a_length_ends_with_the_connection(version: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/{version} 200 OK\r\n\r\nabc".encode())
        writer.close()

    async with scripted(serve) as connections:
        assert [await body_of(connections), await body_of(connections)] == [b"abc", b"abc"]


async def test_a_connection_that_is_to_be_closed_is_not_used_again() -> None:
    async with serving(lambda _: plain(b"abc", "Connection: close")) as server, connected(server) as connections:
        assert [await body_of(connections), await body_of(connections)] == [b"abc", b"abc"]
        assert server.opened == 2


async def test_a_connection_that_was_closed_while_idle_costs_no_error() -> None:
    """The server answers every connection's first request, and closes it at the second one."""
    closed_next = iter([False, True] * 20)
    async with (
        serving(lambda _: None if next(closed_next) else plain(b"abc")) as server,
        connected(server) as connections,
    ):
        assert [await body_of(connections) for _ in range(5)] == [b"abc"] * 5
        assert server.opened == 5


async def test_a_new_connection_that_is_closed_without_an_answer_is_an_error() -> None:
    async with serving(lambda _: None) as server, connected(server) as connections:
        with pytest.raises(BrokenResponseError, match="lost"):
            await body_of(connections)
        assert server.opened == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
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
async def test_what_is_no_answer_is_an_error_and_its_connection_closed(answer: bytes, reason: str) -> None:
    async with serving(lambda _: answer) as server, connected(server) as connections:
        with pytest.raises(BrokenResponseError, match=reason):
            await body_of(connections)
        await server.all_closed.wait()


async def test_a_body_that_is_cut_is_an_error_that_says_how_much_came() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(plain(b"abcdef")[:-2])
        writer.close()

    async with scripted(serve) as connections, connections.get("/x", {}) as answer:
        assert await answer.pieces() == [b"abcd"]
        with pytest.raises(BrokenResponseError, match="after 4 bytes"):
            await answer.pieces()
        assert answer.received_bytes == 4


async def test_bytes_after_an_answer_that_nobody_asked_for_are_in_no_other_answer() -> None:
    async with (
        serving(lambda number: plain(b"abc") + (plain(b"evil") if number == 0 else b"")) as server,
        connected(server) as connections,
    ):
        assert [await body_of(connections), await body_of(connections)] == [b"abc", b"abc"]
        assert server.opened == 2


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"", "nothing arrived for 0.3 s"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "the response's headers did not end within 0.3 s"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "the response's headers did not end within 0.3 s"),
        (plain(b"abcdef")[:-2], "nothing arrived for 0.3 s"),
    ],
    ids=["nothing", "head", "interim answer", "body"],
)
async def test_silence_is_an_error_after_the_read_timeout_and_its_connection_closed(sent: bytes, says: str) -> None:
    async with serving(lambda _: sent) as server, connected(server) as connections:
        with pytest.raises(TimeoutError, match=f"^{re.escape(says)}$"):
            await body_of(connections)
        await server.all_closed.wait()


async def test_a_body_that_comes_slowly_is_waited_for() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(plain(b"abc" * 10)[:-30])
        for byte in b"abc" * 10:
            await asyncio.sleep(READ_TIMEOUT_S / 10)
            writer.write(bytes([byte]))

    async with scripted(serve) as connections:
        assert await body_of(connections) == b"abc" * 10


async def test_the_server_waits_for_who_reads_slowly() -> None:
    size = 64 * MOST_UNREAD
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        for _ in range(size // 65_536):
            writer.write(bytes(65_536))
            await writer.drain()
            sent += 65_536

    async with scripted(serve) as connections, connections.get("/x", {}) as answer:
        received = len(b"".join(await answer.pieces()))
        while received < size:
            most = max(map(len, pieces := await answer.pieces()))
            received += sum(map(len, pieces))
            assert sum(map(len, pieces)) <= 2 * MOST_UNREAD
            assert most <= MOST_UNREAD
            await asyncio.sleep(2 * READ_TIMEOUT_S if received < MOST_UNREAD else 0)  # longer than the server may be silent
        assert received == sent == size


async def test_a_request_that_is_cancelled_gives_its_place_to_the_next() -> None:
    hold = asyncio.Event()
    async with serving(lambda _: plain(b"abc"), hold=hold) as server, connected(server, most=1) as connections:
        tasks = [asyncio.create_task(body_of(connections)) for _ in range(3)]
        await server.asked.wait()
        tasks[0].cancel()
        tasks[1].cancel()
        hold.set()
        assert await tasks[2] == b"abc"
        assert [task.cancelled() for task in tasks[:2]] == [True, True]


async def test_an_answer_that_is_left_early_takes_its_connection_along() -> None:
    async with serving(lambda _: plain(b"abc" * 10_000_000)) as server, connected(server, most=1) as connections:
        async with connections.get("/x", {}) as answer:
            assert await answer.pieces()
        await server.all_closed.wait()


async def test_closing_closes_every_connection() -> None:
    async with serving(lambda _: plain(b"abc")) as server:
        async with connected(server, most=8) as connections:
            await asyncio.gather(*(body_of(connections) for _ in range(8)))
        await server.all_closed.wait()


@pytest.mark.parametrize("header", ["t\r\nX-Evil: 1", "t\nX-Evil: 1"])
async def test_a_token_with_a_line_break_is_refused(header: str) -> None:
    async with serving(lambda _: plain(b"abc")) as server, connected(server) as connections:
        with pytest.raises(ValueError, match="line break"):
            connections.get("/x", {"Authorization": header})
        assert server.requests == []


async def test_nobody_there_is_an_error_that_names_the_address() -> None:
    async with serving(lambda _: None) as server:
        pass
    async with connected(server) as connections:
        with pytest.raises(ConnectionError, match=f"no connection to 127.0.0.1:{server.port}: "):
            await body_of(connections)


async def test_an_address_that_leads_nowhere_does_not_hide_the_one_that_answers() -> None:
    """`localhost` is ::1 as well on most machines, where nobody listens here."""
    async with serving(lambda _: plain(b"abc")) as server:
        connections = ConnectionPool(f"http://localhost:{server.port}", 1, READ_TIMEOUT_S)
        assert await body_of(connections) == b"abc"
        await connections.close()


@pytest.mark.parametrize("endless", [b"X-T: abc\r\n", b"X-T" + b"c" * 1000], ids=["many", "one"])
async def test_trailers_that_do_not_end_are_given_up_in_little_memory(endless: bytes) -> None:
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n")
        while True:
            writer.write(endless * 100)
            await writer.drain()
            sent += 100 * len(endless)

    async with scripted(serve) as connections, connections.get("/x", {}) as answer:
        assert await answer.pieces(together=True) == [b"abc"]
        with pytest.raises(BrokenResponseError, match="the headers do not end"):
            await answer.pieces()
        assert len(answer.headers) == 1
    assert sent < 10_000_000


async def test_trailers_are_passed_over() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"
    async with serving(lambda _: chunked) as server, connected(server) as connections:
        async with connections.get("/x", {}) as answer:
            assert await answer.pieces(together=True) == [b"abc"]
            assert not await answer.pieces()
            assert "X-T" not in answer.headers
        assert await body_of(connections) == b"abc"
        assert server.opened == 1


def dripping(start: bytes) -> Serve:
    """Sends `start` at once, and bytes without end after it, none of which comes as late as silence would be noticed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(start)
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(READ_TIMEOUT_S / 10)

    return serve


async def test_a_head_that_drips_is_given_up_after_the_time_that_silence_has() -> None:
    async with scripted(dripping(b"HTTP/1.1 200 OK\r\nX-A: ")) as connections:
        with pytest.raises(TimeoutError, match=r"^the response's headers did not end within 0\.3 s$"):
            await asyncio.wait_for(body_of(connections), 10 * READ_TIMEOUT_S)


async def test_the_body_of_an_error_that_drips_is_given_up_after_the_time_that_silence_has() -> None:
    start = b"HTTP/1.1 503 Unavailable\r\nContent-Length: 1000\r\n\r\n"
    async with scripted(dripping(start)) as connections, connections.get("/x", {}) as answer:
        with pytest.raises(TimeoutError, match="bytes of the body with status 503 arrived in that time"):
            await asyncio.wait_for(answer.first(1000), 10 * READ_TIMEOUT_S)
