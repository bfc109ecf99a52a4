"""Prefetches and demands: who shares a download, who goes first, and what is evicted for whom."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.observer import ChooseVictims, EvictableFiles, LeastRecentlyUsed
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.checked_read import crc32c_of, read_checked
from gcs_prefetchd.shared.errors import (
    CacheFullError,
    DaemonUnavailableError,
    ObjectChangedError,
    ObjectMissingError,
    OriginUnavailableError,
)
from gcs_prefetchd.shared.moving_average import MovingDuration
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path
from gcs_prefetchd.testing import FlippedByte, GCSServer, Stall, Status
from support.caches import keeping, names_in, observer_of, slots_of

BUCKET = "pictures"


@pytest.fixture
async def client(gcs: GCSServer) -> AsyncIterator[GCSClient]:
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=20.0) as opened:
        yield opened


@pytest.fixture
async def fetcher(cache: Cache, client: GCSClient) -> AsyncIterator[Fetcher]:
    opened = Fetcher(cache, client, slots_of(4))
    yield opened
    await opened.close()


def put(gcs: GCSServer, name: str, data: bytes) -> ObjectVersion:
    """Store the object and return the version that a listing would name."""
    stored = gcs.put(BUCKET, name, data)
    return ObjectVersion(ObjectName(BUCKET, name), stored.generation, len(data), crc32c_of(data))


def path_of(version: ObjectVersion) -> str:
    return cache_path(version.name.bucket, version.name.name)


def cached(cache: Cache, version: ObjectVersion) -> bytes | None:
    """What a reader finds at the object's path."""
    return read_checked(cache.directory.objects, path_of(version))


def gets(gcs: GCSServer, version: ObjectVersion) -> int:
    return gcs.counts.media[f"{BUCKET}/{version.name.name}"]


def media_in_order(gcs: GCSServer) -> list[str]:
    return [seen.key.removeprefix(f"{BUCKET}/") for seen in gcs.seen if seen.kind == "media"]


async def prefetch(fetcher: Fetcher, version: ObjectVersion, choose: ChooseVictims) -> None:
    """Prefetch as the prefetcher does: only what is not cached, and without cancelling it."""
    if not fetcher.is_cached(version):
        await asyncio.shield(fetcher.prefetch(version, choose))


# Sharing


async def test_callers_who_miss_together_share_one_get(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    version = put(gcs, "a.jpg", b"bytes of a")
    gcs.faults.add(Stall(3))
    callers = [asyncio.create_task(fetcher.demand(version.name, version)) for _ in range(20)]
    await gcs.wait_for(lambda counts: counts.open_media == 1)
    callers += [asyncio.create_task(fetcher.demand(version.name, version)) for _ in range(20)]
    callers += [asyncio.create_task(prefetch(fetcher, version, cache.choose_victims)) for _ in range(20)]
    gcs.release()
    await asyncio.gather(*callers)
    assert cached(cache, version) == b"bytes of a"
    assert gets(gcs, version) == 1


async def test_callers_who_know_no_version_share_one_get(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    version = put(gcs, "a.jpg", b"bytes of a")
    await asyncio.gather(*(fetcher.demand(version.name, None) for _ in range(20)))
    assert cached(cache, version) == b"bytes of a"
    assert gets(gcs, version) == 1


async def test_a_demand_joins_a_running_prefetch(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    version = put(gcs, "a.jpg", b"bytes of a")
    gcs.faults.add(Stall(3))
    started = asyncio.create_task(prefetch(fetcher, version, cache.choose_victims))
    await gcs.wait_for(lambda counts: counts.open_media == 1)
    demands = [
        asyncio.create_task(fetcher.demand(version.name, version)),
        asyncio.create_task(fetcher.demand(version.name, None)),
    ]
    gcs.release()
    await asyncio.gather(started, *demands)
    assert cached(cache, version) == b"bytes of a"
    assert gets(gcs, version) == 1


async def test_all_callers_of_a_download_get_its_error(gcs: GCSServer, fetcher: Fetcher) -> None:
    gcs.create_bucket(BUCKET)
    name = ObjectName(BUCKET, "missing.jpg")
    demands = (fetcher.demand(name, None) for _ in range(5))
    errors = await asyncio.gather(*demands, return_exceptions=True)
    assert all(isinstance(error, ObjectMissingError) and name.uri in str(error) for error in errors)
    assert gcs.counts.total() == 1


async def test_a_caller_that_is_cancelled_leaves_the_others_their_download(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher
) -> None:
    version = put(gcs, "a.jpg", b"bytes of a")
    gcs.faults.add(Stall(3))
    leaving, staying = (asyncio.create_task(fetcher.demand(version.name, version)) for _ in range(2))
    await gcs.wait_for(lambda counts: counts.open_media == 1)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gcs.release()
    await staying
    assert cached(cache, version) == b"bytes of a"
    assert gets(gcs, version) == 1


async def test_a_download_that_all_callers_left_is_finished_all_the_same(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher
) -> None:
    """Its bytes have been paid for."""
    version = put(gcs, "a.jpg", b"bytes of a")
    gcs.faults.add(Stall(3))
    leaving = asyncio.create_task(fetcher.demand(version.name, version))
    await gcs.wait_for(lambda counts: counts.open_media == 1)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    gcs.release()
    await fetcher.demand(version.name, version)
    assert cached(cache, version) == b"bytes of a"
    assert gets(gcs, version) == 1


# Generations


async def test_a_caller_that_needs_a_newer_generation_than_the_running_download_gets_it(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher
) -> None:
    old = put(gcs, "a.jpg", b"old bytes")
    gcs.faults.add(Stall(3), requests=1)
    old_demand = asyncio.create_task(prefetch(fetcher, old, cache.choose_victims))
    await gcs.wait_for(lambda counts: counts.open_media == 1)
    new = put(gcs, "a.jpg", b"newer bytes")
    new_demand = asyncio.create_task(fetcher.demand(new.name, new))
    new_prefetch = asyncio.create_task(prefetch(fetcher, new, cache.choose_victims))
    gcs.release()
    await asyncio.gather(old_demand, new_demand, new_prefetch)
    assert cached(cache, new) == b"newer bytes"
    assert gets(gcs, new) == 2


async def test_a_caller_that_needs_a_newer_generation_does_not_get_the_error_of_the_older_one(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher
) -> None:
    old = put(gcs, "a.jpg", b"old bytes")
    new = put(gcs, "a.jpg", b"newer bytes")
    results = await asyncio.gather(
        prefetch(fetcher, old, cache.choose_victims),
        prefetch(fetcher, new, cache.choose_victims),
        fetcher.demand(new.name, None),
        return_exceptions=True,
    )
    assert isinstance(results[0], ObjectChangedError)
    assert results[1] is None
    assert results[2] is None
    assert cached(cache, new) == b"newer bytes"


async def test_a_stale_generation_in_the_cache_is_replaced(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    old = put(gcs, "a.jpg", b"old bytes")
    await fetcher.demand(old.name, old)
    new = put(gcs, "a.jpg", b"newer bytes")
    await fetcher.demand(new.name, new)
    assert cached(cache, new) == b"newer bytes"
    assert len(cache) == 1
    assert cache.bytes == len(b"newer bytes")


async def test_a_demand_for_a_replaced_generation_downloads_the_live_one(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher
) -> None:
    old = put(gcs, "a.jpg", b"old bytes")
    new = put(gcs, "a.jpg", b"newer bytes")
    await asyncio.gather(*(fetcher.demand(old.name, old) for _ in range(5)))
    assert cached(cache, new) == b"newer bytes"
    assert gets(gcs, new) == 2


async def test_a_prefetch_of_a_replaced_generation_fails(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    old = put(gcs, "a.jpg", b"old bytes")
    put(gcs, "a.jpg", b"newer bytes")
    with pytest.raises(ObjectChangedError):
        await prefetch(fetcher, old, cache.choose_victims)
    assert len(cache) == 0


async def test_a_demand_for_a_deleted_object_raises_that_it_is_missing(gcs: GCSServer, fetcher: Fetcher) -> None:
    version = put(gcs, "a.jpg", b"bytes of a")
    gcs.delete(BUCKET, "a.jpg")
    with pytest.raises(ObjectMissingError, match=r"gs://pictures/a\.jpg"):
        await fetcher.demand(version.name, version)


# Files on disk


@pytest.mark.parametrize("pinned", [True, False])
async def test_a_demanded_file_that_is_damaged_is_downloaded_again(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher, *, pinned: bool
) -> None:
    version = put(gcs, "a.jpg", b"bytes of a")
    await prefetch(fetcher, version, cache.choose_victims)
    with (cache.directory.objects / path_of(version)).open("r+b") as file:
        file.write(b"B")
    await asyncio.gather(*(fetcher.demand(version.name, version if pinned else None) for _ in range(5)))
    assert cached(cache, version) == b"bytes of a"
    assert gets(gcs, version) == 2
    assert cache.damaged == 1


@pytest.mark.parametrize("pinned", [True, False])
async def test_a_demanded_file_that_is_intact_costs_no_get(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher, *, pinned: bool
) -> None:
    version = put(gcs, "a.jpg", b"bytes of a")
    await prefetch(fetcher, version, cache.choose_victims)
    await fetcher.demand(version.name, version if pinned else None)
    await prefetch(fetcher, version, cache.choose_victims)
    assert gets(gcs, version) == 1
    assert fetcher.downloaded.prefetch == 1
    assert fetcher.downloaded.demand == 0


async def test_a_demand_for_a_cached_file_counts_as_its_use(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    first, second = put(gcs, "1.jpg", b"1"), put(gcs, "2.jpg", b"2")
    await prefetch(fetcher, first, cache.choose_victims)
    await prefetch(fetcher, second, cache.choose_victims)
    await fetcher.demand(first.name, first)
    assert [name.name for name in names_in(cache)] == ["2.jpg", "1.jpg"]


# Order and number


async def test_no_more_downloads_run_at_a_time_than_the_setting_allows(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    versions = [put(gcs, f"{i}.jpg", bytes([i])) for i in range(20)]
    gcs.faults.add(Stall(0))
    callers = [asyncio.create_task(prefetch(fetcher, version, cache.choose_victims)) for version in versions[:10]]
    callers += [asyncio.create_task(fetcher.demand(version.name, version)) for version in versions[10:]]
    for round_of_four in range(1, 6):
        await gcs.wait_for(lambda counts, n=round_of_four: counts.total() == 4 * n)  # type: ignore[misc]
        gcs.release()
    await asyncio.gather(*callers)
    assert gcs.counts.peak_open_media == 4


async def test_a_demand_starts_before_the_prefetches_that_wait(gcs: GCSServer, cache: Cache, client: GCSClient) -> None:
    fetcher = Fetcher(cache, client, slots_of(1))
    versions = [put(gcs, f"{i}.jpg", bytes([i])) for i in range(5)]
    gcs.faults.add(Stall(0), f"{BUCKET}/0.jpg")
    callers = [asyncio.create_task(prefetch(fetcher, version, cache.choose_victims)) for version in versions[:4]]
    await gcs.wait_for(lambda counts: counts.open_media == 1)
    callers.append(asyncio.create_task(fetcher.demand(versions[4].name, versions[4])))
    asyncio.get_running_loop().call_soon(gcs.release)
    await asyncio.gather(*callers)
    assert media_in_order(gcs) == ["0.jpg", "4.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert fetcher.downloaded.demand == 1


async def test_a_demand_for_an_object_whose_prefetch_waits_moves_it_to_the_front(
    gcs: GCSServer, cache: Cache, client: GCSClient
) -> None:
    fetcher = Fetcher(cache, client, slots_of(1))
    versions = [put(gcs, f"{i}.jpg", bytes([i])) for i in range(5)]
    gcs.faults.add(Stall(0), f"{BUCKET}/0.jpg")
    callers = [asyncio.create_task(prefetch(fetcher, version, cache.choose_victims)) for version in versions]
    await gcs.wait_for(lambda counts: counts.open_media == 1)
    callers.append(asyncio.create_task(fetcher.demand(versions[4].name, versions[4])))
    asyncio.get_running_loop().call_soon(gcs.release)
    await asyncio.gather(*callers)
    assert media_in_order(gcs) == ["0.jpg", "4.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert fetcher.downloaded.demand == 1
    assert fetcher.downloaded.prefetch == 4


async def test_failed_downloads_release_their_slots(gcs: GCSServer, cache: Cache, client: GCSClient) -> None:
    fetcher = Fetcher(cache, client, slots_of(1))
    version = put(gcs, "a.jpg", b"bytes of a")
    for _ in range(3):
        with pytest.raises(ObjectMissingError):
            await fetcher.demand(ObjectName(BUCKET, "missing.jpg"), None)
    await fetcher.demand(version.name, version)
    assert cached(cache, version) == b"bytes of a"


# Space


async def test_a_demand_gets_space_when_a_prefetch_would_get_none(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    kept = put(gcs, "kept.jpg", bytes(600_000))
    await prefetch(fetcher, kept, cache.choose_victims)
    wanted = put(gcs, "wanted.jpg", bytes(500_000))
    with pytest.raises(CacheFullError):
        await prefetch(fetcher, wanted, keeping(cache, path_of(kept)))
    await asyncio.gather(*(fetcher.demand(wanted.name, wanted) for _ in range(5)))
    assert cached(cache, wanted) == bytes(500_000)
    assert cached(cache, kept) is None
    assert gets(gcs, wanted) == 1


class Keeping(LeastRecentlyUsed):
    """An observer that chooses the given victims."""

    def __init__(self, choose_victims: ChooseVictims) -> None:
        self._choose_victims = choose_victims

    def choose_victims(self, short_bytes: int, files: EvictableFiles) -> list[str] | None:
        return self._choose_victims(short_bytes)


async def test_the_observer_chooses_what_a_demand_evicts(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    kept, other = put(gcs, "kept.jpg", bytes(400_000)), put(gcs, "other.jpg", bytes(400_000))
    await prefetch(fetcher, kept, cache.choose_victims)
    await prefetch(fetcher, other, cache.choose_victims)
    observer_of(cache).target = Keeping(keeping(cache, path_of(kept)))
    wanted = put(gcs, "wanted.jpg", bytes(500_000))
    await fetcher.demand(wanted.name, wanted)
    assert cached(cache, kept) == bytes(400_000)
    assert cached(cache, other) is None


async def test_a_caller_that_may_evict_more_does_not_share_the_failure_of_one_that_may_evict_less(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher
) -> None:
    kept, wanted = put(gcs, "kept.jpg", bytes(600_000)), put(gcs, "wanted.jpg", bytes(500_000))
    await prefetch(fetcher, kept, cache.choose_victims)
    choose = keeping(cache, path_of(kept))
    callers = (
        prefetch(fetcher, wanted, choose),
        prefetch(fetcher, wanted, choose),
        prefetch(fetcher, wanted, cache.choose_victims),
    )
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(result) for result in results] == [CacheFullError, CacheFullError, type(None)]
    assert cached(cache, wanted) == bytes(500_000)


async def test_a_prefetch_without_space_fails_before_its_request_and_evicts_nothing(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher
) -> None:
    kept = put(gcs, "kept.jpg", bytes(600_000))
    await prefetch(fetcher, kept, cache.choose_victims)
    wanted = put(gcs, "wanted.jpg", bytes(500_000))
    with pytest.raises(CacheFullError):
        await prefetch(fetcher, wanted, keeping(cache, path_of(kept)))
    assert cached(cache, kept) == bytes(600_000)
    assert gets(gcs, wanted) == 0


async def test_a_demand_gets_space_although_it_joins_a_prefetch_that_finds_none(
    gcs: GCSServer, cache: Cache, client: GCSClient
) -> None:
    fetcher = Fetcher(cache, client, slots_of(1))
    kept = put(gcs, "kept.jpg", bytes(600_000))
    await prefetch(fetcher, kept, cache.choose_victims)
    choose, wanted = keeping(cache, path_of(kept)), put(gcs, "wanted.jpg", bytes(500_000))
    started = asyncio.create_task(prefetch(fetcher, wanted, choose))
    demand = asyncio.create_task(fetcher.demand(wanted.name, wanted))
    results = await asyncio.gather(started, demand, return_exceptions=True)
    assert isinstance(results[0], CacheFullError)
    assert results[1] is None
    assert cached(cache, wanted) == bytes(500_000)


async def test_a_demand_gets_space_although_prefetches_that_find_none_keep_starting(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher
) -> None:
    kept = put(gcs, "kept.jpg", bytes(600_000))
    await prefetch(fetcher, kept, cache.choose_victims)
    choose, wanted = keeping(cache, path_of(kept)), put(gcs, "wanted.jpg", bytes(500_000))

    async def prefetch_repeatedly() -> None:
        for _ in range(3):
            with contextlib.suppress(CacheFullError):
                await prefetch(fetcher, wanted, choose)

    await asyncio.gather(prefetch_repeatedly(), fetcher.demand(wanted.name, wanted))
    assert cached(cache, wanted) == bytes(500_000)


async def test_a_demand_for_a_replaced_generation_gets_space_for_the_live_one(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher
) -> None:
    kept = put(gcs, "kept.jpg", bytes(600_000))
    await prefetch(fetcher, kept, cache.choose_victims)
    old = put(gcs, "wanted.jpg", b"small")
    new = put(gcs, "wanted.jpg", bytes(500_000))
    await fetcher.demand(old.name, old)
    assert cached(cache, new) == bytes(500_000)


async def test_an_object_larger_than_the_cache_fails_and_evicts_nothing(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    kept, huge = put(gcs, "kept.jpg", b"kept"), put(gcs, "huge.jpg", bytes(1_000_001))
    await prefetch(fetcher, kept, cache.choose_victims)
    with pytest.raises(CacheFullError):
        await fetcher.demand(huge.name, huge)
    assert cached(cache, kept) == b"kept"
    assert gets(gcs, huge) == 0


async def test_the_duration_of_downloads_is_measured(gcs: GCSServer, cache: Cache, client: GCSClient) -> None:
    """The size of the windows depends on it."""
    measured = MovingDuration(assumed_s=1000.0)
    fetcher = Fetcher(cache, client, slots_of(4), download_s=measured)
    for i in range(3):
        await prefetch(fetcher, put(gcs, f"{i}.jpg", b"bytes"), cache.choose_victims)
    assert (mean_s := measured.mean_s) == pytest.approx(1000 * 0.98**3, abs=5)
    with pytest.raises(ObjectMissingError):
        await fetcher.demand(ObjectName(BUCKET, "missing.jpg"), None)
    assert measured.mean_s == mean_s  # a failure does not count


# Close


async def test_close_leaves_nothing_running_and_nothing_unfinished(gcs: GCSServer, cache: Cache, client: GCSClient) -> None:
    """Some downloads have bytes on the disk, some wait for a slot, some for GCS."""
    fetcher = Fetcher(cache, client, slots_of(4))
    large = put(gcs, "large.jpg", bytes(500_000))
    versions = [large, *(put(gcs, f"{i}.jpg", bytes(1000)) for i in range(10))]
    gcs.faults.add(Stall(500))
    before = asyncio.all_tasks()
    callers = [asyncio.create_task(prefetch(fetcher, version, cache.choose_victims)) for version in versions]
    await gcs.wait_for(lambda counts: counts.open_media == 4)
    await fetcher.close()
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(error, asyncio.CancelledError) for error in errors)
    assert [task for task in asyncio.all_tasks() - before if task.get_name().startswith("fetch")] == []
    assert cache.directory.leftover_files() == []
    assert cache.capacity.reserved_bytes == 0


async def test_after_close_no_download_starts(gcs: GCSServer, cache: Cache, fetcher: Fetcher) -> None:
    version = put(gcs, "a.jpg", b"bytes of a")
    await fetcher.close()
    with pytest.raises(DaemonUnavailableError, match=r"gs://pictures/a\.jpg: the daemon is stopping"):
        await fetcher.demand(version.name, version)
    with pytest.raises(DaemonUnavailableError):
        await prefetch(fetcher, version, cache.choose_victims)
    assert gcs.counts.total() == 0


@pytest.mark.parametrize("size_bytes", [0, 10, 900_000])
async def test_a_download_that_starts_again_leaves_one_complete_file(
    gcs: GCSServer, cache: Cache, fetcher: Fetcher, size_bytes: int
) -> None:
    version = put(gcs, "a.jpg", bytes(size_bytes))
    gcs.faults.add(FlippedByte() if size_bytes else Status(503), requests=1)
    await fetcher.demand(version.name, version)
    assert cached(cache, version) == bytes(size_bytes)
    assert gets(gcs, version) == 2
    assert cache.directory.leftover_files() == []


async def test_an_outage_of_gcs_removes_nothing_from_the_cache(gcs: GCSServer, cache: Cache) -> None:
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=0.2) as client:
        fetcher = Fetcher(cache, client, slots_of(4))
        there, absent = put(gcs, "there.jpg", b"there"), put(gcs, "absent.jpg", b"absent")
        await prefetch(fetcher, there, cache.choose_victims)
        gcs.faults.add(Status(503))
        with pytest.raises(OriginUnavailableError, match=r"absent\.jpg"):
            await fetcher.demand(absent.name, absent)
        await fetcher.demand(there.name, there)
    assert cached(cache, there) == b"there"
    assert cache.directory.leftover_files() == []
