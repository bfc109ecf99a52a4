"""What `/stats` and `/metrics` say."""

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from gcs_prefetchd import __version__
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.wait_reasons import WAIT_REASONS
from gcs_prefetchd.server.statistics import METRICS, Reads, Statistics
from gcs_prefetchd.service.daemon import Daemon
from gcs_prefetchd.shared.messages import ReadReport
from gcs_prefetchd.shared.objects import parse_object_uri
from gcs_prefetchd.shared.paths import cache_path
from gcs_prefetchd.testing import GCSServer, Status
from support.daemons import BUCKET, DATA_ROOT, make_settings, put_items, running
from support.plans import plan_of

# What issue 2 promises to users; more may come, none may go.
CONTRACT = {
    "cache": {"bytes", "limit_bytes", "objects", "evictions"},
    "reads": {"hits", "misses", "fallbacks", "hit_ratio", "wait_s"},
    "origin": {"requests", "bytes", "errors", "in_flight"},
    "prefetch": {"fetched", "runway_items"},
    "process": {"memory_bytes", "open_files", "threads", "tasks"},
    "limits": {"concurrency", "requests_per_s", "allowed_requests_per_s", "bytes_per_s", "allowed_bytes_per_s"},
}
STREAM_CONTRACT = {
    "id",
    "data_root",
    "epoch",
    "position",
    "length",
    "runway_items",
    "runway_s",
    "missing_at_epoch_start",
    "waits",
}


def parsed(statistics: Statistics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(statistics.metrics().decode())}


def add_plan(daemon: Daemon, stream: str, order: list[int], position: int = 0) -> Reader:
    manifest = daemon.registry.catalog.newest_manifest(DATA_ROOT)
    assert manifest is not None
    plan, indices = plan_of(manifest, order, stream=stream, epoch=3, position=position)
    reader = daemon.registry.register(daemon.registry.prepare(plan, indices))
    daemon.prefetcher.begin()
    return reader


async def test_the_snapshot_has_what_users_rely_on(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 3)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
        snapshot = json.loads(json.dumps(daemon.statistics.snapshot(), allow_nan=False))
        assert snapshot["version"] == __version__
        assert snapshot["instance_id"] == daemon.instance_id
        assert 0 <= snapshot["uptime_s"] < 60
        for section, keys in CONTRACT.items():
            assert keys <= set(snapshot[section])
        assert [STREAM_CONTRACT - set(stream) for stream in snapshot["streams"]] == [set()]


async def test_the_snapshot_counts_what_happened(gcs: GCSServer, tmp_path: Path) -> None:
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
        snapshot = daemon.statistics.snapshot()
    size_bytes, image_bytes = sum(map(len, objects.values())), len(objects[version.name.uri])
    assert snapshot["cache"]["bytes"] == size_bytes
    assert snapshot["cache"]["objects"] == 10
    assert snapshot["cache"]["limit_bytes"] == 10**9
    assert snapshot["cache"]["damaged"] == 1
    assert snapshot["origin"] == {
        "requests": gcs.counts.total(),
        "bytes": size_bytes + image_bytes,
        "errors": {"503": 1},
        "in_flight": 0,
    }
    assert snapshot["prefetch"]["fetched"] + snapshot["prefetch"]["demand_fetched"] == 11


async def test_a_stream_shows_its_epoch_and_position_and_how_far_ahead_it_is_on_disk(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 8)
    async with running(make_settings(tmp_path / "cache", gcs.url, window_items=4)) as daemon:
        await daemon.prefetcher.settled()
        gone = parse_object_uri(f"{DATA_ROOT}/images/00003.jpg")
        gcs.delete(BUCKET, gone.name)
        await daemon.cache.drop(cache_path(gone.bucket, gone.name))
        add_plan(daemon, "job/train", [7, 6, 5, 4, 3, 2], position=1)
        await daemon.prefetcher.settled()
        (stream,) = daemon.statistics.snapshot()["streams"]
    assert stream.pop("runway_s") == pytest.approx(3 / stream.pop("reads_per_s"), abs=0.001)
    assert stream == {
        "id": "job/train",
        "data_root": DATA_ROOT,
        "epoch": 3,
        "position": 1,
        "length": 6,
        "runway_items": 3,
        "window_items": 4,
        "missing_at_epoch_start": 1,
        "prefetched_items": 0,
        "demanded_objects": 0,
        "waits": dict.fromkeys(WAIT_REASONS, 0),
    }


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
        snapshot = daemon.statistics.snapshot()
    (stream,) = snapshot["streams"]
    assert (stream["missing_at_epoch_start"], stream["prefetched_items"], stream["demanded_objects"]) == (10, 2, 1)
    assert stream["waits"] == snapshot["reads"]["waits"] == dict.fromkeys(WAIT_REASONS, 0) | {"late": 1}


async def test_the_runway_is_that_of_the_hungriest_stream_that_has_not_ended(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 8)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        add_plan(daemon, "long", [0, 1, 2, 3, 4])
        add_plan(daemon, "short", [5, 6])
        add_plan(daemon, "ended", [7], position=1)
        await daemon.prefetcher.settled()
        assert daemon.statistics.snapshot()["prefetch"]["runway_items"] == 2


def test_hits_are_told_as_a_share_of_all_reads() -> None:
    reads = Reads()
    assert reads.hit_ratio == 0.0
    reads.add(ReadReport("job", "reporter", 1, hits=6, misses=1, fallbacks=0, wait_s=0.25, objects=[]))
    reads.add(ReadReport("job", "reporter", 2, hits=0, misses=0, fallbacks=1, wait_s=0.5, objects=[]))
    assert reads.hit_ratio == 0.75
    assert reads.wait_s == 0.75


async def test_the_metrics_say_what_the_snapshot_says(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 4)
    gcs.faults.add(Status(503), requests=1)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
        daemon.statistics.reads.add(ReadReport("job", "reporter", 1, hits=5, misses=3, fallbacks=2, wait_s=1.5, objects=[]))
        snapshot, families = daemon.statistics.snapshot(), parsed(daemon.statistics)
    assert set(families) == set(METRICS)
    for name, (kind, (section, key), text) in METRICS.items():
        assert (families[name].type, families[name].documentation) == (kind, text)
        tolerance = 2**24 if key == "memory_bytes" else 0
        expected = expected_samples(snapshot, section, key)
        assert samples_of(families[name]) == pytest.approx(expected, rel=0, abs=tolerance), name


def samples_of(family: Metric) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def expected_samples(snapshot: dict[str, Any], section: str, key: str) -> dict[tuple[str, ...], float]:
    if section == "streams":
        return {(stream["data_root"], stream["id"]): stream[key] for stream in snapshot["streams"]}
    if key in ("errors", "waits"):
        return {(error,): count for error, count in snapshot[section][key].items()}
    return {} if snapshot[section][key] is None else {(): snapshot[section][key]}


@pytest.mark.parametrize("stream", ['a"b', "a\nb", "a\\b", "{a}", "straße 猫"])
async def test_whatever_a_reader_calls_its_stream_the_metrics_stay_readable(
    gcs: GCSServer, tmp_path: Path, stream: str
) -> None:
    put_items(gcs, 1)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        add_plan(daemon, stream, [0])
        families = parsed(daemon.statistics)
        assert [sample.labels["stream"] for sample in families["gcs_prefetchd_stream_length"].samples] == [stream]
