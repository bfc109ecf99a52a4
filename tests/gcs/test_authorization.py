"""Authorization of requests: a refused token is replaced once, and no token leaves for another host."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.shared.errors import CredentialsError
from gcs_prefetchd.shared.objects import ObjectVersion
from gcs_prefetchd.testing import Cut, GCSServer, Kind, MissingHash, Stall, Status
from support.gcs_clients import BUCKET, DATA, KEY, NAME, list_all, make_client, put


async def test_anonymous_requests_carry_no_authorization_whatever_the_environment_names(
    gcs: GCSServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = put(gcs)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "there is no such key"))
    gcs.faults.add(MissingHash(), requests=2)
    async with make_client(gcs) as client:
        await list_all(client)
        await client.read(NAME, version)
        await client.read(NAME)
    assert {seen.kind for seen in gcs.seen} == {Kind.LIST, Kind.MEDIA, Kind.METADATA}
    assert not any("Authorization" in seen.headers for seen in gcs.seen)


async def test_requests_refused_together_share_one_token_refresh(gcs: GCSServer, authorized_client: GCSClient) -> None:
    version = put(gcs)
    await authorized_client.read(NAME)
    gcs.require_token("second")
    # The refusals arrive at different times: a late one must not discard the token requested after an early one.
    gcs.faults.add(Stall(0), requests=3, together=True)
    reads = asyncio.gather(*(authorized_client.read(NAME) for _ in range(10)))
    await gcs.wait_for(lambda counts: counts.total(Kind.TOKEN) == 2 and counts.media[KEY] >= 20)
    gcs.release()
    assert await reads == [(version, DATA)] * 10
    assert gcs.counts.total(Kind.TOKEN) == 2


class CallbackSink:
    """A sink that keeps nothing, and calls a function before the first byte."""

    def __init__(self, on_start: Callable[[], None]) -> None:
        self._on_start = on_start

    async def start(self, version: ObjectVersion) -> None:
        self._on_start()

    async def write(self, chunk: bytes) -> None:
        pass


async def test_a_download_whose_token_expires_resumes_with_a_new_one(gcs: GCSServer, authorized_client: GCSClient) -> None:
    version = put(gcs)
    gcs.faults.add(Cut(1000), requests=1)
    sink = CallbackSink(lambda: gcs.require_token("second"))
    assert await authorized_client.download(NAME, version, sink) == version
    assert [seen.headers.get("Range") for seen in gcs.seen if seen.headers.get("Authorization")][1:] == ["bytes=1000-"] * 2


async def test_a_listing_whose_token_is_refused_continues_with_a_new_one(gcs: GCSServer, authorized_client: GCSClient) -> None:
    version = put(gcs)
    assert await list_all(authorized_client) == [version]
    gcs.require_token("second")
    assert await list_all(authorized_client) == [version]
    assert gcs.counts.list[BUCKET] == 3
    assert gcs.counts.total(Kind.TOKEN) == 2


async def test_credentials_that_stay_refused_are_final_after_one_refresh(gcs: GCSServer, authorized_client: GCSClient) -> None:
    put(gcs)
    gcs.require_token("of another user", BUCKET)
    with pytest.raises(CredentialsError, match=f"fetch {NAME.uri}: GCS returned 401"):
        await authorized_client.read(NAME)
    assert gcs.counts.media[KEY] == 2
    assert gcs.counts.total(Kind.TOKEN) == 2


@pytest.mark.parametrize("kind", [Kind.MEDIA, Kind.METADATA])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_neither_token_nor_request_follows_a_redirect_to_another_host(
    gcs: GCSServer, authorized_client: GCSClient, kind: Kind, status: int
) -> None:
    version = put(gcs)
    async with GCSServer() as elsewhere:
        elsewhere.put(BUCKET, NAME.name, b"of another user")
        path = f"/storage/v1/b/{BUCKET}/o/{NAME.name.replace('/', '%2F')}{'?alt=media' if kind is Kind.MEDIA else ''}"
        gcs.faults.add(Status(status, location=elsewhere.url + path), kind=kind, requests=1)
        gcs.faults.add(MissingHash())  # so that the metadata is requested
        assert await authorized_client.read(NAME) == (version, DATA)
        assert list(elsewhere.seen) == []
