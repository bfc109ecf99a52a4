"""The statistics for Prometheus: what `/metrics` returns. Names, types, labels and help come from the fields. Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gcs_prefetchd.server.statistics import Field, Statistics, all_fields

__all__ = ["METRICS", "MetricFamily", "render_metrics"]

PREFIX = "gcs_prefetchd"


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """One field as a metric. `label_fields` are the fields that give the labels of an entry of a list."""

    name: str
    field: Field
    labels: tuple[str, ...]
    label_fields: tuple[str, ...]

    @property
    def sample_name(self) -> str:
        """The name of its samples."""
        return f"{self.name}_total" if self.field.meaning.kind == "counter" else self.name

    def collect(self, statistics: Statistics) -> Metric:
        """The metric with its samples."""
        family = CounterMetricFamily if self.field.meaning.kind == "counter" else GaugeMetricFamily
        metric = family(self.name, self.field.meaning.help, labels=self.labels)
        for labels, value in self._samples(getattr(statistics, self.field.section)):
            metric.add_metric(labels, value)
        return metric

    def _samples(self, section: Any) -> Iterable[tuple[list[str], float]]:
        if isinstance(section, tuple):
            for entry in section:
                yield [getattr(entry, name) for name in self.label_fields], getattr(entry, self.field.name)
            return
        value = getattr(section, self.field.name)
        if isinstance(value, Mapping):
            yield from (([key], count) for key, count in value.items())
        elif value is not None:
            yield [], value


def render_metrics(statistics: Statistics) -> bytes:
    """The statistics in the text format of Prometheus."""
    registry = CollectorRegistry()
    registry.register(_Statistics(statistics))
    return generate_latest(registry)


class _Statistics(Collector):
    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def collect(self) -> Iterable[Metric]:
        return (family.collect(self._statistics) for family in METRICS)


def _families() -> Iterable[MetricFamily]:
    fields = all_fields()
    for field in fields:
        if field.meaning.kind in ("counter", "gauge"):
            labelling = [other for other in fields if other.section == field.section and other.meaning.kind == "label"]
            labels = [other.meaning.label for other in labelling] + [field.meaning.label] * bool(field.meaning.label)
            yield MetricFamily(_name(field), field, tuple(labels), tuple(other.name for other in labelling))


def _name(field: Field) -> str:
    """The field's name as Prometheus spells units."""
    name = re.sub(r"_s$", "_seconds", re.sub(r"_per_s$", "_per_second", field.name))
    return "_".join([PREFIX, field.section.replace("streams", "stream"), name])


METRICS = tuple(_families())
