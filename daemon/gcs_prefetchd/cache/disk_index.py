"""The index on disk: which objects are cached, and when each was last used. Metadata only, in diskcache's SQLite database.

diskcache creates the database and its schema. Rows are read and written many at a time, in its columns: that takes a tenth of
the time of its own calls for single rows. Keys and values are text; a row that diskcache would unpickle is refused
(CVE-2025-69872). diskcache culls nothing, and its LRU policy, which makes each read a write transaction, is off: the cache
itself decides what to evict. Everything here blocks: the cache calls it off the event loop.
"""

import contextlib
import logging
import shutil
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diskcache

from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.errors import CacheWriteError

__all__ = ["INDEX_ERRORS", "DiskIndex", "IndexRecord"]

log = logging.getLogger(__name__)

NEVER = 2**62
COMPLETE = "complete"  # a row that exists while no daemon has the index open; every path in the cache has a slash
INDEX_ERRORS = (sqlite3.Error, OSError, diskcache.Timeout)
DISK_FULL_ERRORS = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}
LOCK_TIMEOUT_S = 1.0  # an index locked by another process must not stop the daemon; its changes wait for the next tick
PAGE_CACHE_KIB = 4096  # how much of the database SQLite keeps in memory; diskcache would keep 32 MiB and map 64 MiB

# Fills the columns as diskcache's own `set` does for a text. Its triggers count the rows.
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
    """One row: the file's stamp, and when it was last used (seconds since 1970; less than 0 if no use is known)."""

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
    """Opens on construction; a broken or locked database is replaced by an empty one. The owner closes it.

    `complete` is whether the previous process closed it with nothing left to write. If not, only the files are right.
    Raises CacheWriteError if no index can be created. Only one thread may use it.
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
            if getattr(exc, "sqlite_errorcode", None) in DISK_FULL_ERRORS:  # the index itself is not broken
                self.close()
                raise CacheWriteError(f"index {folder}: the disk is full") from exc
            self.replace_by_empty(exc)

    def page(self, after: int, max_rows: int) -> tuple[list[tuple[str, IndexRecord]], int | None]:
        """Some of the paths and their records, and the `after` of the next page, None if this is the last. Start with 0.

        The order is that of their first insertion. Rows that cannot be parsed, perhaps of a newer version, are skipped, and the
        index is not complete. Raises sqlite3.Error if it cannot be read, or has a row that diskcache would unpickle.
        """
        rows = self._connected().execute(PAGE, (after, max_rows)).fetchall()
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
        return records, rows[-1][0] if len(rows) == max_rows else None

    def apply(self, changes: Mapping[str, IndexRecord | None]) -> None:
        """Store the records and delete those that are None, in one transaction.

        Raises sqlite3.Error if the disk fails or another process has locked the database.
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
        """Close the database; `complete` is whether nothing is left to write."""
        if self._rows is None:
            return
        if complete:
            with contextlib.suppress(*INDEX_ERRORS):
                self._rows.execute(STORE, _row(COMPLETE, 0.0, COMPLETE))
        self._rows.close()
        self._rows = None

    def replace_by_empty(self, reason: Exception) -> None:
        """Put an empty index in place of one that cannot be used."""
        log.warning("index %s: cannot be used (%s); it is rebuilt from the files", self._folder, reason)
        self.complete = False
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._folder.mkdir(mode=0o750, exist_ok=True)
            self._rows = _open(self._folder)
        except INDEX_ERRORS as exc:
            raise CacheWriteError(f"index {self._folder}: cannot be created: {exc}") from exc

    def _connected(self) -> sqlite3.Connection:
        assert self._rows is not None, "the index is closed"
        return self._rows


def _row(key: str, used_s: float, value: str) -> dict[str, str | float]:
    return {"key": key, "used_s": used_s, "mode": diskcache.core.MODE_RAW, "value": value}


def _open(folder: Path) -> sqlite3.Connection:
    """Connect to a database that diskcache has created or opened without an error."""
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
            timeout=LOCK_TIMEOUT_S,
        ).close()
    except INDEX_ERRORS:
        raise
    except Exception as exc:  # damaged rows of its settings can raise anything
        raise sqlite3.DatabaseError(f"{type(exc).__name__}: {exc}") from exc
    rows = sqlite3.connect(folder / diskcache.core.DBNAME, timeout=LOCK_TIMEOUT_S, isolation_level=None)
    try:
        rows.execute(f"PRAGMA cache_size = -{PAGE_CACHE_KIB}")
        rows.execute("PRAGMA synchronous = NORMAL")  # as in diskcache: a power cut may lose the last changes
        rows.execute("SELECT key, raw, store_time, access_time, size, mode, filename, value FROM Cache LIMIT 1")
    except BaseException:
        rows.close()
        raise
    return rows


def _raise_if_locked(folder: Path) -> None:
    # diskcache itself would retry for a minute.
    database = folder / diskcache.core.DBNAME
    if database.exists():
        with contextlib.closing(sqlite3.connect(database, timeout=LOCK_TIMEOUT_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
