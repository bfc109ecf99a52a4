"""Which items to prefetch next: among the windows of all readers, the soonest that is neither cached nor in progress. Pure."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gcs_prefetchd.cache.observer import ChooseVictims
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["ItemPrefetch", "Lookahead", "NextItem", "NextItems"]

MAX_PLACES = 2048  # per reader and turn; a place that needs nothing takes a microsecond or two


@dataclass(slots=True, eq=False)
class ItemPrefetch:
    """An item whose objects are being downloaded. `is_planned_again`: its reader will read it once more after that."""

    reader: Reader
    choose_victims: ChooseVictims
    objects_left: int
    failures: list[tuple[ObjectVersion, BaseException]] = field(default_factory=list)
    is_planned_again: bool = False


@dataclass(slots=True, eq=False)
class Lookahead:
    """How far a turn looks ahead of a reader: the end of its window, and how many places it may still look at."""

    reader: Reader
    window_end: int
    places_left: int = MAX_PLACES


class NextItem(NamedTuple):
    """An item to prefetch. `is_in_window`: it is needed soon enough to evict other files for it."""

    reader: Reader
    item: int
    place: int
    is_in_window: bool


class NextItems:
    """One turn's choice of items. Between two turns others on the event loop run.

    `active` are the items that are being downloaded, by data root and number. `full_streams`: streams for which no space is
    free beyond their windows.
    """

    def __init__(
        self, registry: Registry, active: Mapping[tuple[str, int], ItemPrefetch], full_streams: Container[str]
    ) -> None:
        self._registry = registry
        self._active = active
        self._full_streams = full_streams
        self.lookaheads = []
        for reader in registry:
            window = registry.window_items(reader)
            self.lookaheads.append(Lookahead(reader, reader.stream.window_start(window) + window))

    @property
    def has_unseen_places(self) -> bool:
        """Whether the turn ended before it had looked at all places."""
        return any(lookahead.places_left <= 0 for lookahead in self.lookaheads)

    def soonest(self) -> NextItem | None:
        """The item that a reader needs soonest, or None if none was found; it counts as planned from now on."""
        soonest: tuple[float, Lookahead, int] | None = None
        for lookahead in self.lookaheads:
            place = self._next_place(lookahead)
            if place is not None:
                due_s = lookahead.reader.stream.time_until_s(place, self._registry.clock())
                if soonest is None or due_s < soonest[0]:
                    soonest = (due_s, lookahead, place)
        if soonest is None:
            return None
        _, lookahead, place = soonest
        stream = lookahead.reader.stream
        stream.planned_end = place + 1
        return NextItem(lookahead.reader, stream.item_at(place), place, place < lookahead.window_end)

    def _next_place(self, lookahead: Lookahead) -> int | None:
        """The reader's next place whose item is neither cached nor in progress; None if none was found yet."""
        reader, stream = lookahead.reader, lookahead.reader.stream
        end = min(stream.known_end, lookahead.window_end)
        if stream.id not in self._full_streams and (reader.is_seeded or self._registry.fills_free_space):
            end = stream.known_end
        place = first = max(stream.planned_end, stream.first_unread)
        end = min(end, first + lookahead.places_left)
        while place < end:
            item = stream.item_at(place)
            if stream.next_place(item) <= place:
                if (reader.data_root, item) in self._active:
                    self._active[reader.data_root, item].is_planned_again = True
                elif not reader.is_item_ready(item):
                    break
                else:
                    self._registry.eviction.record_planned(reader.data_root, item, self._registry.clock())
            place += 1
        lookahead.places_left -= place - first
        stream.planned_end = max(stream.planned_end, place)
        return place if place < end else None
