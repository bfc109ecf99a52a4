"""The statistics in the text format of Prometheus."""

from dataclasses import replace

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from gcs_prefetchd.server.prometheus_metrics import METRICS, render_metrics
from gcs_prefetchd.server.statistics import Statistics
from support.statistics import LIMITS, STATISTICS, STREAM


def parsed(statistics: Statistics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(render_metrics(statistics).decode())}


def samples(family: Metric) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def test_every_metric_has_the_type_and_the_help_of_its_field() -> None:
    families = parsed(STATISTICS)
    assert list(families) == [one.name for one in METRICS]
    for one in METRICS:
        assert (families[one.name].type, families[one.name].documentation) == (one.field.meaning.kind, one.field.meaning.help)


def test_names_are_those_of_the_fields_with_units_spelled_as_prometheus_does() -> None:
    names = {one.field.path: one.sample_name for one in METRICS}
    assert names["cache.bytes"] == "gcs_prefetchd_cache_bytes"
    assert names["cache.evictions"] == "gcs_prefetchd_cache_evictions_total"
    assert names["reads.wait_s"] == "gcs_prefetchd_reads_wait_seconds_total"
    assert names["limits.allowed_requests_per_s"] == "gcs_prefetchd_limits_allowed_requests_per_second"
    assert names["limits.throttled_s"] == "gcs_prefetchd_limits_throttled_seconds_total"
    assert names["streams[].runway_s"] == "gcs_prefetchd_stream_runway_seconds"


def test_every_sample_is_the_number_of_its_field() -> None:
    second = replace(STREAM, id="job/1", position=7)
    families = parsed(replace(STATISTICS, streams=(STREAM, second)))
    assert samples(families["gcs_prefetchd_cache_objects"]) == {(): 1234567}
    assert samples(families["gcs_prefetchd_reads_hits"]) == {(): 9000}
    assert samples(families["gcs_prefetchd_origin_errors"]) == {("503",): 7, ("timeout",): 1200}
    assert samples(families["gcs_prefetchd_reads_waits"]) == {(key,): n for key, n in STATISTICS.reads.waits.items()}
    positions = families["gcs_prefetchd_stream_position"].samples
    assert {(one.labels["stream"], one.labels["data_root"]): one.value for one in positions} == {
        ("job/0", "gs://pictures/train"): 12345,
        ("job/1", "gs://pictures/train"): 7,
    }
    for one in METRICS:
        section = getattr(STATISTICS, one.field.section)
        if isinstance(section, tuple):
            assert list(samples(families[one.name]).values()) == [getattr(s, one.field.name) for s in (STREAM, second)]
        elif not one.labels and getattr(section, one.field.name) is not None:
            assert samples(families[one.name]) == {(): getattr(section, one.field.name)}, one.name


def test_a_limit_that_is_not_set_has_no_sample() -> None:
    name = "gcs_prefetchd_limits_allowed_bytes_per_second"
    assert samples(parsed(STATISTICS)[name]) == {}
    assert samples(parsed(replace(STATISTICS, limits=replace(LIMITS, allowed_bytes_per_s=1e6)))[name]) == {(): 1e6}


@pytest.mark.parametrize("stream", ['a"b', "a\nb", "a\\b", "{a}", "straße 猫"])
def test_metrics_stay_readable_for_any_name_of_a_stream(stream: str) -> None:
    families = parsed(replace(STATISTICS, streams=(replace(STREAM, id=stream),)))
    assert [sample.labels["stream"] for sample in families["gcs_prefetchd_stream_length"].samples] == [stream]
