"""The index holds text and nothing else; anything else in it is refused or skipped."""

import contextlib
import logging
import pickle
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import diskcache
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.cache.disk_index import INDEX_ERRORS, DiskIndex, IndexRecord
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.errors import CacheWriteError

A = IndexRecord(Stamp(1, 10, 0xA), 1.0)
B = IndexRecord(Stamp(2, 20, 0xB), 2.0)
C = IndexRecord(Stamp(3, 30, 0xC), 3.0)

stamps = st.builds(Stamp, st.integers(0, 2**63 - 1), st.integers(0, 5 * 2**40), st.integers(0, 2**32 - 1))
records = st.builds(IndexRecord, stamps, st.integers(0, 4 * 10**15).map(lambda microseconds: microseconds / 1e6))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@contextlib.contextmanager
def index_in(folder: Path) -> Iterator[DiskIndex]:
    index = DiskIndex(folder)
    try:
        yield index
    finally:
        index.close()


def loaded(index: DiskIndex, at_most: int = 2) -> dict[str, IndexRecord]:
    """All records of the index, least recently used first."""
    records: list[tuple[str, IndexRecord]] = []
    after: int | None = 0
    while after is not None:
        page, after = index.page(after, at_most)
        assert len(page) <= at_most
        records += page
    assert len({path for path, _ in records}) == len(records)
    return dict(sorted(records, key=lambda pair: pair[1].used_s))


@contextlib.contextmanager
def database(folder: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as connection:
        yield connection


def test_applied_records_are_loaded_again_least_recently_used_first(tmp_path: Path) -> None:
    with index_in(tmp_path) as index:
        index.apply({"c": C, "a": A})
        index.apply({"b": B, "d": A})
        index.apply({"d": None, "unknown": None})

    with index_in(tmp_path) as index:
        assert list(loaded(index).items()) == [("a", A), ("b", B), ("c", C)]


def test_a_later_record_of_a_path_replaces_the_earlier_one(tmp_path: Path) -> None:
    with index_in(tmp_path) as index:
        index.apply({"a": A, "b": B})
        index.apply({"a": C})
        assert list(loaded(index)) == ["b", "a"]


@given(records)
def test_every_record_survives_its_text(record: IndexRecord) -> None:
    again = IndexRecord.from_text(record.to_text())
    assert again is not None
    assert again.stamp == record.stamp
    assert abs(again.used_s - record.used_s) < 1e-6


@given(st.text() | st.integers() | st.none() | st.binary())
def test_a_text_that_is_not_a_record_is_none_and_never_an_error(value: object) -> None:
    record = IndexRecord.from_text(value)
    assert record is None or isinstance(record.stamp, Stamp)


@pytest.mark.parametrize("text", ["", "1", "1 2", "1 2 3", "1 2 0000000a ", "1 2 0000000a x", " 1 2 0000000a 1.0", "a b c 1.0"])
def test_half_written_values_are_skipped(text: str, tmp_path: Path) -> None:
    with index_in(tmp_path) as index:
        index.apply({"a": A, "broken": B})
        with database(tmp_path) as rows:
            rows.execute("UPDATE Cache SET value = ? WHERE key = 'broken'", (text,))
        assert loaded(index) == {"a": A}


@pytest.mark.parametrize("key", [b"bytes", 7, 1.5])
def test_keys_that_are_not_text_are_skipped(key: object, tmp_path: Path) -> None:
    with index_in(tmp_path) as index:
        index.apply({"a": A})
        with database(tmp_path) as rows:
            rows.execute("INSERT INTO Cache (key, raw, mode, value) VALUES (?, 1, 1, ?)", (key, B.to_text()))
        assert loaded(index) == {"a": A}


def test_a_pickled_value_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    with index_in(tmp_path / "index") as index:
        index.apply({"a": A})
        with database(tmp_path / "index") as rows:
            rows.execute("UPDATE Cache SET mode = ?, value = ?", (diskcache.core.MODE_PICKLE, bomb))

        with pytest.raises(sqlite3.DatabaseError, match="not plain text"):
            loaded(index)

    assert not (tmp_path / "exploded").exists()


def test_a_pickled_value_in_a_file_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with index_in(tmp_path / "index") as index:
        index.apply({"a": A})
        with database(tmp_path / "index") as rows:
            rows.execute("UPDATE Cache SET mode = ?, value = NULL, filename = '../bomb'", (diskcache.core.MODE_PICKLE,))

        with pytest.raises(sqlite3.DatabaseError, match="not plain text"):
            loaded(index)

    assert not (tmp_path / "exploded").exists()


def test_a_pickled_key_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    with index_in(tmp_path / "index") as index:
        with database(tmp_path / "index") as rows:
            rows.execute("INSERT INTO Cache (key, raw, mode, value) VALUES (?, 0, 1, ?)", (bomb, A.to_text()))

        with pytest.raises(sqlite3.DatabaseError, match="pickled key"):
            loaded(index)

    assert not (tmp_path / "exploded").exists()


def test_the_pickles_that_these_tests_plant_are_dangerous(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_a_row_that_names_another_file_does_not_delete_it(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.touch()
    with index_in(tmp_path / "index") as index:
        index.apply({"a": A, "b": B})
        with database(tmp_path / "index") as rows:
            rows.execute("UPDATE Cache SET filename = '../precious'")
        index.apply({"a": None, "b": C})
        assert loaded(index) == {"b": C}
    assert precious.exists()


def test_the_folder_holds_nothing_but_the_database(tmp_path: Path) -> None:
    with index_in(tmp_path) as index:
        index.apply({f"{i}": A for i in range(1000)})
    assert {file.name for file in tmp_path.iterdir()} == {"cache.db"}


def test_changes_are_stored_together_or_not_at_all(tmp_path: Path) -> None:
    with index_in(tmp_path) as index:
        with pytest.raises(UnicodeEncodeError):
            index.apply({"a": A, "no text: \udcff": B})
        assert loaded(index) == {}
        index.apply({"a": A})
        assert loaded(index) == {"a": A}


def test_a_locked_database_refuses_changes_within_seconds_and_accepts_them_later(tmp_path: Path) -> None:
    with index_in(tmp_path) as index:
        with database(tmp_path) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(INDEX_ERRORS):
                index.apply({"a": A})
        index.apply({"a": A})
        assert loaded(index) == {"a": A}


def test_only_an_index_that_was_closed_complete_is_complete(tmp_path: Path) -> None:
    index = DiskIndex(tmp_path)
    assert not index.complete
    index.apply({"a": A})
    index.close(complete=True)

    index = DiskIndex(tmp_path)
    assert index.complete
    assert loaded(index) == {"a": A}
    index.close()

    index = DiskIndex(tmp_path)
    assert not index.complete
    index.close()


def test_a_broken_database_is_replaced_by_an_empty_one_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache.db").write_bytes(b"garbage" * 1000)
    with caplog.at_level(logging.WARNING), index_in(tmp_path) as index:
        assert not index.complete
        assert loaded(index) == {}
        index.apply({"a": A})
        assert loaded(index) == {"a": A}
    assert f"index {tmp_path}: cannot be used (file is not a database)" in caplog.text


def test_an_index_that_cannot_be_created_is_one_clear_error(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    shutil.copy(__file__, folder)  # a file where the folder should be
    with pytest.raises(CacheWriteError, match=f"index {folder}: cannot be created"):
        DiskIndex(folder)
