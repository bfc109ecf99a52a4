"""The counters of requests, bytes and errors."""

import asyncio

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.testing import Fault, FlippedByte, GCSServer, HtmlPage, Reset, Stall, Status
from support.gcs_clients import DATA, NAME, list_all, put


async def test_requests_bytes_and_errors_by_kind_are_counted(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs)
    faults: list[Fault] = [Status(503), FlippedByte(), Reset(0), Stall(None), HtmlPage()]
    await list_all(client)
    for fault in faults:
        gcs.faults.add(fault, requests=1)
        await client.read(NAME, version)
    assert client.counters.requests == gcs.counts.total() == 11
    assert client.counters.errors == {"503": 1, "crc32c": 1, "connection": 1, "timeout": 1, "size": 1}
    assert client.counters.received_bytes == 6 * len(DATA) + len(HtmlPage().body)


async def test_in_flight_counts_the_current_downloads(gcs: GCSServer) -> None:
    put(gcs)
    gcs.faults.add(Stall(10))
    async with GCSClient(Access(gcs.url, anonymous=True)) as client:
        reads = [asyncio.create_task(client.read(NAME)) for _ in range(3)]
        await gcs.wait_for(lambda counts: counts.open_media == 3)
        assert client.counters.in_flight == 3
        reads[0].cancel()
        gcs.release()
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert [isinstance(result, BaseException) for result in results] == [True, False, False]
        assert client.counters.in_flight == 0
