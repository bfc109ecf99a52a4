"""The statistics in words."""

import pytest

from gcs_prefetchd.server.wording import daemon_facts, stream_facts
from support.statistics import NO_WAITS, STREAM, snapshot


def test_numbers_have_their_units() -> None:
    assert daemon_facts(snapshot()) == {
        "Cache": "1.5 GB of 200 GB, 1,234,567 objects",
        "Dropped": "42 objects to make room, 1 damaged",
        "Reads": "9,000 hits, 800 misses, 200 fallbacks",
        "Hit ratio": "90.0%",
        "Waited": "12.3 s, summed over readers",
        "Waited for": "800 objects: 700 late, 100 evicted",
        "From GCS": "10,000 requests, 1.0 GB",
        "Failed tries": "503: 7, timeout: 1,200",
        "Downloads": "128 under way, 144 at most (of 8 to 256, increased after fast responses 0.2 s ago)",
        "Rate": "3,200 of 5,000 requests/s, 320 MB/s",
        "Held back": "0.5 s by the allowed rate",
        "Prefetched": "5,000 objects; 800 more while a reader waited",
        "Runway": "512 items, the shortest of all streams",
        "Takes": "84.0 MB of memory, 57 open files",
        "Up": "24 h",
    }


def test_a_bound_of_bytes_is_shown_beside_their_rate() -> None:
    limits = snapshot()["limits"] | {"allowed_bytes_per_s": 500 * 10**6}
    assert daemon_facts(snapshot(limits=limits))["Rate"] == "3,200 of 5,000 requests/s, 320 MB/s of 500 MB/s"


def test_a_stream_shows_where_it_is_how_long_its_runway_lasts_and_why_its_readers_waited() -> None:
    assert stream_facts(STREAM) == {
        "Read": "12,345 of 50,000 items, 204.8 items/s",
        "Runway": "512 items, 2.5 s; window 600 items",
        "Prefetched": "6,200 items; 25,000 were missing at the epoch's start",
        "Waited for": "1,230 objects: 1,200 not planned, 30 late",
    }


def test_what_nobody_has_read_yet_has_no_rate_and_no_seconds() -> None:
    facts = stream_facts(STREAM | {"position": 0, "waits": NO_WAITS})
    assert facts["Read"] == "0 of 50,000 items"
    assert facts["Runway"] == "512 items; window 600 items"
    assert facts["Waited for"] == "nothing"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (10**6, "12 days")],
)
def test_times_are_shown_in_a_unit_that_leaves_few_digits(seconds: float, shown: str) -> None:
    assert daemon_facts(snapshot(uptime_s=seconds))["Up"] == shown
