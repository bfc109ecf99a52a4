"""The connection pool: bounded, reused, and never left with a stale connection."""

import asyncio

import pytest

from gcs_prefetchd.gcs.connection_pool import ConnectionPool
from gcs_prefetchd.gcs.http_connection import BrokenResponseError
from support.scripted_server import READ_TIMEOUT_S, body_of, connected, plain, serving


async def test_a_connection_is_reused() -> None:
    async with serving(lambda number: plain(b"%d" % number)) as server, connected(server) as pool:
        assert [await body_of(pool) for _ in range(50)] == [b"%d" % number for number in range(50)]
        assert server.opened == 1


@pytest.mark.parametrize("max_connections", [1, 3])
async def test_there_are_never_more_connections_than_allowed(max_connections: int) -> None:
    async with serving(lambda _: plain(b"x")) as server, connected(server, max_connections) as pool:
        assert await asyncio.gather(*(body_of(pool) for _ in range(40))) == [b"x"] * 40
        assert server.most_open == max_connections


async def test_a_connection_that_the_server_closes_is_not_reused() -> None:
    async with serving(lambda _: plain(b"abc", "Connection: close")) as server, connected(server) as pool:
        assert [await body_of(pool), await body_of(pool)] == [b"abc", b"abc"]
        assert server.opened == 2


async def test_a_connection_closed_while_idle_causes_no_error() -> None:
    """The server responds to the first request of each connection, and closes it on the second."""
    closed_next = iter([False, True] * 20)
    async with (
        serving(lambda _: None if next(closed_next) else plain(b"abc")) as server,
        connected(server) as pool,
    ):
        assert [await body_of(pool) for _ in range(5)] == [b"abc"] * 5
        assert server.opened == 5


async def test_a_new_connection_closed_without_a_response_is_an_error() -> None:
    async with serving(lambda _: None) as server, connected(server) as pool:
        with pytest.raises(BrokenResponseError, match="lost"):
            await body_of(pool)
        assert server.opened == 1


async def test_extra_bytes_after_a_response_are_never_part_of_another() -> None:
    async with (
        serving(lambda number: plain(b"abc") + (plain(b"evil") if number == 0 else b"")) as server,
        connected(server) as pool,
    ):
        assert [await body_of(pool), await body_of(pool)] == [b"abc", b"abc"]
        assert server.opened == 2


async def test_a_cancelled_request_frees_its_connection_for_the_next() -> None:
    hold = asyncio.Event()
    async with serving(lambda _: plain(b"abc"), hold=hold) as server, connected(server, max_connections=1) as pool:
        tasks = [asyncio.create_task(body_of(pool)) for _ in range(3)]
        await server.requested.wait()
        tasks[0].cancel()
        tasks[1].cancel()
        hold.set()
        assert await tasks[2] == b"abc"
        assert [task.cancelled() for task in tasks[:2]] == [True, True]


async def test_a_response_left_early_closes_its_connection() -> None:
    async with serving(lambda _: plain(b"abc" * 10_000_000)) as server, connected(server, max_connections=1) as pool:
        async with pool.get("/x", {}) as response:
            assert await response.read_chunks()
        await server.all_closed.wait()


async def test_closing_the_pool_closes_every_connection() -> None:
    async with serving(lambda _: plain(b"abc")) as server:
        async with connected(server, max_connections=8) as pool:
            await asyncio.gather(*(body_of(pool) for _ in range(8)))
        await server.all_closed.wait()


@pytest.mark.parametrize("header", ["t\r\nX-Evil: 1", "t\nX-Evil: 1"])
async def test_a_header_with_a_line_break_is_refused(header: str) -> None:
    async with serving(lambda _: plain(b"abc")) as server, connected(server) as pool:
        with pytest.raises(ValueError, match="line break"):
            pool.get("/x", {"Authorization": header})
        assert server.requests == []


async def test_a_failed_connection_is_an_error_that_names_the_address() -> None:
    async with serving(lambda _: None) as server:
        pass
    async with connected(server) as pool:
        with pytest.raises(ConnectionError, match=f"no connection to 127.0.0.1:{server.port}: "):
            await body_of(pool)


async def test_an_unreachable_address_does_not_hide_a_reachable_one() -> None:
    """On most machines `localhost` is ::1 as well, and nothing listens there in this test."""
    async with serving(lambda _: plain(b"abc")) as server:
        pool = ConnectionPool(f"http://localhost:{server.port}", 1, READ_TIMEOUT_S)
        assert await body_of(pool) == b"abc"
        await pool.close()
