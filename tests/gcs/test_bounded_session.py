"""aiohttp sessions: bodies are bounded, and redirects are refused."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gcs_prefetchd.gcs.bounded_session import MAX_BODY_BYTES, bounded_response_class, refuse_redirects
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.responses import MAX_ERROR_BODY_BYTES
from gcs_prefetchd.testing import GCSServer, Kind, Status
from support.gcs_clients import BUCKET, list_all, put

Handler = Callable[[web.Request], Awaitable[web.Response]]


async def test_pages_are_requested_uncompressed(gcs: GCSServer, client: GCSClient) -> None:
    """The session unpacks nothing, so that objects arrive as they are stored."""
    put(gcs)
    await list_all(client)
    assert gcs.seen[-1].headers["Accept-Encoding"] == "identity"


async def test_a_listing_never_follows_a_redirect_to_another_host(gcs: GCSServer, authorized_client: GCSClient) -> None:
    put(gcs)
    async with GCSServer() as elsewhere:
        elsewhere.create_bucket(BUCKET)
        gcs.faults.add(Status(302, location=f"{elsewhere.url}/storage/v1/b/{BUCKET}/o"), kind=Kind.LIST, requests=1)
        await list_all(authorized_client)
        assert list(elsewhere.seen) == []


@asynccontextmanager
async def requested(handler: Handler) -> AsyncIterator[aiohttp.ClientResponse]:
    """The response of a server with this handler to a request through a bounded session."""
    app = web.Application()
    app.router.add_get("/", handler)
    async with (
        TestServer(app) as server,
        aiohttp.ClientSession(response_class=bounded_response_class(), trace_configs=[refuse_redirects()]) as session,
        session.get(server.make_url("/")) as response,
    ):
        yield response


@pytest.mark.parametrize("size_bytes", [MAX_BODY_BYTES, MAX_BODY_BYTES + 1])
async def test_a_body_longer_than_any_page_is_an_error(size_bytes: int) -> None:
    async def respond(_: web.Request) -> web.Response:
        return web.Response(body=bytes(size_bytes))

    async with requested(respond) as response:
        if size_bytes == MAX_BODY_BYTES:
            assert len(await response.read()) == size_bytes
        else:
            with pytest.raises(aiohttp.ClientPayloadError, match="exceeds 16 MiB"):
                await response.read()


async def test_only_the_start_of_a_long_error_is_read() -> None:
    async def respond(_: web.Request) -> web.Response:
        return web.Response(status=503, body=b"x" * 1_000_000)

    async with requested(respond) as response:
        assert await response.read() == b"x" * MAX_ERROR_BODY_BYTES


async def test_a_redirect_is_an_error_that_names_its_status() -> None:
    async def respond(_: web.Request) -> web.Response:
        raise web.HTTPFound("/elsewhere")

    with pytest.raises(aiohttp.ClientPayloadError, match="redirected by a 302"):
        async with requested(respond):
            pass


@pytest.mark.parametrize("charset", ["utf-16", "hex", "none"])
async def test_json_is_decoded_as_utf_8_whatever_the_header_names(charset: str) -> None:
    async def respond(_: web.Request) -> web.Response:
        return web.Response(body='{"name": "猫"}'.encode(), headers={"Content-Type": f"application/json; charset={charset}"})

    async with requested(respond) as response:
        assert await response.json() == {"name": "猫"}


async def test_json_nested_without_end_is_a_value_error() -> None:
    async def respond(_: web.Request) -> web.Response:
        return web.Response(body=b"[" * 100_000, content_type="application/json")

    async with requested(respond) as response:
        with pytest.raises(ValueError, match="nested too deeply"):
            await response.json()
