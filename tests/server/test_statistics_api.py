"""The endpoints over TCP: their responses, and the requests that they refuse."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest

from gcs_prefetchd.shared.daemon_client import DaemonClient, read_daemon_file
from gcs_prefetchd.testing import GCSServer
from support.daemons import DATA_ROOT, make_settings, put_items, running


@pytest.fixture
async def url(gcs: GCSServer, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a daemon that has fetched four items."""
    put_items(gcs, 4)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
        yield str(read_daemon_file(daemon.directory.path)["http"])


async def get(url: str, **headers: str) -> tuple[int, str, str]:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, await response.text(), response.content_type


async def test_stats_have_the_fields_that_users_rely_on(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/stats") as response:
        stats = await response.json()
    assert {"version", "instance_id", "uptime_s", "cache", "reads", "origin", "prefetch", "streams"} <= stats.keys()
    assert stats["cache"].keys() >= {"bytes", "limit_bytes", "objects", "evictions"}
    assert stats["reads"].keys() >= {"hits", "misses", "fallbacks", "hit_ratio", "wait_s"}
    assert stats["origin"].keys() >= {"requests", "bytes", "errors", "in_flight"}
    assert stats["prefetch"].keys() >= {"fetched", "runway_items"}
    assert [stream.keys() >= {"id", "data_root", "epoch", "position", "length"} for stream in stats["streams"]] == [True]
    assert stats["cache"]["objects"] == stats["prefetch"]["fetched"] == 8
    assert stats["streams"][0]["data_root"] == DATA_ROOT
    assert stats["prefetch"]["runway_items"] == 4


async def test_metrics_are_in_the_format_that_prometheus_reads(url: str) -> None:
    status, text, kind = await get(f"{url}/metrics")
    assert (status, kind) == (200, "text/plain")
    assert "gcs_prefetchd_cache_objects 8.0" in text


async def test_healthz_and_readyz_return_200_once_the_daemon_is_ready(url: str) -> None:
    assert [(await get(f"{url}/{path}"))[:2] for path in ("healthz", "readyz")] == [(200, "ok\n"), (200, "ready\n")]


async def test_the_page_shows_the_cache_and_its_streams(url: str) -> None:
    status, text, kind = await get(f"{url}/")
    assert (status, kind) == (200, "text/html")
    assert ", 8 objects" in text
    assert DATA_ROOT in text


async def test_a_web_page_that_rebound_its_name_to_this_machine_is_refused(url: str) -> None:
    status, text, _ = await get(f"{url}/stats", Host="evil.example:80")
    assert status == 403
    assert "evil.example" in text


async def test_a_script_in_a_browser_is_refused(url: str) -> None:
    assert (await get(f"{url}/stats", Origin="http://127.0.0.1"))[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8484", "[::1]:8484", "10.1.2.3:8484"])
async def test_addresses_and_localhost_are_served(url: str, host: str) -> None:
    assert (await get(f"{url}/stats", Host=host))[0] == 200


@pytest.mark.parametrize("target", ["/objects", "/v1/status", "/v1/stop", "/stats/../daemon.json", "/%2e%2e/daemon.json"])
async def test_nothing_else_is_served_over_tcp(url: str, target: str) -> None:
    assert (await get(url + target))[0] == 404


async def test_only_reading_is_possible_over_tcp(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/stats") as response:
        assert response.status == 405


async def test_the_socket_and_the_metrics_have_the_same_numbers(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 2)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
        url = str(read_daemon_file(daemon.directory.path)["http"])
        with closing(DaemonClient(daemon.directory.path)) as client:
            snapshot = await asyncio.to_thread(client.stats)
        text = (await get(f"{url}/metrics"))[1]
    found = re.search(r"^gcs_prefetchd_cache_bytes (\S+)$", text, re.MULTILINE)
    assert found is not None
    assert float(found[1]) == snapshot["cache"]["bytes"] > 0
