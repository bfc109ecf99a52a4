"""The document of the statistics is generated from their fields."""

import subprocess
import sys
from pathlib import Path

from gcs_prefetchd.server.statistics_tables import fields_table, metrics_table, with_tables

DOCUMENT = Path(__file__).parents[2] / "docs/http-api.md"
COMMAND = [sys.executable, "-m", "gcs_prefetchd.server.statistics_tables"]


def test_the_document_has_the_tables_of_the_fields() -> None:
    text = DOCUMENT.read_text()
    update = "run: python -m gcs_prefetchd.server.statistics_tables docs/http-api.md"
    assert f"\n### /stats\n\n{fields_table()}\n" in text, update
    assert f"\n### /metrics\n\n{metrics_table()}\n" in text, update


def test_updating_the_document_changes_both_tables_and_nothing_else(tmp_path: Path) -> None:
    text = DOCUMENT.read_text()
    copy = tmp_path / "http-api.md"
    copy.write_text(text.replace("| `cache.objects` |", "| `cache.things` |"))
    subprocess.run([*COMMAND, str(copy)], check=True)
    assert copy.read_text() == text == with_tables(text)


def test_the_update_names_a_heading_that_it_does_not_find(tmp_path: Path) -> None:
    copy = tmp_path / "http-api.md"
    copy.write_text("# Another document\n")
    failed = subprocess.run([*COMMAND, str(copy)], check=False, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "no table below the heading '### /stats'" in failed.stderr
    assert copy.read_text() == "# Another document\n"
