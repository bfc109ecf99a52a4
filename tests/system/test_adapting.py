"""The limits in use: a cache is filled from a server that is slow, throttles or is shared."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.fetch.adaptive_concurrency import AdaptiveConcurrency
from gcs_prefetchd.fetch.download_slots import DownloadSlots
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.fetch.rate_limit import RateLimit
from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.checked_read import crc32c_of
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.testing import FlippedByte, GCSServer, Pace, Stall, Status

BUCKET = "pictures"
SIZE_BYTES = 100


@asynccontextmanager
async def fetching(
    gcs: GCSServer,
    cache: Cache,
    *,
    maximum: int = 128,
    max_requests_per_s: float | None = None,
    max_bytes_per_s: float | None = None,
) -> AsyncIterator[tuple[Fetcher, GCSClient]]:
    slots = DownloadSlots(AdaptiveConcurrency(1, maximum), RateLimit(max_requests_per_s, max_bytes_per_s, time.monotonic()))
    async with GCSClient(Access(gcs.url, anonymous=True), connections=512, deadline_s=30.0, before_page=slots.page) as client:
        fetcher = Fetcher(cache, client, slots)
        yield fetcher, client
        await fetcher.close()


def put(gcs: GCSServer, count: int, size_bytes: int = SIZE_BYTES) -> list[ObjectVersion]:
    versions = []
    for number in range(count):
        data = number.to_bytes(size_bytes)
        stored = gcs.put(BUCKET, f"{number:05}.jpg", data)
        versions.append(ObjectVersion(ObjectName(BUCKET, f"{number:05}.jpg"), stored.generation, size_bytes, crc32c_of(data)))
    return versions


async def prefetch(fetcher: Fetcher, cache: Cache, versions: list[ObjectVersion]) -> float:
    """Prefetch the versions; returns how many seconds that took."""
    started_s = time.monotonic()
    await asyncio.gather(*(fetcher.prefetch(version, cache.choose_victims) for version in versions))
    return time.monotonic() - started_s


async def test_a_server_that_throttles_gets_fewer_requests(gcs: GCSServer, cache: Cache) -> None:
    gcs.pace = Pace(latency_s=0.05, requests_per_s=200)
    versions = put(gcs, 800)
    async with fetching(gcs, cache) as (fetcher, client):
        await prefetch(fetcher, cache, versions)
        assert fetcher.slots.concurrency.limit <= 40
        assert client.counters.errors["503"] < len(versions)


async def test_a_server_that_is_never_busy_gets_more_requests(gcs: GCSServer, cache: Cache) -> None:
    gcs.pace = Pace(latency_s=0.6)
    versions = put(gcs, 600)
    async with fetching(gcs, cache, maximum=256) as (fetcher, _):
        await prefetch(fetcher, cache, versions)
        assert fetcher.slots.concurrency.limit > 128
    assert gcs.counts.peak_open_media > 128


async def test_prefetches_retries_and_pages_together_keep_to_the_requests_per_second(gcs: GCSServer, cache: Cache) -> None:
    versions = put(gcs, 60)
    gcs.faults.add(FlippedByte(), requests=1)
    async with fetching(gcs, cache, max_requests_per_s=50.0) as (fetcher, client):
        started_s = time.monotonic()
        for _ in range(10):
            assert [page async for page in client.list(BUCKET, "")]
        await prefetch(fetcher, cache, versions)
        now_s = time.monotonic()
        assert gcs.counts.total() == 130
        # The first burst and the last request did not wait; the last attempts may have left a debt.
        assert now_s - started_s + fetcher.slots.rate.wait_s(now_s) >= (130 - 4) / 50


async def test_prefetches_keep_to_the_bytes_per_second(gcs: GCSServer, cache: Cache) -> None:
    versions = put(gcs, 20, size_bytes=10_000)
    async with fetching(gcs, cache, max_bytes_per_s=200_000.0) as (fetcher, _):
        assert await prefetch(fetcher, cache, versions) >= 0.8
        assert fetcher.slots.throttled_s > 0.5


async def test_a_reader_does_not_wait_when_prefetches_wait_for_the_rate(gcs: GCSServer, cache: Cache) -> None:
    versions = put(gcs, 50)
    async with fetching(gcs, cache, max_requests_per_s=1.0) as (fetcher, _):
        prefetches = [fetcher.prefetch(version, cache.choose_victims) for version in versions[:20]]
        await gcs.wait_for(lambda counts: counts.total() == 1)
        started_s = time.monotonic()
        await asyncio.gather(*(fetcher.demand(version.name, version) for version in versions[10:50]))
        assert time.monotonic() - started_s < 5  # not 40 s, as at the rate
        assert gcs.counts.total() <= 48
        await fetcher.close()
        await asyncio.gather(*prefetches, return_exceptions=True)


async def test_a_retry_after_is_respected_whatever_the_rates_allow(gcs: GCSServer, cache: Cache) -> None:
    (version,) = put(gcs, 1)
    gcs.faults.add(Status(429, retry_after="1"), requests=1)
    async with fetching(gcs, cache) as (fetcher, _):
        assert await prefetch(fetcher, cache, [version]) >= 1


async def test_a_change_of_the_rate_starts_the_prefetches_that_wait(gcs: GCSServer, cache: Cache) -> None:
    versions = put(gcs, 30)
    async with fetching(gcs, cache, max_requests_per_s=1.0) as (fetcher, _):
        waiting = asyncio.create_task(prefetch(fetcher, cache, versions))
        await gcs.wait_for(lambda counts: counts.total() == 1)
        fetcher.slots.set_limits(1, 128, None, None)
        assert await asyncio.wait_for(waiting, 10) < 10


@pytest.mark.parametrize("maximum", [1, 3])
async def test_a_lower_number_of_slots_holds_as_soon_as_downloads_end(gcs: GCSServer, cache: Cache, maximum: int) -> None:
    versions = put(gcs, 20)
    gcs.faults.add(Stall(0))
    async with fetching(gcs, cache, maximum=8) as (fetcher, _):
        waiting = asyncio.create_task(prefetch(fetcher, cache, versions))
        await gcs.wait_for(lambda counts: counts.open_media == 8)
        fetcher.slots.set_limits(1, maximum, None, None)
        gcs.faults.clear()
        gcs.pace = Pace(latency_s=0.005)
        gcs.release()
        await gcs.wait_for(lambda counts: counts.open_media == 0)
        gcs.counts.reset()
        await waiting
        assert gcs.counts.peak_open_media <= maximum
