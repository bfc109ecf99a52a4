"""The index on disk: which object lies where, and when it was last used. Metadata only, in diskcache's SQLite.

diskcache is held to text keys and text values: a row that would be unpickled is refused (CVE-2025-69872), nothing is ever
culled by it, and its LRU policy, whose every read is a write transaction, stays off: the cache's own accounting decides.
Everything here blocks: the cache calls it off the event loop.
"""

import contextlib
import logging
import shutil
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache

from gcs_prefetchd.errors import CacheWriteError
from gcs_prefetchd.stamp import Stamp

__all__ = ["INDEX_ERRORS", "Index", "Record"]

log = logging.getLogger(__name__)

NEVER = 2**62
COMPLETE = "complete"  # a row that is there while nobody has the index open; no path in the cache is without a slash
INDEX_ERRORS = (sqlite3.Error, OSError, diskcache.Timeout)
LOCKED_FOR_S = 1.0  # an index that another process holds must not stop the daemon; its changes wait for the next tick


@dataclass(frozen=True, slots=True)
class Record:
    """One row: what the file holds and when it was last used (seconds since 1970)."""

    stamp: Stamp
    used_s: float

    def to_text(self) -> str:
        return f"{self.stamp.to_bytes().decode()} {self.used_s:.6f}"

    @classmethod
    def from_text(cls, text: object) -> "Record | None":
        if not isinstance(text, str):
            return None
        stamp_text, _, used = text.rpartition(" ")
        stamp = Stamp.from_bytes(stamp_text.encode())
        try:
            return None if stamp is None else cls(stamp, float(used))
        except ValueError:
            return None


class _PlainDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Refuses what is not a plain column."""

    def get(self, key: Any, raw: bool) -> Any:
        if not raw:
            raise sqlite3.DatabaseError("a pickled key in the index")
        return super().get(key, raw)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode != diskcache.core.MODE_RAW:
            raise sqlite3.DatabaseError("a row of the index is not plain text")
        return super().fetch(mode, filename, value, read)

    def remove(self, file_path: str) -> None:
        """No row of ours has a file; one that names `../something` must not have it deleted."""


class Index:
    """Opens on construction; where the database is broken or locked, an empty one takes its place. The owner closes it.

    `complete` says whether the process before us closed it with nothing left to write. If not, the files know better.
    Raises CacheWriteError where no index can be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            _raise_if_locked(folder)
            self._rows = _open(folder)
            self.complete: bool = self._rows.get(COMPLETE) == COMPLETE
            self._rows.delete(COMPLETE)
        except INDEX_ERRORS as exc:
            self.start_afresh(exc)

    def load(self) -> dict[str, Record]:
        """Every path and its record, least recently used first. Rows that make no sense are passed over.

        Raises sqlite3.Error, OSError or diskcache.Timeout where it cannot be read, or holds what would be unpickled.
        """
        rows = {path: Record.from_text(self._rows.get(path)) for path in self._rows}
        records = [(path, record) for path, record in rows.items() if isinstance(path, str) and record is not None]
        return dict(sorted(records, key=lambda pair: pair[1].used_s))

    def apply(self, changes: Mapping[str, Record | None]) -> None:
        """Store the records, delete those that are None; all in one transaction.

        Raises sqlite3.Error, OSError or diskcache.Timeout where the disk fails or another process holds the database.
        """
        try:
            with self._rows.transact():
                for path, record in changes.items():
                    if record is None:
                        self._rows.delete(path)
                    else:
                        self._rows.set(path, record.to_text())
        except BaseException:
            self._rows.close()  # diskcache leaves a transaction open whose commit failed; the next call connects anew
            raise

    def close(self, *, complete: bool = False) -> None:
        """Close the database; `complete` where nothing is left to write."""
        if complete:
            with contextlib.suppress(*INDEX_ERRORS):
                self._rows.set(COMPLETE, COMPLETE)
        self._rows.close()

    def start_afresh(self, reason: Exception) -> None:
        """Put an empty index in place of one that cannot be used."""
        log.warning("index %s: cannot be used (%s); it is made anew from the files", self._folder, reason)
        self.complete = False
        with contextlib.suppress(AttributeError):
            self._rows.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._folder.mkdir(mode=0o750, exist_ok=True)
            self._rows = _open(self._folder)
        except INDEX_ERRORS as exc:
            raise CacheWriteError(f"index {self._folder}: cannot be made: {exc}") from exc


def _raise_if_locked(folder: Path) -> None:
    # diskcache itself would try for a minute.
    database = folder / diskcache.core.DBNAME
    if database.exists():
        with contextlib.closing(sqlite3.connect(database, timeout=LOCKED_FOR_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")


def _open(folder: Path) -> Any:
    return diskcache.Cache(
        str(folder),
        disk=_PlainDisk,
        eviction_policy="none",
        cull_limit=0,
        size_limit=NEVER,
        disk_min_file_size=NEVER,
        statistics=0,
        tag_index=0,
        timeout=LOCKED_FOR_S,
    )
