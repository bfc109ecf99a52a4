"""What a cache holds and how many bytes that is; every change is told to the index's writer. Pure but for the clock."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from gcs_prefetchd.cache.disk_index import Record
from gcs_prefetchd.cache.lru_table import Entries
from gcs_prefetchd.shared.checksums import Stamp

__all__ = ["Contents"]


class Contents:
    """The entries of a cache. `note` is told what the index should say of a path, None for nothing."""

    def __init__(self, note: Callable[[str, Record | None], None]) -> None:
        self.entries = Entries()
        self.bytes = 0
        self._note = note
        self._changed: list[set[str]] = []
        self._first_use_s = self._last_use_s = 0.0
        self._unchanged: dict[str, object] = {}

    def put(self, path: str, stamp: Stamp) -> None:
        """A file has come; that is a use, too."""
        self._tell(path, Record(stamp, self._now_s()))
        self.bytes += stamp.size - self.entries.size(path)
        self.entries.put(path, stamp)

    def adopt(self, path: str, stamp: Stamp) -> int:
        """A file was here before anybody looked, and nobody knows of a use; returns its slot."""
        self._unchanged.pop(path, None)
        self._first_use_s -= 1e-6  # a restart sorts by it, too
        self._note(path, Record(stamp, self._first_use_s))
        self.bytes += stamp.size - self.entries.size(path)
        return self.entries.put_first(path, stamp)

    def load(self, path: str, record: Record) -> int:
        """The index says so; returns the path's slot."""
        self._first_use_s = min(self._first_use_s, record.used_s)
        self._last_use_s = max(self._last_use_s, record.used_s)
        self.bytes += record.stamp.size - self.entries.size(path)
        return self.entries.put(path, record.stamp)

    def remove(self, path: str) -> bool:
        """The file is gone; returns whether it was held."""
        stamp = self.entries.pop(path)
        if stamp is not None:
            self.bytes -= stamp.size
            self._tell(path, None)
        return stamp is not None

    def touch(self, path: str) -> bool:
        """Count a use; returns whether the path is held."""
        slot = self.entries.slot(path)
        if slot:
            self.entries.use(slot)
            self._tell(path, Record(self.entries.stamp_at(slot), self._now_s()), moved=False)
        return slot != 0

    def clear(self) -> None:
        """Hold nothing, whatever the index says."""
        self.entries, self.bytes = Entries(), 0

    @contextmanager
    def changes(self, already: Iterable[str] = ()) -> Iterator[set[str]]:
        """The paths that change while the context is entered, and those that do `already`; `adopt` and `load` do not count."""
        changed = set(already)
        self._changed.append(changed)
        try:
            yield changed
        finally:
            self._changed = [one for one in self._changed if one is not changed]

    @contextmanager
    def watching(self, path: str) -> Iterator[Callable[[], bool]]:
        """Yields a function that says whether the path's file is the same still: a stamp may come back with another file."""
        mark = self._unchanged.setdefault(path, object())
        try:
            yield lambda: self._unchanged.get(path) is mark
        finally:
            self._unchanged.pop(path, None)

    def _tell(self, path: str, record: Record | None, *, moved: bool = True) -> None:
        if moved:
            self._unchanged.pop(path, None)
        self._note(path, record)
        for changed in self._changed:
            changed.add(path)

    def _now_s(self) -> float:
        # Never twice the same and never back, whatever the clock does: a restart sorts by it.
        self._last_use_s = max(time.time(), self._last_use_s + 1e-6)
        return self._last_use_s
