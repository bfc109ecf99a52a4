"""One comparison of the files with the entries: what is new, what is damaged, what is gone. Pure."""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from gcs_prefetchd.cache.lru_table import Entries
from gcs_prefetchd.shared.checksums import Stamp

__all__ = ["Comparison", "Differences", "Found"]


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was found: its path, its size in bytes, and its stamp, None where that is none of ours."""

    path: str
    size: int
    stamp: Stamp | None


@dataclass(frozen=True, slots=True)
class Differences:
    """What some files differ in from what is held: new ones and those with another stamp; and those of a wrong length."""

    new: list[tuple[str, Stamp]]
    damaged: list[str]


class Comparison:
    """Takes what is found a page at a time, while the entries go on changing.

    A path that is in `changed` or in `arriving` is left to whoever changes it. The owner puts into `changed` what changes after
    the comparison has begun.
    """

    def __init__(self, entries: Entries, changed: Container[str], arriving: Container[str]) -> None:
        self._entries = entries
        self._changed = changed
        self._arriving = arriving
        self._seen = bytearray(entries.slots)

    def take(self, page: Iterable[Found]) -> Differences:
        """Compare some files. The owner holds what is new, and calls `see` with its slots, before it takes the next page."""
        differences = Differences([], [])
        for found in page:
            if found.stamp is None or self._is_changing(found.path):
                continue
            slot = self._entries.slot(found.path)
            if found.stamp.size != found.size:
                differences.damaged.append(found.path)
            elif slot and self._entries.stamp_at(slot) == found.stamp:
                self.see(slot)
            else:
                differences.new.append((found.path, found.stamp))
        return differences

    def see(self, slot: int) -> None:
        """The file of the entry in this slot is there."""
        if slot < len(self._seen):
            self._seen[slot] = 1

    def unseen(self, at_most: int) -> Iterator[list[str]]:
        """What was held when the comparison began and has not been found since, so many at a time."""
        slots = self._entries.unmarked(self._seen)
        for start in range(0, len(slots), at_most):
            held = [slot for slot in slots[start : start + at_most] if self._entries.is_held(slot)]
            yield [path for path in map(self._entries.path_at, held) if not self._is_changing(path)]

    def gone(self, paths: Iterable[str], found: Iterable[Found | None]) -> list[str]:
        """Of what was not seen, what a second look did not find either, and is held still."""
        pairs = zip(paths, found, strict=True)
        absent = [path for path, one in pairs if one is None or one.stamp is None]
        return [path for path in absent if path in self._entries and not self._is_changing(path)]

    def _is_changing(self, path: str) -> bool:
        return path in self._changed or path in self._arriving
