"""The statistics of a running daemon are those of its parts."""

from dataclasses import replace
from pathlib import Path

import pytest

from gcs_prefetchd import __version__
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.wait_reasons import WAIT_REASONS
from gcs_prefetchd.server.statistics import StreamStatistics
from gcs_prefetchd.server.statistics_collector import ReadCounters
from gcs_prefetchd.service.daemon import Daemon
from gcs_prefetchd.shared.messages import ReadReport
from gcs_prefetchd.shared.objects import parse_object_uri
from gcs_prefetchd.shared.paths import cache_path
from gcs_prefetchd.testing import GCSServer, Status
from support.daemons import BUCKET, DATA_ROOT, make_settings, put_items, running
from support.plans import plan_of


def add_plan(daemon: Daemon, stream: str, order: list[int], position: int = 0) -> Reader:
    manifest = daemon.registry.catalog.newest_manifest(DATA_ROOT)
    assert manifest is not None
    plan, indices = plan_of(manifest, order, stream=stream, epoch=3, position=position)
    reader = daemon.registry.register(daemon.registry.prepare(plan, indices))
    daemon.prefetcher.start_epoch()
    return reader


async def test_statistics_name_the_daemon(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 3)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        statistics = daemon.statistics.collect()
        assert statistics.version == __version__
        assert statistics.instance_id == daemon.instance_id
        assert 0 <= statistics.uptime_s < 60


async def test_statistics_count_what_happened(gcs: GCSServer, tmp_path: Path) -> None:
    objects = put_items(gcs, 5)
    gcs.faults.add(Status(503), f"{BUCKET}/train/images/00002.jpg", requests=1)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
        manifest = daemon.registry.catalog.newest_manifest(DATA_ROOT)
        assert manifest is not None
        version = manifest.version(0, 0)
        (daemon.directory.objects / cache_path(BUCKET, version.name.name)).write_bytes(b"damaged")
        await daemon.prefetcher.demand(version.name)
        await daemon.prefetcher.settled()
        daemon.statistics.reads.add(ReadReport("job", "reporter", 1, hits=5, misses=3, fallbacks=2, wait_s=1.5, objects=[]))
        statistics = daemon.statistics.collect()
    size_bytes, image_bytes = sum(map(len, objects.values())), len(objects[version.name.uri])
    cache, reads, origin = statistics.cache, statistics.reads, statistics.origin
    assert (cache.bytes, cache.objects, cache.limit_bytes, cache.damaged) == (size_bytes, 10, 10**9, 1)
    assert (reads.hits, reads.misses, reads.fallbacks, reads.hit_ratio, reads.wait_s) == (5, 3, 2, 0.5, 1.5)
    assert (origin.requests, origin.bytes) == (gcs.counts.total(), size_bytes + image_bytes)
    assert (origin.errors, origin.in_flight) == ({"503": 1}, 0)
    assert statistics.prefetch.fetched + statistics.prefetch.demand_fetched == 11


async def test_a_stream_shows_its_epoch_and_position_and_how_far_ahead_it_is_on_disk(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 8)
    async with running(make_settings(tmp_path / "cache", gcs.url, window_items=4)) as daemon:
        await daemon.prefetcher.settled()
        gone = parse_object_uri(f"{DATA_ROOT}/images/00003.jpg")
        gcs.delete(BUCKET, gone.name)
        await daemon.cache.evict(cache_path(gone.bucket, gone.name))
        add_plan(daemon, "job/train", [7, 6, 5, 4, 3, 2], position=1)
        await daemon.prefetcher.settled()
        (stream,) = daemon.statistics.collect().streams
    assert stream.runway_s == pytest.approx(3 / stream.reads_per_s, abs=0.001)
    assert replace(stream, runway_s=0, reads_per_s=0) == StreamStatistics(
        id="job/train",
        data_root=DATA_ROOT,
        epoch=3,
        position=1,
        length=6,
        runway_items=3,
        runway_s=0,
        reads_per_s=0,
        window_items=4,
        missing_at_epoch_start=1,
        prefetched_items=0,
        demanded_objects=0,
        waits=dict.fromkeys(WAIT_REASONS, 0),
    )


async def test_a_stream_shows_what_was_fetched_for_it_and_why_it_waited(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 20, size_bytes=50_000)
    async with running(make_settings(tmp_path / "cache", gcs.url, window_items=2, cache_size="1MB")) as daemon:
        await daemon.prefetcher.settled()
        absent = [item for item in range(20) if daemon.cache.stamp(cache_path(BUCKET, f"train/images/{item:05}.jpg")) is None]
        assert len(absent) == 10
        add_plan(daemon, "job/train", absent)
        await daemon.prefetcher.settled()
        await daemon.prefetcher.demand(parse_object_uri(f"{DATA_ROOT}/images/{absent[5]:05}.jpg"))
        await daemon.prefetcher.settled()
        statistics = daemon.statistics.collect()
    (stream,) = statistics.streams
    assert (stream.missing_at_epoch_start, stream.prefetched_items, stream.demanded_objects) == (10, 2, 1)
    assert stream.waits == statistics.reads.waits == dict.fromkeys(WAIT_REASONS, 0) | {"late": 1}


async def test_the_runway_is_the_shortest_of_the_streams_that_have_not_ended(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 8)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        add_plan(daemon, "long", [0, 1, 2, 3, 4])
        add_plan(daemon, "short", [5, 6])
        add_plan(daemon, "ended", [7], position=1)
        await daemon.prefetcher.settled()
        assert daemon.statistics.collect().prefetch.runway_items == 2


def test_the_hit_ratio_is_the_share_of_hits_in_all_reads() -> None:
    reads = ReadCounters()
    assert reads.hit_ratio == 0.0
    reads.add(ReadReport("job", "reporter", 1, hits=6, misses=1, fallbacks=0, wait_s=0.25, objects=[]))
    reads.add(ReadReport("job", "reporter", 2, hits=0, misses=0, fallbacks=1, wait_s=0.5, objects=[]))
    assert reads.hit_ratio == 0.75
    assert reads.wait_s == 0.75
