"""The tables of `docs/http-api.md` that list the statistics and the metrics, generated from their fields.

`python -m gcs_prefetchd.server.statistics_tables docs/http-api.md` updates both tables in the document.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from gcs_prefetchd.server.prometheus_metrics import METRICS, MetricFamily
from gcs_prefetchd.server.statistics import all_fields

__all__ = ["fields_table", "metrics_table", "with_tables"]


def fields_table() -> str:
    """All fields of `/stats`."""
    rows = ((f"`{one.path}`", one.meaning.unit, f"{one.meaning.help} {one.meaning.details}".rstrip()) for one in all_fields())
    return _table(("field", "unit", "meaning"), rows)


def metrics_table() -> str:
    """All metrics of `/metrics`."""
    return _table(("metric", "type", "labels", "field"), map(_metric_row, METRICS))


def with_tables(document: str) -> str:
    """The document with both tables updated. Raises ValueError if one is not there."""
    for heading, table in (("### /stats", fields_table()), ("### /metrics", metrics_table())):
        found = re.search(rf"^{heading}\n\n((?:\|.*\n)+)", document, re.MULTILINE)
        if found is None:
            raise ValueError(f"no table below the heading {heading!r}")
        document = document[: found.start(1)] + table + document[found.end(1) :]
    return document


def _metric_row(metric: MetricFamily) -> tuple[str, ...]:
    meaning = metric.field.meaning
    unit = meaning.unit.partition(",")[0]
    field = "; ".join(filter(None, (f"`{metric.field.path}`", meaning.metric_details)))
    return f"`{metric.sample_name}`", f"{meaning.kind}, {unit}", ", ".join(f"`{label}`" for label in metric.labels), field


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text()))
