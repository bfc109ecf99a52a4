"""What to drop when room is needed, over all streams of the node. Pure: no clock, no files, no awaiting.

The rules are those of Cao, Felten, Karlin and Li, "A study of integrated prefetching and caching strategies" (SIGMETRICS
1995), with Belady's choice of a victim cut at what is *not soon*, so that the misses of an epoch are spread evenly over it:

- *Prefetch* what will be read next and is not here, soonest first.
- *Drop* what is not needed soon, least recently used first; only when nothing of that kind is left, what is needed last.
- *Do no harm*: never drop for a prefetch what is needed sooner than what it brings.

With several streams an item is needed when the first of them reads it. What is needed last is found as in Fagin's threshold
algorithm: each stream is scanned from its far end, and whatever the scans tell of that another stream needs sooner goes
there. So each place is looked at once an epoch, and nothing is kept for items that nobody asks about.
"""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable

from gcs_prefetchd.planning.next_use import Shelf
from gcs_prefetchd.planning.stream import Stream

__all__ = ["Planner", "Victim"]

PASSED_OVER = 4096  # items of a queue that is not sorted yet, in a choice; then what is needed last is taken instead

Victim = tuple[str, int] | str  # an item, by its shelf's key and its number there, or the path of an object of no item


class Planner:
    """Knows what is here and who needs it. `shelves` is its owner's to fill; after a change of streams call `sort_anew`.

    `lru` makes it forget what it knows of the future when it drops, to compare against.
    """

    def __init__(self, *, lru: bool = False) -> None:
        self.shelves: dict[str, Shelf] = {}
        self.strangers: OrderedDict[str, float] = OrderedDict()  # objects of no item, least recently used first
        self._lru = lru

    def sort_anew(self) -> None:
        """A stream has come, gone or turned: what was far may be near now. `sort_on` ends what this begins."""
        for shelf in self.shelves.values():
            shelf.sort_anew(lru=self._lru)

    def sort_on(self) -> bool:
        """Go on sorting, for 2 ms at most; False where nothing is left to sort. Choices can be made meanwhile."""
        unsorted = [shelf for shelf in self.shelves.values() if not shelf.is_sorted]
        return bool(unsorted) and (unsorted[0].sort_on(lru=self._lru) or len(unsorted) > 1)

    def arrived(self, key: str, item: int, part: int, now_s: float) -> None:
        """A part of an item is here."""
        shelf = self.shelves[key]
        parts = shelf.parts(item)
        shelf.set_parts(item, parts | 1 << part)
        shelf.dropped[item] = False
        if not self._is_idle(shelf, item, now_s) and not parts:
            shelf.note(item, now_s)

    def adopt(self, key: str, item: int, part: int) -> None:
        """A part of an item was here before anybody looked; told least recently used first, `sort_anew` ends it."""
        shelf = self.shelves[key]
        shelf.set_parts(item, shelf.parts(item) | 1 << part)
        shelf.idle.use(item, 0.0)

    def left(self, key: str, item: int, part: int) -> None:
        """A part of an item is no longer here."""
        shelf = self.shelves[key]
        parts = shelf.parts(item) & ~(1 << part)
        shelf.set_parts(item, parts)
        if not parts:
            shelf.idle.remove(item)
            if shelf.is_needed(item):
                shelf.dropped[item] = True

    def used(self, key: str, item: int, now_s: float) -> None:
        """Somebody used the item, or looked at it because it soon will be used."""
        shelf = self.shelves[key]
        if shelf.parts(item):
            self._is_idle(shelf, item, now_s)

    def planned(self, key: str, item: int, now_s: float) -> None:
        """The item has come into a window: without knowledge of the future that counts as a use."""
        if self._lru:
            self.used(key, item, now_s)

    def read(self, key: str, stream: Stream, item: int, now_s: float) -> bool:
        """The stream's reader has read the item; False where the stream holds no unread place of it."""
        if not stream.mark_read(item):
            return False
        shelf = self.shelves[key]
        if shelf.parts(item) and not self._is_idle(shelf, item, now_s):
            shelf.note(item, now_s)
        return True

    def reveal(self, key: str, stream: Stream, window: int, now_s: float) -> None:
        """The stream has moved on: let what is known of its future do so too."""
        shelf = self.shelves[key]
        for item in shelf.reveal(stream, window):
            if shelf.parts(item) and not self._lru:
                shelf.idle.remove(item)
                shelf.note(item, now_s)

    def victims(self, short_bytes: int, due_s: float, size_of: Callable[[Victim], int], now_s: float) -> list[Victim] | None:
        """What to drop so that `short_bytes` come free for what is needed in `due_s` seconds; None where they cannot.

        The caller drops it all and tells of each part that it has `left`.
        """
        idle: list[tuple[Victim, float]] = []
        needed: dict[tuple[str, int], None] = {}
        while short_bytes > 0:
            if (oldest := self._least_recent(now_s)) is not None:
                idle.append(oldest)
                short_bytes -= size_of(oldest[0])
            elif (farthest := self._farthest(due_s, now_s, needed)) is not None:
                needed[farthest] = None
                short_bytes -= size_of(farthest)
            else:
                self._put_back(idle, needed, now_s)
                return None
        return [*(victim for victim, _ in idle), *needed]

    def _is_idle(self, shelf: Shelf, item: int, now_s: float) -> bool:
        """Queue an item that is here and has been used, where it is not needed soon."""
        if not self._lru and shelf.is_needed(item):
            return False
        shelf.idle.use(item, now_s)
        return True

    def _oldest_idle(self, shelf: Shelf, now_s: float) -> tuple[int, float] | None:
        """What was used least recently of the shelf's idle items, or None where it has none or is far from being sorted."""
        for _ in range(PASSED_OVER):
            candidate = shelf.idle.oldest()
            if candidate is None or self._lru or shelf.is_sorted or not shelf.is_needed(candidate[0]):
                return candidate
            shelf.idle.remove(candidate[0])
            shelf.note(candidate[0], now_s)
        return None

    def _least_recent(self, now_s: float) -> tuple[Victim, float] | None:
        """Take what was used least recently of what is not needed soon, and when that was."""
        oldest: tuple[Victim, float] | None = next(iter(self.strangers.items()), None)
        for key, shelf in self.shelves.items():
            candidate = self._oldest_idle(shelf, now_s)
            if candidate is not None and (oldest is None or candidate[1] < oldest[1]):
                oldest = ((key, candidate[0]), candidate[1])
        if oldest is not None:
            victim = oldest[0]
            if isinstance(victim, str):
                del self.strangers[victim]
            else:
                self.shelves[victim[0]].idle.remove(victim[1])
        return oldest

    def _farthest(self, due_s: float, now_s: float, taken: Container[tuple[str, int]]) -> tuple[str, int] | None:
        """Take what is needed last, unless that is as soon as `due_s` or sooner."""
        while (candidate := self._last_of_any_stream(now_s)) is not None and candidate[0] > due_s:
            in_s, key, stream, place = candidate
            shelf, item = self.shelves[key], stream.item_at(place)
            shelf.take(stream, place)
            if (key, item) in taken:
                continue
            if shelf.soonest_s(item, now_s) == in_s:
                return key, item
            shelf.note(item, now_s)  # another stream reads it sooner
        return None

    def _last_of_any_stream(self, now_s: float) -> tuple[float, str, Stream, int] | None:
        last: tuple[float, str, Stream, int] | None = None
        for key, shelf in self.shelves.items():
            candidate = shelf.farthest(now_s)
            if candidate is not None and (last is None or candidate[0] > last[0]):
                last = (candidate[0], key, *candidate[1:])
        return last

    def _put_back(self, idle: list[tuple[Victim, float]], needed: Iterable[tuple[str, int]], now_s: float) -> None:
        for key, item in needed:
            self.shelves[key].note(item, now_s)
        by_shelf: dict[str, list[tuple[int, float]]] = {}
        for victim, when_s in reversed(idle):
            if isinstance(victim, str):
                self.strangers[victim] = when_s
                self.strangers.move_to_end(victim, last=False)
            else:
                by_shelf.setdefault(victim[0], []).insert(0, (victim[1], when_s))
        for key, uses in by_shelf.items():
            self.shelves[key].idle.put_back(uses)
