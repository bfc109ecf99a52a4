"""How many requests the testing server serves at a time and per second."""

import asyncio
from collections import Counter

import aiohttp

from gcs_prefetchd.testing import GCSServer, Pace
from gcs_prefetchd.testing.latency import Pacer


async def get_all(server: GCSServer, count: int) -> Counter[int]:
    """Request an object this many times at once; returns the statuses."""

    async def get(session: aiohttp.ClientSession) -> int:
        async with session.get(f"{server.url}/storage/v1/b/bucket/o/x?alt=media") as response:
            await response.read()
            return response.status

    async with aiohttp.ClientSession() as session:
        return Counter(await asyncio.gather(*(get(session) for _ in range(count))))


async def test_requests_beyond_those_served_at_a_time_queue() -> None:
    async with GCSServer() as server:
        server.put("bucket", "x", b"bytes")
        server.pace = Pace(latency_s=0.02, at_once=2)
        started_s = asyncio.get_running_loop().time()
        assert await get_all(server, 20) == {200: 20}
        assert asyncio.get_running_loop().time() - started_s >= 0.19


async def test_requests_beyond_the_rate_get_a_503() -> None:
    async with GCSServer() as server:
        server.put("bucket", "x", b"bytes")
        server.pace = Pace(requests_per_s=1)
        assert await get_all(server, 1) == {200: 1}
        statuses = await get_all(server, 20)
        assert statuses[503] >= 15
        server.pace = Pace()
        assert await get_all(server, 20) == {200: 20}


def test_as_many_requests_per_second_are_served_as_the_pace_allows() -> None:
    pacer, pace = Pacer(), Pace(requests_per_s=100)
    served = sum(not pacer.is_too_fast(pace, step / 1000) for step in range(10_000))
    assert 990 <= served <= 1010
