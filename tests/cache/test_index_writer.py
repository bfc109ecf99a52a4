"""Changes are written together, in order, and those that fail are written later."""

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gcs_prefetchd.cache.disk_index import DiskIndex, IndexRecord
from gcs_prefetchd.cache.index_writer import IndexWriter
from gcs_prefetchd.shared.checked_read import Stamp

RECORD, OTHER = IndexRecord(Stamp(1, 10, 0xA), 1.0), IndexRecord(Stamp(2, 20, 0xB), 2.0)


class Runner:
    """Makes the index's calls at once, and fails those that a test wants to fail."""

    def __init__(self) -> None:
        self.failures = 0
        self.written: list[Mapping[str, IndexRecord | None]] = []
        self.on_written = asyncio.Event()

    async def run(self, call: Callable[..., Any], changes: Mapping[str, IndexRecord | None]) -> None:
        if self.failures:
            self.failures -= 1
            raise sqlite3.OperationalError("database is locked")
        call(changes)
        self.written.append(dict(changes))
        self.on_written.set()


async def test_changes_of_a_tick_share_one_transaction(tmp_path: Path) -> None:
    runner = Runner()
    writer = IndexWriter(runner.run)
    index = DiskIndex(tmp_path / "index")
    writer.start(index)
    writer.note("b/a", RECORD)
    writer.note("b/b", RECORD)
    writer.note("b/a", OTHER)
    await asyncio.wait_for(runner.on_written.wait(), 20.0)
    assert runner.written == [{"b/a": OTHER, "b/b": RECORD}]
    await writer.stop()
    assert dict(index.page(0, 10)[0]) == {"b/a": OTHER, "b/b": RECORD}
    index.close()


async def test_changes_that_fail_are_kept_and_later_ones_win(tmp_path: Path) -> None:
    runner = Runner()
    writer = IndexWriter(runner.run)
    index = DiskIndex(tmp_path / "index")
    writer.start(index)
    await writer.stop()
    writer.note("b/a", RECORD)
    writer.note("b/b", RECORD)
    runner.failures = 1
    await writer.flush()
    assert runner.written == []
    assert writer.pending == {"b/a": RECORD, "b/b": RECORD}
    writer.note("b/a", None)
    await writer.flush()
    assert runner.written == [{"b/a": None, "b/b": RECORD}]
    assert writer.pending == {}
    index.close()


async def test_nothing_is_written_before_the_start() -> None:
    runner = Runner()
    writer = IndexWriter(runner.run)
    writer.note("b/a", RECORD)
    await writer.flush()
    assert (runner.written, writer.pending) == ([], {"b/a": RECORD})
