"""The statistics as JSON, and back."""

import json
from dataclasses import replace

import pytest

from gcs_prefetchd.server.statistics import StreamStatistics, all_fields
from gcs_prefetchd.server.statistics_json import from_json, to_json
from gcs_prefetchd.shared.errors import ProtocolError
from support.statistics import STATISTICS, STREAM

# What users rely on: fields may be added, and none of these may go.
CONTRACT = {
    "cache": {"bytes", "limit_bytes", "objects", "evictions"},
    "reads": {"hits", "misses", "fallbacks", "hit_ratio", "wait_s"},
    "origin": {"requests", "bytes", "errors", "in_flight"},
    "prefetch": {"fetched", "runway_items"},
    "process": {"memory_bytes", "open_files", "threads", "tasks"},
    "limits": {"concurrency", "requests_per_s", "allowed_requests_per_s", "bytes_per_s", "allowed_bytes_per_s"},
}
STREAM_CONTRACT = {
    *("id", "data_root", "epoch", "position", "length", "runway_items", "runway_s", "missing_at_epoch_start", "waits")
}


def test_the_json_has_the_fields_that_users_rely_on() -> None:
    data = to_json(STATISTICS)
    assert data.keys() >= {"version", "instance_id", "uptime_s", *CONTRACT}
    for section, names in CONTRACT.items():
        assert names <= data[section].keys()
    assert [STREAM_CONTRACT - stream.keys() for stream in data["streams"]] == [set()]


def test_every_field_is_in_the_json_under_its_name() -> None:
    data = to_json(STATISTICS)
    for one in all_fields():
        section = data["streams"][0] if "[]" in one.path else data[one.section] if one.section else data
        assert one.name in section
    assert data["cache"]["bytes"] == 1_500_000_000
    assert data["limits"]["allowed_bytes_per_s"] is None
    assert data["origin"]["errors"] == {"503": 7, "timeout": 1200}
    assert data["streams"][0]["waits"]["late"] == 30


@pytest.mark.parametrize("streams", [(), (STREAM,), (STREAM, replace(STREAM, id="job/1"))])
def test_statistics_parse_back_unchanged(streams: tuple[StreamStatistics, ...]) -> None:
    statistics = replace(STATISTICS, streams=streams)
    assert from_json(json.loads(json.dumps(to_json(statistics), allow_nan=False))) == statistics


def test_fields_of_a_newer_daemon_are_ignored() -> None:
    data = to_json(STATISTICS)
    data["new"] = 1
    data["cache"]["new"] = 1
    assert from_json(data) == STATISTICS


def test_a_missing_field_is_named() -> None:
    data = to_json(STATISTICS)
    del data["streams"][0]["window_items"]
    with pytest.raises(ProtocolError, match=r"field 'window_items' is missing.*of another version"):
        from_json(data)
