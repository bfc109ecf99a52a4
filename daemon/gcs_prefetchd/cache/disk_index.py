"""The index on disk: which object lies where, and when it was last used. Metadata only, in diskcache's SQLite.

diskcache makes the database and looks after its form; rows are read and written many at a time, in its own columns, which
takes a tenth of what its calls take for one row after the other. Keys and values are text: a row that diskcache would unpickle
is refused (CVE-2025-69872), nothing is ever culled by it, and its LRU policy, whose every read is a write transaction, stays
off: the cache's own accounting decides. Everything here blocks: the cache calls it off the event loop.
"""

import contextlib
import logging
import shutil
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diskcache

from gcs_prefetchd.shared.checksums import Stamp
from gcs_prefetchd.shared.errors import CacheWriteError

__all__ = ["INDEX_ERRORS", "DiskIndex", "IndexRecord"]

log = logging.getLogger(__name__)

NEVER = 2**62
COMPLETE = "complete"  # a row that is there while nobody has the index open; no path in the cache is without a slash
INDEX_ERRORS = (sqlite3.Error, OSError, diskcache.Timeout)
DISK_IS_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}
LOCKED_FOR_S = 1.0  # an index that another process holds must not stop the daemon; its changes wait for the next tick
PAGES_KIB = 4096  # of the database that SQLite keeps in memory; diskcache would keep 32 MiB and map 64 MiB

# The columns as diskcache's own `set` fills them for a text. Its triggers count the rows.
STORE = """
INSERT INTO Cache (key, raw, store_time, expire_time, access_time, access_count, tag, size, mode, filename, value)
VALUES (:key, 1, :used_s, NULL, :used_s, 0, NULL, 0, :mode, NULL, :value)
ON CONFLICT (key, raw) DO UPDATE SET store_time = :used_s, expire_time = NULL, access_time = :used_s, access_count = 0,
    tag = NULL, size = 0, mode = :mode, filename = NULL, value = :value
"""
DELETE = "DELETE FROM Cache WHERE key = ? AND raw = 1"
PAGE = "SELECT rowid, key, raw, mode, value FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT ?"


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """One row: what the file holds and when it was last used (seconds since 1970; below 0 where nobody knows of a use)."""

    stamp: Stamp
    used_s: float

    def to_text(self) -> str:
        return f"{self.stamp.to_bytes().decode()} {self.used_s:.6f}"

    @classmethod
    def from_text(cls, text: object) -> "IndexRecord | None":
        if not isinstance(text, str):
            return None
        stamp_text, _, used = text.rpartition(" ")
        stamp = Stamp.from_bytes(stamp_text.encode())
        try:
            return None if stamp is None else cls(stamp, float(used))
        except ValueError:
            return None


class DiskIndex:
    """Opens on construction; where the database is broken or locked, an empty one takes its place. The owner closes it.

    `complete` says whether the process before us closed it with nothing left to write. If not, the files know better.
    Raises CacheWriteError where no index can be made. One thread at a time may use it, and always the same.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: sqlite3.Connection | None = None
        try:
            self._rows = _open(folder)
            values = self._rows.execute("SELECT value FROM Cache WHERE key = ? AND raw = 1", (COMPLETE,)).fetchall()
            self.complete = values == [(COMPLETE,)]
            self._rows.execute(DELETE, (COMPLETE,))
        except INDEX_ERRORS as exc:
            if getattr(exc, "sqlite_errorcode", None) in DISK_IS_FULL:  # nothing is wrong with the index
                self.close()
                raise CacheWriteError(f"index {folder}: the disk is full") from exc
            self.start_afresh(exc)

    def page(self, after: int, at_most: int) -> tuple[list[tuple[str, IndexRecord]], int | None]:
        """Some of the paths and their records, and what to ask for the next ones `after`; None when these were the last.

        In the order in which they came first, from 0 on. Rows that make no sense, of a newer version perhaps, are passed over,
        and it is not complete then. Raises sqlite3.Error where it cannot be read, or holds what diskcache would unpickle.
        """
        rows = self._connected().execute(PAGE, (after, at_most)).fetchall()
        records = []
        for _, path, raw, mode, value in rows:
            if not raw:
                raise sqlite3.DatabaseError("a pickled key in the index")
            if mode != diskcache.core.MODE_RAW:
                raise sqlite3.DatabaseError("a row of the index is not plain text")
            if isinstance(path, str) and (record := IndexRecord.from_text(value)) is not None:
                records.append((path, record))
            else:
                self.complete = False
        return records, rows[-1][0] if len(rows) == at_most else None

    def apply(self, changes: Mapping[str, IndexRecord | None]) -> None:
        """Store the records, delete those that are None; all in one transaction.

        Raises sqlite3.Error where the disk fails or another process holds the database.
        """
        stored = [_row(path, record.used_s, record.to_text()) for path, record in changes.items() if record is not None]
        deleted = [(path,) for path, record in changes.items() if record is None]
        rows = self._connected()
        rows.execute("BEGIN IMMEDIATE")
        try:
            rows.executemany(DELETE, deleted)
            rows.executemany(STORE, stored)
            rows.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                rows.execute("ROLLBACK")
            raise

    def close(self, *, complete: bool = False) -> None:
        """Close the database; `complete` where nothing is left to write."""
        if self._rows is None:
            return
        if complete:
            with contextlib.suppress(*INDEX_ERRORS):
                self._rows.execute(STORE, _row(COMPLETE, 0.0, COMPLETE))
        self._rows.close()
        self._rows = None

    def start_afresh(self, reason: Exception) -> None:
        """Put an empty index in place of one that cannot be used."""
        log.warning("index %s: cannot be used (%s); it is made anew from the files", self._folder, reason)
        self.complete = False
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._folder.mkdir(mode=0o750, exist_ok=True)
            self._rows = _open(self._folder)
        except INDEX_ERRORS as exc:
            raise CacheWriteError(f"index {self._folder}: cannot be made: {exc}") from exc

    def _connected(self) -> sqlite3.Connection:
        assert self._rows is not None, "the index is closed"
        return self._rows


def _row(key: str, used_s: float, value: str) -> dict[str, str | float]:
    return {"key": key, "used_s": used_s, "mode": diskcache.core.MODE_RAW, "value": value}


def _open(folder: Path) -> sqlite3.Connection:
    """A connection of our own to a database that diskcache has made or found good."""
    _raise_if_locked(folder)
    try:
        diskcache.Cache(
            str(folder),
            eviction_policy="none",
            cull_limit=0,
            size_limit=NEVER,
            disk_min_file_size=NEVER,
            statistics=0,
            tag_index=0,
            timeout=LOCKED_FOR_S,
        ).close()
    except INDEX_ERRORS:
        raise
    except Exception as exc:  # damaged rows of its own settings bring out anything in it
        raise sqlite3.DatabaseError(f"{type(exc).__name__}: {exc}") from exc
    rows = sqlite3.connect(folder / diskcache.core.DBNAME, timeout=LOCKED_FOR_S, isolation_level=None)
    try:
        rows.execute(f"PRAGMA cache_size = -{PAGES_KIB}")
        rows.execute("PRAGMA synchronous = NORMAL")  # as diskcache has it: a power cut may cost the last changes
        rows.execute("SELECT key, raw, store_time, access_time, size, mode, filename, value FROM Cache LIMIT 1")
    except BaseException:
        rows.close()
        raise
    return rows


def _raise_if_locked(folder: Path) -> None:
    # diskcache itself would try for a minute.
    database = folder / diskcache.core.DBNAME
    if database.exists():
        with contextlib.closing(sqlite3.connect(database, timeout=LOCKED_FOR_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
