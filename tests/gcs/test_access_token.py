"""The access token: many requests share one, and a failed refresh is retried or final."""

import asyncio
from pathlib import Path

import pytest

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.errors import CredentialsError
from gcs_prefetchd.testing import Fault, GCSServer, HtmlPage, Kind, Reset, Stall, Status
from support.gcs_clients import DATA, NAME, fault_id, json_response, list_all, put


async def test_many_requests_share_one_token(gcs: GCSServer, authorized_client: GCSClient) -> None:
    version = put(gcs)
    assert await asyncio.gather(*(authorized_client.read(NAME) for _ in range(20))) == [(version, DATA)] * 20
    assert await list_all(authorized_client) == [version]
    assert gcs.counts.total(Kind.TOKEN) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Status(503),
        Reset(),
        HtmlPage(),
        Status(200, body="{}"),
        Status(400, body="not a response of a token endpoint"),
        Status(503, body="x" * 5_000_000),
        Status(200, body="{}", content_type="application/json; charset=hex"),
        json_response("[" * 100_000),
        json_response('{"access_token": "' + "x" * 20_000_000),
        json_response('{"access_token": "two\\nlines", "expires_in": 3600}'),
        json_response('{"access_token": "", "expires_in": 3600}'),
        json_response('{"access_token": "token", "expires_in": 1e400}'),
        json_response('{"access_token": "token", "expires_in": ' + "9" * 400 + "}"),
    ],
    ids=fault_id,
)
async def test_a_failed_token_request_is_retried(gcs: GCSServer, authorized_client: GCSClient, fault: Fault) -> None:
    version = put(gcs)
    gcs.faults.add(fault, "*", kind=Kind.TOKEN, requests={1, 2})
    assert await authorized_client.read(NAME) == (version, DATA)
    assert authorized_client.counters.errors == {"token": 2}


async def test_a_key_that_the_token_endpoint_refuses_is_final_at_once(gcs: GCSServer, authorized_client: GCSClient) -> None:
    put(gcs)
    gcs.faults.add(Status(400, body='{"error": "invalid_grant"}'), "*", kind=Kind.TOKEN)
    for _ in range(5):
        with pytest.raises(CredentialsError, match=f"fetch {NAME.uri}: no access token: .*400 .invalid_grant"):
            await authorized_client.read(NAME)
    assert gcs.counts.total() == 1  # not one for each object


async def test_cancelling_one_of_two_waiters_for_a_token_leaves_the_other_its_bytes(
    gcs: GCSServer, authorized_client: GCSClient
) -> None:
    version = put(gcs)
    gcs.faults.add(Stall(None), "*", kind=Kind.TOKEN, requests=1)
    leaving, staying = asyncio.create_task(authorized_client.read(NAME)), asyncio.create_task(authorized_client.read(NAME))
    listing = asyncio.create_task(list_all(authorized_client))
    await gcs.wait_for(lambda counts: counts.total(Kind.TOKEN) == 1)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gcs.release()
    assert await staying == (version, DATA)
    assert await listing == [version]
    assert gcs.counts.total(Kind.TOKEN) == 1


async def test_a_client_can_be_closed_while_it_waits_for_a_token(gcs: GCSServer, key_file: Path) -> None:
    gcs.faults.add(Stall(None), "*", kind=Kind.TOKEN)
    async with GCSClient(Access(gcs.url, credentials=key_file)) as client:
        reading = asyncio.create_task(client.read(NAME))
        await gcs.wait_for(lambda counts: counts.total(Kind.TOKEN) == 1)
        reading.cancel()
    assert {task.get_name() for task in asyncio.all_tasks()} & {"access token"} == set()
