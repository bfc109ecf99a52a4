"""All streams of the node and the manifests they refer to. Pure but for the clock it is given.

Before any reader has come, the seeded order of each data root is a stream of its own; a reader's plan takes its place.
"""

import logging
import time
from collections.abc import Callable, Iterator

import numpy as np

from gcs_prefetchd.errors import ProtocolError
from gcs_prefetchd.manifest import Manifest
from gcs_prefetchd.names import ObjectName
from gcs_prefetchd.order import Indices, epoch_order, order_digest
from gcs_prefetchd.protocol import Plan
from gcs_prefetchd.streams import Stream

__all__ = ["Registry"]

log = logging.getLogger(__name__)

STREAM_IDLE_S = 900.0
MANIFESTS_KEPT = 4


class Registry:
    """Which streams there are. As a container it holds the paths of every stream's window."""

    def __init__(self, seed: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seed = seed
        self._clock = clock
        self._manifests: dict[str, list[Manifest]] = {}
        self._streams: dict[str, Stream] = {}
        self._last_seen_s: dict[str, float] = {}

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams.values()))

    def __contains__(self, path: object) -> bool:
        return any(path in stream.held for stream in self._streams.values())

    def manifest(self, data_root: str) -> Manifest | None:
        """The latest manifest of a data root, or None before its first listing."""
        known = self._manifests.get(data_root)
        return known[-1] if known else None

    def set_manifest(self, manifest: Manifest) -> bool:
        """Take a listing; False where it is the same as before. Plans that come from now on may refer to it."""
        data_root = manifest.data_root.uri
        known = self._manifests.setdefault(data_root, [])
        if known and known[-1].digest == manifest.digest:
            return False
        known.append(manifest)
        del known[:-MANIFESTS_KEPT]
        seeded = self._streams.get(_seeded_id(data_root))
        if len(known) == 1 or seeded is not None:
            self._start_seeded(manifest, seeded.epoch if seeded else 0)
        return True

    def add_plan(self, plan: Plan, order: Indices) -> None:
        """A reader says what it will read; raises ProtocolError, naming the field, where that cannot be."""
        manifest = next((m for m in self._manifests.get(plan.data_root, []) if m.digest == plan.manifest), None)
        if manifest is None:
            raise ProtocolError(
                f"Plan: field 'manifest': {plan.manifest!r} is no listing of {plan.data_root!r}; ask for it again"
            )
        if len(order) and int(order.max()) >= len(manifest):
            raise ProtocolError(
                f"Plan: field 'indices': index {int(order.max())} is beyond the {len(manifest)} items of the manifest"
            )
        if plan.position > len(order):
            raise ProtocolError(f"Plan: field 'position': {plan.position} is beyond the plan's {len(order)} items")
        if order_digest(order) != plan.digest:
            raise ProtocolError("Plan: field 'digest' is not that of the indices; are reader and daemon of one version?")
        self._streams.pop(_seeded_id(plan.data_root), None)
        self._streams[plan.stream] = Stream(plan.stream, plan.job, manifest, plan.epoch, order, plan.position)
        self._last_seen_s[plan.stream] = self._clock()

    def mark_read(self, job: str, name: ObjectName) -> None:
        """A process of this job read the object: its stream moves on, or the seeded one where the job sent no plan."""
        for stream in self._streams_for(job, name):
            place = stream.manifest.find(name)
            if place is None or place[1] != 0:
                continue  # an item's first part stands for the item
            if stream.mark_read(place[0]):
                if stream.id in self._last_seen_s:  # a seeded stream waits for its next reader however long
                    self._last_seen_s[stream.id] = self._clock()
                if stream.ended and stream.id == _seeded_id(stream.manifest.data_root.uri):
                    self._start_seeded(stream.manifest, stream.epoch + 1)
                return

    def forget_idle(self) -> None:
        """Drop the streams whose readers have long been silent: they have ended or died."""
        now_s = self._clock()
        for stream_id, last_s in list(self._last_seen_s.items()):
            if now_s - last_s > STREAM_IDLE_S:
                log.info("stream %s: silent for %.0f s, forgotten", stream_id, now_s - last_s)
                self._streams.pop(stream_id, None)
                del self._last_seen_s[stream_id]

    def _streams_for(self, job: str, name: ObjectName) -> list[Stream]:
        ids = [stream.id for stream in self._streams.values() if stream.job == job and name in stream.manifest.data_root]
        seeded = [s.id for s in self._streams.values() if s.id == _seeded_id(s.manifest.data_root.uri) and s.id not in ids]
        return [self._streams[stream_id] for stream_id in ids + seeded]

    def _start_seeded(self, manifest: Manifest, epoch: int) -> None:
        stream_id = _seeded_id(manifest.data_root.uri)
        order = epoch_order(self._seed, epoch, np.arange(len(manifest), dtype=np.uint32))
        self._streams[stream_id] = Stream(stream_id, "", manifest, epoch, order)


def _seeded_id(data_root: str) -> str:
    return f"seeded {data_root}"
