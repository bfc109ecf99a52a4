"""The statistics in a few lines."""

from dataclasses import replace

import pytest

from gcs_prefetchd.fetch.adaptive_concurrency import CHANGE_REASONS
from gcs_prefetchd.server.statistics_summary import summarize, summarize_stream
from support.statistics import LIMITS, NO_WAITS, STATISTICS, STREAM


def test_numbers_have_their_units() -> None:
    assert summarize(STATISTICS) == {
        "Cache": "1.5 GB of 200 GB, 1,234,567 objects",
        "Evicted": "42 objects",
        "Damaged": "1 object",
        "Reads": "9,000 hits, 800 misses, 200 fallbacks",
        "Hit ratio": "90.0%",
        "Wait time": "12.3 s, summed over all readers",
        "Waits": "800 objects: 700 late, 100 evicted",
        "GCS": "10,000 requests, 1.0 GB received",
        "Failed attempts": "503: 7, timeout: 1,200",
        "Downloads": "128 in progress; limit 144 (8 to 256), increased after fast responses 0.2 s ago",
        "Rate": "3,200 requests/s (5,000 allowed), 320 MB/s",
        "Throttled": "0.5 s, in which prefetches waited for the allowed rate",
        "Prefetched": "5,000 objects; 800 more while a reader waited",
        "Runway": "512 items, the shortest of all streams",
        "Memory": "84.0 MB, and 120 MB in 2 fetch processes",
        "Open files": "57",
        "Uptime": "24 h",
    }


def test_the_allowed_byte_rate_is_shown_beside_the_byte_rate() -> None:
    limits = replace(LIMITS, allowed_bytes_per_s=500e6)
    assert (
        summarize(replace(STATISTICS, limits=limits))["Rate"] == "3,200 requests/s (5,000 allowed), 320 MB/s (500 MB/s allowed)"
    )


def test_a_cache_that_is_still_loading_is_shown_as_such() -> None:
    cache = replace(STATISTICS.cache, ready=0)
    assert summarize(replace(STATISTICS, cache=cache))["Cache"].endswith(" objects so far (still loading the index)")


def test_a_count_of_one_is_singular() -> None:
    process = replace(STATISTICS.process, fetch_processes=1)
    cache = replace(STATISTICS.cache, objects=1)
    summary = summarize(replace(STATISTICS, process=process, cache=cache))
    assert summary["Memory"].endswith(" in 1 fetch process")
    assert summary["Cache"].endswith(", 1 object")


def test_a_daemon_without_fetch_processes_shows_its_own_memory() -> None:
    process = replace(STATISTICS.process, fetch_processes=0, fetch_memory_bytes=0)
    assert summarize(replace(STATISTICS, process=process))["Memory"] == "84.0 MB"


@pytest.mark.parametrize("reason", CHANGE_REASONS)
def test_every_reason_of_the_limit_has_its_words(reason: str) -> None:
    limits = replace(LIMITS, last_change_reason=reason)
    assert f"{CHANGE_REASONS[reason]} 0.2 s ago" in summarize(replace(STATISTICS, limits=limits))["Downloads"]


def test_a_stream_shows_its_position_how_long_its_runway_lasts_and_why_its_readers_waited() -> None:
    assert summarize_stream(STREAM) == {
        "Read": "12,345 of 50,000 items, 204.8 items/s",
        "Runway": "512 items (2.5 s); window 600 items",
        "Prefetched": "6,200 items; 25,000 were missing at the epoch's start",
        "Waits": "1,230 objects: 1,200 not planned, 30 late",
    }


def test_a_stream_without_reads_has_no_rate_and_no_seconds() -> None:
    summary = summarize_stream(replace(STREAM, position=0, waits=NO_WAITS))
    assert summary["Read"] == "0 of 50,000 items"
    assert summary["Runway"] == "512 items; window 600 items"
    assert summary["Waits"] == "none"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (10**6, "12 days")],
)
def test_times_are_shown_in_a_unit_that_leaves_few_digits(seconds: float, shown: str) -> None:
    assert summarize(replace(STATISTICS, uptime_s=seconds))["Uptime"] == shown
