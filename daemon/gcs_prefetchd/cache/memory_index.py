"""What a cache holds and how many bytes that is; reports every change to the index's writer. Pure but for the clock."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

from gcs_prefetchd.cache.disk_index import IndexRecord
from gcs_prefetchd.cache.lru_table import LRUTable
from gcs_prefetchd.shared.checked_read import Stamp

__all__ = ["MemoryIndex"]


class MemoryIndex:
    """The entries of a cache. `note` receives what the disk index should hold for a path, None for nothing."""

    def __init__(self, note: Callable[[str, IndexRecord | None], None]) -> None:
        self.entries = LRUTable()
        self.bytes = 0
        self._note = note
        self._recorders: list[set[str]] = []
        self._first_use_s = self._last_use_s = 0.0
        self._watched: dict[str, object] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, path: str) -> bool:
        return path in self.entries

    def get(self, path: str) -> Stamp | None:
        """The path's stamp, or None if it is not cached."""
        return self.entries.get(path)

    def size(self, path: str) -> int:
        """The bytes of the path's file; 0 if it is not cached."""
        return self.entries.size(path)

    def pages(self, max_paths: int) -> Generator[list[str], None, None]:
        """The paths, least recently used first, `max_paths` at a time; see `LRUTable.pages`."""
        return self.entries.pages(max_paths)

    def put(self, path: str, stamp: Stamp) -> None:
        """A file was published; that counts as a use."""
        self._record_change(path, IndexRecord(stamp, self._now_s()))
        self.bytes += stamp.size - self.entries.size(path)
        self.entries.put(path, stamp)

    def adopt(self, path: str, stamp: Stamp) -> int:
        """A file was found on the disk, and no use of it is known; returns its slot."""
        self._watched.pop(path, None)
        self._first_use_s -= 1e-6  # a restart sorts by it, too
        self._note(path, IndexRecord(stamp, self._first_use_s))
        self.bytes += stamp.size - self.entries.size(path)
        return self.entries.put_first(path, stamp)

    def load(self, path: str, record: IndexRecord) -> int:
        """The disk index has this record; returns the path's slot."""
        self._first_use_s = min(self._first_use_s, record.used_s)
        self._last_use_s = max(self._last_use_s, record.used_s)
        self.bytes += record.stamp.size - self.entries.size(path)
        return self.entries.put(path, record.stamp)

    def remove(self, path: str) -> bool:
        """The file is gone; returns whether it was cached."""
        stamp = self.entries.pop(path)
        if stamp is not None:
            self.bytes -= stamp.size
            self._record_change(path, None)
        return stamp is not None

    def touch(self, path: str) -> bool:
        """Count a use; returns whether the path is cached."""
        slot = self.entries.slot(path)
        if slot:
            self.entries.use(slot)
            self._record_change(path, IndexRecord(self.entries.stamp_at(slot), self._now_s()), is_use=True)
        return slot != 0

    def clear(self) -> None:
        """Remove all entries, without reporting it to the disk index."""
        self.entries, self.bytes = LRUTable(), 0

    @contextmanager
    def recording_changes(self, already_changing: Iterable[str] = ()) -> Iterator[set[str]]:
        """Yield a set: `already_changing`, and every path that changes inside the context. `adopt` and `load` do not count."""
        changed = set(already_changing)
        self._recorders.append(changed)
        try:
            yield changed
        finally:
            self._recorders = [one for one in self._recorders if one is not changed]

    @contextmanager
    def watching(self, path: str) -> Iterator[Callable[[], bool]]:
        """Yield a function that returns whether the path still has the same file: another file may have the same stamp."""
        mark = self._watched.setdefault(path, object())
        try:
            yield lambda: self._watched.get(path) is mark
        finally:
            self._watched.pop(path, None)

    def _record_change(self, path: str, record: IndexRecord | None, *, is_use: bool = False) -> None:
        if not is_use:
            self._watched.pop(path, None)
        self._note(path, record)
        for changed in self._recorders:
            changed.add(path)

    def _now_s(self) -> float:
        # Never the same twice and never earlier, whatever the clock does: a restart sorts by it.
        self._last_use_s = max(time.time(), self._last_use_s + 1e-6)
        return self._last_use_s
