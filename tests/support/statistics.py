"""The statistics of a daemon, with a number in every field."""

from gcs_prefetchd.server.statistics import (
    CacheStatistics,
    LimitStatistics,
    OriginStatistics,
    PrefetchStatistics,
    ProcessStatistics,
    ReadStatistics,
    Statistics,
    StreamStatistics,
)

NO_WAITS = {"not_planned": 0, "late": 0, "evicted": 0, "throttled": 0, "changed": 0}

STREAM = StreamStatistics(
    id="job/0",
    data_root="gs://pictures/train",
    epoch=3,
    position=12345,
    length=50000,
    runway_items=512,
    runway_s=2.5,
    reads_per_s=204.8,
    window_items=600,
    missing_at_epoch_start=25000,
    prefetched_items=6200,
    demanded_objects=40,
    waits=NO_WAITS | {"late": 30, "not_planned": 1200},
)

LIMITS = LimitStatistics(
    concurrency=144,
    min_concurrency=8,
    max_concurrency=256,
    last_change_reason="increased",
    last_change_age_s=0.25,
    requests_per_s=3200.0,
    allowed_requests_per_s=5000.0,
    bytes_per_s=320_000_000.0,
    allowed_bytes_per_s=None,
    throttled_s=0.5,
)

STATISTICS = Statistics(
    version="0.1.0",
    instance_id="0b6c5d18621c44c7ab3278bf5a26d4e2",
    uptime_s=86400.5,
    cache=CacheStatistics(
        bytes=1_500_000_000,
        limit_bytes=200 * 10**9,
        reserved_bytes=3_000_000,
        objects=1234567,
        evictions=42,
        damaged=1,
        ready=1,
    ),
    reads=ReadStatistics(
        hits=9000, misses=800, fallbacks=200, hit_ratio=0.9, wait_s=12.34, waits=NO_WAITS | {"late": 700, "evicted": 100}
    ),
    origin=OriginStatistics(requests=10000, bytes=10**9, errors={"503": 7, "timeout": 1200}, in_flight=128),
    limits=LIMITS,
    prefetch=PrefetchStatistics(fetched=5000, demand_fetched=800, runway_items=512),
    process=ProcessStatistics(
        memory_bytes=84 * 10**6, open_files=57, threads=6, tasks=12, fetch_processes=2, fetch_memory_bytes=120 * 10**6
    ),
    streams=(STREAM,),
)
