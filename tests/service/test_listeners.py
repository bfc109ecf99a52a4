"""Where the daemon listens: a TCP address whose URL it returns, and a Unix socket for its user and group."""

import asyncio
import socket
import stat
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import ClientSession, UnixConnector, web

from gcs_prefetchd.service.listeners import listen_for_readers, listen_for_statistics
from gcs_prefetchd.shared.errors import StartError


def make_app() -> web.Application:
    async def respond(request: web.Request) -> web.Response:
        return web.Response(text="here")

    app = web.Application()
    app.router.add_get("/", respond)
    return app


@pytest.mark.parametrize(("host", "prefix"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
async def test_a_free_port_is_chosen_and_the_url_names_it(host: str, prefix: str) -> None:
    async with AsyncExitStack() as stack:
        url = await listen_for_statistics(stack, make_app(), (host, 0))
        assert url.startswith(prefix)
        async with ClientSession() as session, session.get(url) as response:
            assert await response.text() == "here"


async def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        async with AsyncExitStack() as stack:
            with pytest.raises(
                StartError, match=rf"^setting http: 127\.0\.0\.1:{port}: the port is in use; choose another with --http"
            ):
                await listen_for_statistics(stack, make_app(), ("127.0.0.1", port))


async def test_an_address_of_another_machine_is_named() -> None:
    async with AsyncExitStack() as stack:
        with pytest.raises(StartError, match=r"^setting http: 192\.0\.2\.1:0: "):
            await listen_for_statistics(stack, make_app(), ("192.0.2.1", 0))


async def test_the_socket_is_for_the_user_and_the_group_however_long_its_path_is(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)  # longer than the address of a Unix socket can be
    folder.mkdir()
    async with AsyncExitStack() as stack:
        await listen_for_readers(stack, make_app(), folder / "daemon.sock")
        mode = await asyncio.to_thread(lambda: (folder / "daemon.sock").stat().st_mode)
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o660)
        (tmp_path / "short").symlink_to(folder)
        connector = UnixConnector(str(tmp_path / "short/daemon.sock"))
        async with ClientSession(connector=connector) as session, session.get("http://daemon/") as response:
            assert await response.text() == "here"
