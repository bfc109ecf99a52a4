"""Every field of the statistics is described."""

from dataclasses import fields, is_dataclass

import pytest

from gcs_prefetchd.server import statistics
from gcs_prefetchd.server.statistics import Field, Statistics, all_fields
from support.statistics import STATISTICS

CLASSES = [getattr(statistics, name) for name in statistics.__all__ if name.endswith("Statistics")]


def test_every_field_of_every_class_is_listed_once() -> None:
    listed = [one.path for one in all_fields()]
    assert len(listed) == len(set(listed)) == sum(not is_dataclass(field.type) for one in CLASSES for field in fields(one))


def test_a_field_is_named_by_its_section() -> None:
    listed = [one.path for one in all_fields()]
    assert listed[:5] == ["version", "instance_id", "uptime_s", "cache.bytes", "cache.limit_bytes"]
    assert listed[listed.index("streams") : listed.index("streams") + 3] == ["streams", "streams[].id", "streams[].data_root"]


@pytest.mark.parametrize("one", all_fields(), ids=lambda one: one.path)
def test_every_field_has_a_unit_and_sentences_of_help(one: Field) -> None:
    assert one.meaning.unit
    for sentences in (one.meaning.help, one.meaning.details):
        assert not sentences or sentences.endswith(".")
    assert one.meaning.help


@pytest.mark.parametrize("one", all_fields(), ids=lambda one: one.path)
def test_the_name_of_a_field_carries_its_unit(one: Field) -> None:
    endings = {"seconds": "_s", "requests per second": "requests_per_s", "bytes per second": "bytes_per_s", "bytes": "bytes"}
    if one.meaning.unit in endings:
        assert one.name.endswith(endings[one.meaning.unit])


@pytest.mark.parametrize("one", CLASSES)
def test_statistics_are_frozen_values(one: type) -> None:
    """Frozen and slotted: what is rendered cannot change while it is rendered."""
    assert one.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(one)


def test_the_sample_that_other_tests_use_has_a_number_in_every_field() -> None:
    assert isinstance(STATISTICS, Statistics)
    assert STATISTICS.streams
