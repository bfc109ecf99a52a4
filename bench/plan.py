"""What knowing the order costs: an epoch's order, a plan's registration, and the planner's time for each item that is read.

    python bench/plan.py [--items 1000000 10000000] [--json] [--plot FILE.png]

One reader of a shuffled order, half of the items in the cache: it reports what it read, its window is filled, and for each
item that comes another goes. No disk and no network: the planner's own time, of one thread, in the daemon's own code.
"""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from comparison import command_line
from figures import Figure, finish
from gcs_prefetchd.planning.item_refs import ItemRef
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.shared.epoch_order import epoch_order, order_digest
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, ManifestBuilder, ObjectColumns
from gcs_prefetchd.shared.messages import Plan
from gcs_prefetchd.shared.objects import DataRoot
from gcs_prefetchd.shared.paths import cache_path

ROOT = DataRoot("bench", "train")
OBJECT_BYTES = 100_000
AT_ONCE = 10_000
READS, REPORTED_AT_ONCE = 100_000, 25
WINDOW_ITEMS = 100
ITEMS = [1_000_000, 10_000_000]
LONGEST_STEP_MS, LARGEST_READ_US = 20.0, 5.0

T = TypeVar("T")


def listing(items: int) -> Manifest:
    """So many pairs."""
    listed, item_patterns = ManifestBuilder(ROOT, ItemPatterns()), ItemPatterns()
    for part in range(len(item_patterns.patterns)):
        for start in range(0, items, AT_ONCE):
            names = [ROOT.folder + item_patterns.part_name(f"{i:08}", part) for i in range(start, min(start + AT_ONCE, items))]
            listed.add(ObjectColumns(names, *(np.full(len(names), value, dtype=np.int64) for value in (1, OBJECT_BYTES, 7))))
    return listed.build()


class Node:
    """A planner and a cache that holds half of everything, as far as the planner can tell."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.registry = Registry(0, len(manifest) * OBJECT_BYTES, window_items=WINDOW_ITEMS)
        self.registry.set_manifest(self.registry.catalog.assign_numbers(manifest))
        for item in range(0, len(manifest), 2):
            for part in range(2):
                self.registry.eviction.adopt_part(ROOT.uri, item, part)
        self.registry.finish_adoption()
        while self.registry.eviction.sort_more():
            pass

    def plan(self) -> tuple[Plan, np.ndarray]:
        """A reader of all of it."""
        indices = np.arange(len(self.manifest), dtype=np.uint32)
        order = epoch_order(1, 0, indices)
        values = {"job": "job", "stream": "job/0", "data_root": ROOT.uri, "manifest": self.manifest.digest, "kind": "shuffled"}
        counts = {"seed": 1, "epoch": 0, "position": 0, "rank": 0, "world": 1, "drop_last": 0, "start": 0}
        return Plan(**values, **counts, digest=order_digest(order)), indices  # type: ignore[arg-type]

    def read(self, reader: Reader) -> int:
        """Report the next items as read and fill the window; returns how many were reported."""
        stream, registry = reader.stream, self.registry
        items = [stream.item_at(place) for place in range(stream.first_unread, stream.first_unread + REPORTED_AT_ONCE)]
        registry.record_reads("job", [version.name for item in items for version in self.manifest.versions(item)])
        place = max(stream.planned_end, stream.first_unread)
        while place < min(stream.known_end, stream.window_start(WINDOW_ITEMS) + WINDOW_ITEMS):
            item = stream.item_at(place)
            if reader.is_item_ready(item):
                registry.eviction.note_planned(reader.data_root, item, registry.clock())
            else:
                self._fetch(reader, item)
            place += 1
        stream.planned_end = place
        return len(items)

    def read_by_policy(self, reader: Reader) -> int:
        """The same, of the planner alone: no names, no reports."""
        stream, policy, now_s = reader.stream, self.registry.eviction, time.monotonic()
        for _ in range(REPORTED_AT_ONCE):
            policy.mark_read(ROOT.uri, stream, stream.item_at(stream.first_unread), now_s)
        policy.extend_known(ROOT.uri, stream, WINDOW_ITEMS, now_s)
        for place in range(
            max(stream.planned_end, stream.first_unread), min(stream.known_end, stream.first_unread + WINDOW_ITEMS)
        ):
            item = stream.item_at(place)
            if not policy.cached[ROOT.uri].parts_of(item):
                due_s = policy.cached[ROOT.uri].next_use_s(item, now_s)
                for victim in policy.choose_victims(2, due_s, lambda _: 2, now_s) or []:
                    assert not isinstance(victim, str)
                    for part in range(2):
                        policy.remove_part(victim.data_root, victim.item, part)
                for part in range(2):
                    policy.add_part(ROOT.uri, item, part, now_s)
            stream.planned_end = place + 1
        return REPORTED_AT_ONCE

    def _fetch(self, reader: Reader, item: int) -> None:
        for path in (
            self.registry.files.choose_victims(2 * OBJECT_BYTES, ItemRef(ROOT.uri, item), lambda path: OBJECT_BYTES) or []
        ):
            self.registry.files.remove(path)
        for version in self.registry.lookup.versions(ROOT.uri, item):
            self.registry.files.add(cache_path(version.name.bucket, version.name.name))


def measure(items: int) -> list[Figure]:
    """All figures for so many items."""
    manifest = listing(items)
    order_s, _ = timed(lambda: epoch_order(1, 0, np.arange(items, dtype=np.uint32)))
    node = Node(manifest)
    plan, indices = node.plan()
    prepare_s, prepared = timed(lambda: node.registry.prepare(plan, indices))
    register_s, reader = timed(lambda: node.registry.register(prepared))
    slices = [register_s]
    is_sorting = True
    while is_sorting:
        took_s, is_sorting = timed(node.registry.eviction.sort_more)
        slices.append(took_s)
    planner_us, read_us = (item_us(one, reader, min(READS, items // 4)) for one in (node.read_by_policy, node.read))
    return [
        Figure(f"{items:,} items: an epoch's order", order_s, "s"),
        Figure("a plan worked out, in a thread", prepare_s, "s"),
        Figure(f"{items:,}: a plan put in force, longest step on the event loop", max(slices) * 1e3, "ms", LONGEST_STEP_MS),
        Figure(f"{items:,}: planner, for each item read", planner_us, "us", LARGEST_READ_US),
        Figure("with names, reports and places", read_us, "us"),
    ]


def item_us(read: Callable[[Reader], int], reader: Reader, items: int) -> float:
    """Microseconds of CPU for each of so many items that are read."""
    reads, began_s = 0, time.thread_time()
    while reads < items:
        reads += read(reader)
    return (time.thread_time() - began_s) / reads * 1e6


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds of this thread's CPU that a call took, and what it returned."""
    began_s = time.thread_time()
    result = call()
    return time.thread_time() - began_s, result


def main() -> int:
    """The command."""
    parser = command_line(__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=ITEMS, help="how many (default: 1 and 10 million)")
    options = parser.parse_args()
    figures = [figure for items in options.items for figure in measure(items)]
    return finish("Knowing the order: half of the items in the cache, one reader", figures, options)


if __name__ == "__main__":
    sys.exit(main())
