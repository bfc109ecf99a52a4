"""All readers of the node, what is here for them, and who needs what: the planner's state, told of every event. Pure but for
the clock it is given.

Before any reader has come, the seeded order of each data root is a stream of its own; a reader's plan takes its place. Orders
take a while to work out: `take_due` says whose, `prepare_seeded` and `Reader.next_epoch` do it in a thread, `begin_seeded` and
`Stream.append` put it in force.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from gcs_prefetchd.planning.eviction import Planner, Victim
from gcs_prefetchd.planning.item_lookup import Place, Places
from gcs_prefetchd.planning.item_numbers import Catalog, Listing
from gcs_prefetchd.planning.next_use import Shelf
from gcs_prefetchd.planning.reader import Prepared, Reader, prepare, prepare_seeded, seeded_id
from gcs_prefetchd.planning.stream import NEVER, Stream
from gcs_prefetchd.shared.epoch_order import Indices
from gcs_prefetchd.shared.errors import ProtocolError
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.messages import Plan
from gcs_prefetchd.shared.moving_average import Spread
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Registry"]

log = logging.getLogger(__name__)

STREAM_IDLE_S = 900.0
SPARE_ITEMS = 16  # for what comes in bursts
LARGEST_SPARE = 0.01  # of what the cache holds
LONGEST_WINDOW = 100_000
LONGEST_GAP_S = 1.0  # a reader that pauses longer than that is not late with its report


class Registry:
    """Readers, manifests and the planner over them, for a cache of `cache_bytes`.

    `window_items` fixes every window; None measures how long it must be.
    """

    def __init__(
        self,
        seed: int,
        cache_bytes: int,
        *,
        window_items: int | None = None,
        lru: bool = False,
        download_s: Spread | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.planner = Planner(lru=lru)
        # Beyond the windows: nothing is dropped for it. Not where LRU may drop it again before it is read.
        self.fills_free_room = window_items is None and not lru
        self._download_s = download_s or Spread()
        self._seed = seed
        self._cache_bytes = cache_bytes
        self._window_items = window_items
        self._clock = clock
        self._catalogs: dict[str, Catalog] = {}
        self._readers: dict[str, Reader] = {}
        self._due: dict[str, int] = {}  # data roots whose seeded stream is to begin an epoch, and which one
        self._places = Places(self._catalogs)

    def __iter__(self) -> Iterator[Reader]:
        return iter(list(self._readers.values()))

    def manifest(self, data_root: str) -> Manifest | None:
        """The latest manifest of a data root, or None before its first listing."""
        catalog = self._catalogs.get(data_root)
        return catalog.newest.manifest if catalog is not None and catalog.listings else None

    def number(self, manifest: Manifest) -> Listing:
        """Give a manifest's items their numbers, for `set_manifest`. For a thread: it changes nothing."""
        return self._catalogs.get(manifest.data_root.uri, Catalog()).number(manifest)

    def set_manifest(self, listing: Listing) -> None:
        """Put a listing in force: plans that come from now on may refer to it, those that run keep theirs."""
        data_root = listing.manifest.data_root.uri
        catalog = self._catalogs.setdefault(data_root, Catalog())
        catalog.take(listing)
        self._make_room(data_root, catalog.items)
        seeded = self._readers.get(seeded_id(data_root))
        if seeded is not None or not self._of(data_root):
            self._due[data_root] = seeded.stream.current.number if seeded else 0

    def catalog(self, data_root: str) -> tuple[Catalog, set[Listing]]:
        """The listings of a data root, and those of them that readers go by."""
        return self._catalogs[data_root], {reader.listing for reader in self._of(data_root)}

    def take_due(self) -> list[tuple[str, int]]:
        """The data roots whose seeded stream is to begin an epoch, and which; each is told of once."""
        due = list(self._due.items())
        self._due.clear()
        return due

    def prepare_seeded(self, data_root: str, number: int) -> Prepared:
        """Work out an epoch of a seeded stream, for `begin_seeded`. For a thread."""
        catalog = self._catalogs[data_root]
        return prepare_seeded(data_root, self._seed, number, catalog.newest, catalog.items)

    def begin_seeded(self, prepared: Prepared) -> None:
        """The epoch begins, unless a reader has come meanwhile, or another listing."""
        key, plan = prepared.plan.data_root, prepared.plan
        is_wanted = key not in self._due and prepared.listing is self._catalogs[key].newest
        if is_wanted and all(reader.seeded for reader in self._of(key)):
            stream = Stream(plan.stream, "", prepared.epoch)
            self._put(Reader(key, stream, prepared.listing, plan, prepared.indices, self._clock(), seeded=True))

    def set_earlier_manifest(self, listing: Listing) -> None:
        """Let plans refer to a listing of before this daemon's time, of a data root that has been listed since."""
        data_root = listing.manifest.data_root.uri
        self._catalogs[data_root].take_earlier(listing)
        self._make_room(data_root, self._catalogs[data_root].items)

    def has_listing(self, data_root: str, digest: str) -> bool:
        """Whether a plan may refer to it."""
        catalog = self._catalogs.get(data_root)
        return catalog is not None and catalog.listing(digest) is not None

    def _make_room(self, data_root: str, items: int) -> None:
        """Items have new numbers, and objects perhaps other ones."""
        shelf = self.planner.shelves.setdefault(data_root, Shelf(items))
        if items > len(shelf.present):
            shelf.grow(items)
            for reader in self._of(data_root):
                reader.stream.grow(items)
        self._places.clear()

    def prepare(self, plan: Plan, indices: Indices) -> Prepared:
        """Work out a plan, for `register`. Raises ProtocolError, naming the field, where it cannot be. For a thread."""
        catalog = self._catalogs.get(plan.data_root)
        listing = catalog.listing(plan.manifest) if catalog is not None else None
        if catalog is None or listing is None:
            raise ProtocolError(
                f"Plan: field 'manifest': {plan.manifest!r} is no listing of {plan.data_root!r}; ask for it again"
            )
        return prepare(plan, indices, listing, catalog.items)

    def register(self, prepared: Prepared) -> Reader:
        """A reader has said what it will read."""
        plan, now_s = prepared.plan, self._clock()
        known, endless = self._readers.get(plan.stream), plan.kind == "endless"
        if known is not None and known.key != plan.data_root:
            self._remove(known, f"goes on in {plan.data_root}")
            known = None
        stream = Stream(plan.stream, plan.job, prepared.epoch, endless=endless) if known is None else known.stream
        reader = Reader(plan.data_root, stream, prepared.listing, plan, prepared.indices, now_s)
        if known is not None:
            stream.turn(prepared.epoch)
            stream.job, stream.endless = plan.job, endless
            reader.waits, reader.report_gap_s = known.waits, known.report_gap_s
        self._readers.pop(seeded_id(plan.data_root), None)
        self._due.pop(plan.data_root, None)
        self._put(reader)
        return reader

    def end_job(self, job: str) -> None:
        """The job's process has ended: its future counts for nothing."""
        for reader in self:
            if reader.stream.job == job and not reader.seeded:
                self._remove(reader, "its process has ended")

    def forget_idle(self) -> None:
        """Drop the readers that have long been silent."""
        for reader in self:
            silent_s = self._clock() - reader.last_seen_s
            if silent_s > STREAM_IDLE_S and not reader.seeded:
                self._remove(reader, f"silent for {silent_s:.0f} s")

    @property
    def stream_ids(self) -> list[str]:
        """The streams that readers have registered."""
        return [reader.stream.id for reader in self if not reader.seeded]

    def note_reads(self, job: str, names: Iterable[ObjectName]) -> None:
        """A process of this job read these objects: its streams move on, or the seeded ones where it sent no plan."""
        now_s = self._clock()
        moved: dict[str, int] = {}
        for name in names:
            path = cache_path(name.bucket, name.name)
            place = self._places.of(name, path)
            if place is None:
                if path in self.planner.strangers:
                    self._stranger_used(path, now_s)
            elif place[2] == 0:  # an item's first part stands for the item
                reader = self._mark_read(job, place, now_s)
                if reader is not None:
                    moved[reader.stream.id] = moved.get(reader.stream.id, 0) + 1
        for stream_id, count in moved.items():
            reader = self._readers[stream_id]
            reader.report_gap_s.add(min(now_s - reader.last_seen_s, LONGEST_GAP_S))
            reader.last_seen_s = now_s
            reader.stream.rate.add(count, now_s)
            self.planner.reveal(reader.key, reader.stream, self.window(reader), now_s)
            if reader.seeded and reader.stream.ended:
                self._end_seeded(reader)

    def window(self, reader: Reader) -> int:
        """How many items ahead of the reader are kept on disk: as many as it reads while a download takes its time."""
        if self._window_items is not None:
            return self._window_items
        # Three deviations: what comes later than that makes the reader wait, about once in a thousand downloads. What it has
        # read since its last report takes up some of the window, too.
        wait_s = self._download_s.mean_s + 3 * self._download_s.deviation_s
        wait_s += reader.report_gap_s.mean_s + reader.report_gap_s.deviation_s
        # Workers that overtake each other are served alike; but what lies behind since a report got lost is next to nothing.
        stream = reader.stream
        ahead = min(stream.front - stream.start, 2 * (stream.front - stream.position))
        needed = int(reader.stream.rate.per_s(self._clock()) * wait_s) + ahead
        return min(needed + self._spare(reader), LONGEST_WINDOW)

    def _spare(self, reader: Reader) -> int:
        # A small cache loses more by it than its reader waits without.
        return max(1, min(SPARE_ITEMS, int(LARGEST_SPARE * self._cache_bytes / reader.listing.item_bytes)))

    def versions(self, reader: Reader, number: int) -> list[ObjectVersion]:
        """The parts of an item that the reader is about to read, as listed last; their places are remembered.

        Also for a reader that goes by an earlier listing: what that names is gone from the bucket where it has changed since,
        and its next epoch goes by the newest. A seeded one stands for readers to come, who will go by the newest.
        """
        catalog = self._catalogs[reader.key]
        versions = (catalog.newest if reader.seeded else catalog).versions(number)
        self._places.paths(reader.key, number, versions)
        return versions

    def paths(self, reader: Reader, number: int) -> list[str]:
        """Where the parts of an item lie that the reader is about to read; their places are remembered."""
        return self._places.paths(reader.key, number, self._catalogs[reader.key].versions(number))

    def version(self, name: ObjectName) -> ObjectVersion | None:
        """What the newest listing says of an object; None for one that is new since, or no part of an item."""
        for catalog in self._catalogs.values():
            manifest = catalog.newest.manifest
            if name in manifest.data_root and (place := manifest.find(name)) is not None:
                return manifest.version(*place)
        return None

    def is_here(self, reader: Reader, number: int) -> bool:
        """Whether every part of an item is here."""
        return self.planner.shelves[reader.key].parts(number) == reader.every_part

    def runway(self, reader: Reader) -> int:
        """How many items from the reader's next one on are here whole, without a gap, as far as has been planned."""
        return reader.stream.unbroken(self.planner.shelves[reader.key].present == reader.every_part)

    def planned(self, reader: Reader, number: int) -> None:
        """An item that is here has come into a window."""
        self.planner.planned(reader.key, number, self._clock())

    def sort_on(self) -> bool:
        """Go on with what a change of streams has begun, for a few milliseconds; False where nothing is left to do."""
        return self.planner.sort_on()

    def due_s(self, reader: Reader, place: int) -> float:
        """In how many seconds the reader will come to a place."""
        return reader.stream.in_s(place, self._clock())

    def locate_all(self, paths: Iterable[str]) -> list[tuple[str, Place | None]]:
        """Where they belong. For a thread."""
        return [(path, self._places.locate(path)) for path in paths]

    def adopt(self, path: str, place: Place | None) -> None:
        """A file was here before its data root was listed; least recently used first. `sort_anew` ends it."""
        if place is None:
            self._stranger_used(path, 0.0)
        else:
            self.planner.strangers.pop(path, None)
            self.planner.adopt(*place)

    def sort_anew(self) -> None:
        """Whatever was adopted is in its queue now, and counts as here."""
        self.planner.sort_anew()
        for reader in self:
            self._count_bound(reader)

    def arrived(self, path: str) -> None:
        """A file has been published."""
        place = self._places.locate(path)
        if place is None:
            self._stranger_used(path, self._clock())
            return
        self.planner.arrived(*place, self._clock())

    def left(self, path: str) -> Place | None:
        """A file is gone; returns whose it was."""
        self.planner.strangers.pop(path, None)
        place = self._places.locate(path)
        self._places.forget(path)
        if place is not None:
            self.planner.left(*place)
        return place

    def used(self, path: str) -> None:
        """Some program opened the file."""
        if path in self._places:
            return  # it comes up soon, or has just been read
        place = self._places.locate(path)
        if place is not None:
            self.planner.used(*place[:2], self._clock())
        elif path in self.planner.strangers:
            self._stranger_used(path, self._clock())

    def choose(self, short_bytes: int, wanted: tuple[str, int] | None, size_of: Callable[[str], int]) -> list[str] | None:
        """The files to drop so that `short_bytes` come free for an item, none of them needed sooner; None where they cannot.

        For no item, at whatever cost.
        """
        # When it is needed is asked here and not when it was planned: a reader slows down, and its times all move together.
        now_s = self._clock()
        due_s = -1.0 if wanted is None else self.planner.shelves[wanted[0]].soonest_s(wanted[1], now_s)
        paths: list[str] = []

        def size(victim: Victim) -> int:
            own = self._paths_of(victim)
            paths.extend(own)
            return sum(map(size_of, own))

        return None if self.planner.victims(short_bytes, due_s, size, now_s) is None else paths

    def reader_of(self, path: str) -> Reader | None:
        """The reader that waits for what lies at a path: one that has not read it yet."""
        place = self._places.locate(path)
        if place is None:
            return None
        waiting = [reader for reader in self._of(place[0]) if reader.stream.place_of(place[1]) != NEVER]
        return min(waiting, key=lambda one: one.stream.place_of(place[1]), default=None)

    def why(self, path: str, *, blocked: bool, other_generation: bool) -> str:
        """Why a reader waits for an object that is not here as it should be (reader.WAIT_REASONS)."""
        if other_generation:
            return "changed"
        place = self._places.locate(path)
        if place is None or not self.planner.shelves[place[0]].is_needed(place[1]):
            return "not_planned"
        if self.planner.shelves[place[0]].dropped[place[1]]:
            return "evicted"
        return "throttled" if blocked else "late"

    def _mark_read(self, job: str, place: Place, now_s: float) -> Reader | None:
        key, number, _ = place
        for reader in self._of(key):
            if (reader.seeded or reader.stream.job == job) and self.planner.read(key, reader.stream, number, now_s):
                return reader
        self.planner.used(key, number, now_s)
        return None

    def _of(self, key: str) -> list[Reader]:
        return [reader for reader in self._readers.values() if reader.key == key]

    def _paths_of(self, victim: Victim) -> list[str]:
        if isinstance(victim, str):
            return [victim]
        key, number = victim
        return self._places.paths(key, number, self._catalogs[key].versions(number), self.planner.shelves[key].parts(number))

    def _stranger_used(self, path: str, now_s: float) -> None:
        self.planner.strangers[path] = now_s
        self.planner.strangers.move_to_end(path)

    def _end_seeded(self, reader: Reader) -> None:
        stream, number = reader.stream, reader.stream.current.number + 1
        if stream.upcoming is None:
            self._due[reader.key] = number
            return
        stream.advance()
        plan = replace(reader.plan, epoch=number)
        self._put(Reader(reader.key, stream, reader.listing, plan, reader.indices, self._clock(), seeded=True))

    def _put(self, reader: Reader) -> None:
        self._readers[reader.stream.id] = reader
        reader.stream.grow(self._catalogs[reader.key].items)
        self._sort_anew(reader.key)
        self._count_bound(reader)

    def _count_bound(self, reader: Reader) -> None:
        present = self.planner.shelves[reader.key].present
        # Each item once, however often it comes.
        reader.missing_at_epoch_start = int(np.count_nonzero((reader.stream.place != NEVER) & (present != reader.every_part)))

    def _remove(self, reader: Reader, why: str) -> None:
        log.info("stream %s: %s", reader.stream.id, why)
        del self._readers[reader.stream.id]
        self._sort_anew(reader.key)
        if not self._of(reader.key):
            self._due[reader.key] = 0

    def _sort_anew(self, key: str) -> None:
        self.planner.shelves[key].streams = [reader.stream for reader in self._of(key)]
        self.planner.sort_anew()
