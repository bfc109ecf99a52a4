"""All readers of the node. The registry updates the planner's state when something happens. Pure but for the clock that it is
given.

Each data root has a seeded stream until a reader's plan replaces it. To compute an order takes a while, so the caller does it
in a thread: `prepare`, `SeededStreams.prepare` and `Reader.prepare_next_epoch` compute one; `register`, `start_seeded` and
`Stream.set_next_epoch` put it in force.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from gcs_prefetchd.planning.cached_files import CachedFiles
from gcs_prefetchd.planning.catalog import Catalog
from gcs_prefetchd.planning.eviction import EvictionPolicy
from gcs_prefetchd.planning.item_lookup import ItemLookup
from gcs_prefetchd.planning.item_numbers import ManifestHistory, NumberedManifest
from gcs_prefetchd.planning.item_refs import PartRef
from gcs_prefetchd.planning.next_use import CachedItems
from gcs_prefetchd.planning.reader import PreparedPlan, Reader, prepare_plan
from gcs_prefetchd.planning.seeded_streams import SeededStreams, seeded_stream_id
from gcs_prefetchd.planning.stream import NEVER, Stream
from gcs_prefetchd.planning.window import spare_items, window_items
from gcs_prefetchd.shared.epoch_order import Indices
from gcs_prefetchd.shared.errors import ProtocolError
from gcs_prefetchd.shared.messages import Plan
from gcs_prefetchd.shared.moving_average import MovingDuration
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Registry"]

log = logging.getLogger(__name__)

STREAM_IDLE_S = 900.0
MAX_REPORT_GAP_S = 1.0  # a reader that pauses for longer is not late with its report


class Registry:
    """The readers of a node with a cache of `cache_bytes`, and the parts of the planner that they share.

    `window_items` fixes the size of every window; None computes it from measurements.
    """

    def __init__(
        self,
        seed: int,
        cache_bytes: int,
        *,
        window_items: int | None = None,
        lru: bool = False,
        download_s: MovingDuration | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.catalog = Catalog()
        self.lookup = ItemLookup(self.catalog)
        self.eviction = EvictionPolicy(lru=lru)
        self.files = CachedFiles(self.lookup, self.eviction, clock)
        self.seeded = SeededStreams(seed, self.catalog)
        # Beyond the windows; nothing is evicted for it. Not under LRU, which may evict it again before it is read.
        self.fills_free_space = window_items is None and not lru
        self._download_s = download_s or MovingDuration()
        self._cache_bytes = cache_bytes
        self._window_items = window_items
        self._readers: dict[str, Reader] = {}

    def __iter__(self) -> Iterator[Reader]:
        return iter(list(self._readers.values()))

    @property
    def stream_ids(self) -> list[str]:
        """The streams that readers have registered."""
        return [reader.stream.id for reader in self if not reader.is_seeded]

    # Manifests

    def set_manifest(self, numbered: NumberedManifest) -> None:
        """Put a manifest in force: plans from now on may refer to it; running epochs keep theirs."""
        data_root = numbered.manifest.data_root.uri
        self._grow(data_root, self.catalog.add_newest(numbered))
        seeded = self._readers.get(seeded_stream_id(data_root))
        if seeded is not None or not self._readers_of(data_root):
            self.seeded.mark_due(data_root, seeded.stream.epoch.number if seeded else 0)

    def add_earlier_manifest(self, numbered: NumberedManifest) -> None:
        """Let plans refer to a manifest from before this daemon started, of a data root that it has listed since."""
        self._grow(numbered.manifest.data_root.uri, self.catalog.add_earlier(numbered))

    def manifests_in_use(self, data_root: str) -> set[NumberedManifest]:
        """The manifests that readers' plans refer to."""
        return {reader.numbered for reader in self._readers_of(data_root)}

    def _grow(self, data_root: str, history: ManifestHistory) -> None:
        """Make space for new item numbers. The objects of known items may have changed, too."""
        cached = self.eviction.cached.setdefault(data_root, CachedItems(history.end))
        if history.end > len(cached.parts):
            cached.grow(history.end)
            for reader in self._readers_of(data_root):
                reader.stream.grow(history.end)
        self.lookup.clear()

    # Readers and their plans

    def prepare(self, plan: Plan, indices: Indices) -> PreparedPlan:
        """Compute a plan's order, for `register`. Raises ProtocolError, which names the field, if the plan is invalid.
        For a thread."""
        numbered = self.catalog.find_manifest(plan.data_root, plan.manifest)
        if numbered is None:
            raise ProtocolError(
                f"Plan: field 'manifest': {plan.manifest!r} is not a known manifest of {plan.data_root!r}; request it again"
            )
        return prepare_plan(plan, indices, numbered, self.catalog.history(plan.data_root).end)

    def register(self, prepared: PreparedPlan) -> Reader:
        """Register a reader by its plan, or start the next epoch of one that is registered."""
        plan = prepared.plan
        known, is_endless = self._readers.get(plan.stream), plan.kind == "endless"
        if known is not None and known.data_root != plan.data_root:
            self._remove(known, f"continues in {plan.data_root}")
            known = None
        stream = Stream(plan.stream, plan.job, prepared.epoch, is_endless=is_endless) if known is None else known.stream
        reader = self._make_reader(stream, prepared)
        if known is not None:
            stream.start_epoch(prepared.epoch)
            stream.job, stream.is_endless = plan.job, is_endless
            reader.waits, reader.report_gap_s = known.waits, known.report_gap_s
        self._readers.pop(seeded_stream_id(plan.data_root), None)
        self.seeded.cancel_due(plan.data_root)
        self._add(reader)
        return reader

    def start_seeded(self, prepared: PreparedPlan) -> None:
        """Start an epoch of a seeded stream, unless a reader has registered or a manifest has arrived meanwhile."""
        data_root = prepared.plan.data_root
        is_current = prepared.numbered is self.catalog.history(data_root).newest and not self.seeded.is_due(data_root)
        if is_current and all(reader.is_seeded for reader in self._readers_of(data_root)):
            stream = Stream(prepared.plan.stream, "", prepared.epoch)
            self._add(self._make_reader(stream, prepared, is_seeded=True))

    def end_job(self, job: str) -> None:
        """Forget the streams of a job whose process has ended."""
        for reader in self:
            if reader.stream.job == job and not reader.is_seeded:
                self._remove(reader, "its process has ended")

    def forget_idle(self) -> None:
        """Forget the readers that have been silent for long."""
        for reader in self:
            silent_s = self.clock() - reader.last_seen_s
            if silent_s > STREAM_IDLE_S and not reader.is_seeded:
                self._remove(reader, f"silent for {silent_s:.0f} s")

    def window_items(self, reader: Reader) -> int:
        """The size of a reader's prefetch window."""
        if self._window_items is not None:
            return self._window_items
        spare = spare_items(self._cache_bytes, reader.numbered.item_bytes)
        return window_items(reader.stream, self._download_s, reader.report_gap_s, spare, self.clock())

    def waiting_reader(self, part: PartRef) -> Reader | None:
        """The reader that waits for a part: the one that will read its item next."""
        waiting = [reader for reader in self._readers_of(part.data_root) if reader.stream.next_place(part.item) != NEVER]
        return min(waiting, key=lambda one: one.stream.next_place(part.item), default=None)

    def finish_adoption(self) -> None:
        """Sort the files that `CachedFiles.adopt` added; they were cached when the epochs started."""
        self.eviction.start_sorting()
        for reader in self:
            reader.count_missing()

    # Reads

    def record_reads(self, job: str, names: Iterable[ObjectName]) -> None:
        """A process of a job has read objects: advance the job's streams, or the seeded ones if the job has no plan."""
        now_s = self.clock()
        reads: dict[str, int] = {}  # by stream
        for name in names:
            path = cache_path(name.bucket, name.name)
            part = self.lookup.locate_object(name, path)
            if part is None:
                if path in self.eviction.itemless:
                    self.eviction.use_itemless(path, now_s)
            elif part.part == 0:  # an item counts as read when its first part is
                reader = self._mark_read(job, part, now_s)
                if reader is not None:
                    reads[reader.stream.id] = reads.get(reader.stream.id, 0) + 1
        for stream_id, count in reads.items():
            reader = self._readers[stream_id]
            reader.report_gap_s.add(min(now_s - reader.last_seen_s, MAX_REPORT_GAP_S))
            reader.last_seen_s = now_s
            reader.stream.rate.add(count, now_s)
            self.eviction.extend_known(reader.data_root, reader.stream, self.window_items(reader), now_s)
            if reader.is_seeded and reader.stream.is_finished:
                self._end_seeded_epoch(reader)

    def _mark_read(self, job: str, part: PartRef, now_s: float) -> Reader | None:
        data_root, item, _ = part
        for reader in self._readers_of(data_root):
            is_of_job = reader.is_seeded or reader.stream.job == job
            if is_of_job and self.eviction.mark_read(data_root, reader.stream, item, now_s):
                return reader
        self.eviction.record_use(data_root, item, now_s)
        return None

    def _end_seeded_epoch(self, reader: Reader) -> None:
        stream, number = reader.stream, reader.stream.epoch.number + 1
        if stream.next_epoch is None:
            self.seeded.mark_due(reader.data_root, number)
            return
        stream.start_next_epoch()
        plan = replace(reader.plan, epoch=number)
        prepared = PreparedPlan(plan, reader.indices, reader.numbered, stream.epoch)
        self._add(self._make_reader(stream, prepared, is_seeded=True))

    # The table of readers

    def _readers_of(self, data_root: str) -> list[Reader]:
        return [reader for reader in self._readers.values() if reader.data_root == data_root]

    def _make_reader(self, stream: Stream, prepared: PreparedPlan, *, is_seeded: bool = False) -> Reader:
        plan = prepared.plan
        cached = self.eviction.cached[plan.data_root]
        return Reader(
            plan.data_root, stream, prepared.numbered, plan, prepared.indices, cached, self.clock(), is_seeded=is_seeded
        )

    def _add(self, reader: Reader) -> None:
        self._readers[reader.stream.id] = reader
        reader.stream.grow(self.catalog.history(reader.data_root).end)
        self._streams_changed(reader.data_root)
        reader.count_missing()

    def _remove(self, reader: Reader, reason: str) -> None:
        log.info("stream %s: %s", reader.stream.id, reason)
        del self._readers[reader.stream.id]
        self._streams_changed(reader.data_root)
        if not self._readers_of(reader.data_root):
            self.seeded.mark_due(reader.data_root, 0)

    def _streams_changed(self, data_root: str) -> None:
        self.eviction.cached[data_root].streams = [reader.stream for reader in self._readers_of(data_root)]
        self.eviction.start_sorting()
