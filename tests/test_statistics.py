"""What `/stats` and `/metrics` say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from gcs_prefetchd import __version__
from gcs_prefetchd.order import order_digest
from gcs_prefetchd.protocol import Plan, ReadReport
from gcs_prefetchd.service import Service
from gcs_prefetchd.statistics import METRICS, Reads, Statistics
from gcs_prefetchd.streams import path_of
from gcs_prefetchd.testing import GCSServer, Status
from support import BUCKET, DATA_ROOT, make_settings, put_items, running

# What issue 2 promises to users; more may come, none may go.
CONTRACT = {
    "cache": {"bytes", "limit_bytes", "objects", "evictions"},
    "reads": {"hits", "misses", "fallbacks", "hit_ratio", "wait_s"},
    "origin": {"requests", "bytes", "errors", "in_flight"},
    "prefetch": {"fetched", "runway_items"},
}
STREAM_CONTRACT = {"id", "data_root", "epoch", "position", "length"}


def parsed(statistics: Statistics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(statistics.metrics().decode())}


def add_plan(service: Service, stream: str, order: list[int], position: int = 0) -> None:
    manifest, indices = service.registry.manifest(DATA_ROOT), np.array(order, dtype=np.uint32)
    assert manifest is not None
    plan = Plan(stream, stream, DATA_ROOT, manifest.digest, 3, position, order_digest(indices))
    service.registry.add_plan(plan, indices)


async def test_the_snapshot_has_what_users_rely_on(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 3)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as service:
        snapshot = json.loads(json.dumps(service.statistics.snapshot(), allow_nan=False))
        assert snapshot["version"] == __version__
        assert snapshot["instance_id"] == service.instance_id
        assert 0 <= snapshot["uptime_s"] < 60
        for section, keys in CONTRACT.items():
            assert keys <= set(snapshot[section])
        assert [STREAM_CONTRACT - set(stream) for stream in snapshot["streams"]] == [set()]


async def test_the_snapshot_counts_what_happened(gcs: GCSServer, tmp_path: Path) -> None:
    objects = put_items(gcs, 5)
    gcs.faults.add(Status(503), f"{BUCKET}/train/images/00002.jpg", requests=1)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as service:
        await service.prefetcher.settled()
        manifest = service.registry.manifest(DATA_ROOT)
        assert manifest is not None
        version = manifest.version(0, 0)
        (service.directory.objects / path_of(version)).write_bytes(b"damaged")
        await service.fetcher.demand(version.name, version, ())
        await service.prefetcher.settled()
        snapshot = service.statistics.snapshot()
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
    async with running(make_settings(tmp_path / "cache", gcs.url, window_items=4)) as service:
        add_plan(service, "job/train", [7, 6, 5, 4, 3, 2], position=1)
        service.prefetcher.wake()
        await service.prefetcher.settled()
        assert service.statistics.snapshot()["streams"] == [
            {"id": "job/train", "data_root": DATA_ROOT, "epoch": 3, "position": 1, "length": 6, "runway_items": 4}
        ]


async def test_the_runway_is_that_of_the_hungriest_stream_that_has_not_ended(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 8)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as service:
        add_plan(service, "long", [0, 1, 2, 3, 4])
        add_plan(service, "short", [5, 6])
        add_plan(service, "ended", [7], position=1)
        service.prefetcher.wake()
        await service.prefetcher.settled()
        assert service.statistics.snapshot()["prefetch"]["runway_items"] == 2


def test_hits_are_told_as_a_share_of_all_reads() -> None:
    reads = Reads()
    assert reads.hit_ratio == 0.0
    reads.add(ReadReport("job", hits=6, misses=1, fallbacks=0, wait_s=0.25, objects=[]))
    reads.add(ReadReport("job", hits=0, misses=0, fallbacks=1, wait_s=0.5, objects=[]))
    assert reads.hit_ratio == 0.75
    assert reads.wait_s == 0.75


async def test_the_metrics_say_what_the_snapshot_says(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 4)
    gcs.faults.add(Status(503), requests=1)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as service:
        await service.prefetcher.settled()
        service.statistics.reads.add(ReadReport("job", hits=5, misses=3, fallbacks=2, wait_s=1.5, objects=[]))
        snapshot, families = service.statistics.snapshot(), parsed(service.statistics)
    assert set(families) == set(METRICS)
    for name, (kind, (section, key), text) in METRICS.items():
        assert (families[name].type, families[name].documentation) == (kind, text)
        assert samples_of(families[name]) == expected_samples(snapshot, section, key), name


def samples_of(family: Metric) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def expected_samples(snapshot: dict[str, Any], section: str, key: str) -> dict[tuple[str, ...], float]:
    if section == "streams":
        return {(stream["data_root"], stream["id"]): stream[key] for stream in snapshot["streams"]}
    if key == "errors":
        return {(error,): count for error, count in snapshot[section][key].items()}
    return {(): snapshot[section][key]}


@pytest.mark.parametrize("stream", ['a"b', "a\nb", "a\\b", "{a}", "straße 猫"])
async def test_whatever_a_reader_calls_its_stream_the_metrics_stay_readable(
    gcs: GCSServer, tmp_path: Path, stream: str
) -> None:
    put_items(gcs, 1)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as service:
        add_plan(service, stream, [0])
        families = parsed(service.statistics)
        assert [sample.labels["stream"] for sample in families["gcs_prefetchd_stream_length"].samples] == [stream]
