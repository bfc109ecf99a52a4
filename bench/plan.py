"""The planner's costs: an epoch's order, a plan's registration, and CPU time for each item that is read.

    python bench/plan.py [--items 1000000 10000000] [--json] [--plot FILE.png]

One reader reads a shuffled order, with half of the items cached. It reports its reads, its window is filled, and for each item
that is fetched another is evicted. No disk and no network: the CPU time of one thread, in the daemon's own code.
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
NAMES_PER_BATCH = 10_000
READS, READS_PER_REPORT = 100_000, 25
WINDOW_ITEMS = 100
ITEMS = [1_000_000, 10_000_000]
MAX_STEP_MS, MAX_READ_US = 20.0, 5.0

T = TypeVar("T")


def manifest_of(items: int) -> Manifest:
    """A manifest of pairs."""
    builder, item_patterns = ManifestBuilder(ROOT, ItemPatterns()), ItemPatterns()
    for part in range(len(item_patterns.patterns)):
        for start in range(0, items, NAMES_PER_BATCH):
            ids = (f"{i:08}" for i in range(start, min(start + NAMES_PER_BATCH, items)))
            names = [ROOT.folder + item_patterns.part_name(item_id, part) for item_id in ids]
            builder.add(ObjectColumns(names, *(np.full(len(names), value, dtype=np.int64) for value in (1, OBJECT_BYTES, 7))))
    return builder.build()


class Node:
    """A planner, and a simulated cache that holds half of the items."""

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
        """The plan of a reader of all items."""
        indices = np.arange(len(self.manifest), dtype=np.uint32)
        order = epoch_order(1, 0, indices)
        values = {"job": "job", "stream": "job/0", "data_root": ROOT.uri, "manifest": self.manifest.digest, "kind": "shuffled"}
        counts = {"seed": 1, "epoch": 0, "position": 0, "rank": 0, "world": 1, "drop_last": 0, "start": 0}
        return Plan(**values, **counts, digest=order_digest(order)), indices  # type: ignore[arg-type]

    def read(self, reader: Reader) -> int:
        """Report reads of the next items and fill the window; returns the number of reads."""
        stream, registry = reader.stream, self.registry
        items = [stream.item_at(place) for place in range(stream.first_unread, stream.first_unread + READS_PER_REPORT)]
        registry.record_reads("job", [version.name for item in items for version in self.manifest.versions(item)])
        place = max(stream.planned_end, stream.first_unread)
        while place < min(stream.known_end, stream.window_start(WINDOW_ITEMS) + WINDOW_ITEMS):
            item = stream.item_at(place)
            if reader.is_item_ready(item):
                registry.eviction.record_planned(reader.data_root, item, registry.clock())
            else:
                self._fetch(item)
            place += 1
        stream.planned_end = place
        return len(items)

    def read_by_policy(self, reader: Reader) -> int:
        """The same with the eviction policy alone: no names, no reports."""
        stream, policy, now_s = reader.stream, self.registry.eviction, time.monotonic()
        for _ in range(READS_PER_REPORT):
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
        return READS_PER_REPORT

    def _fetch(self, item: int) -> None:
        wanted = ItemRef(ROOT.uri, item)
        for path in self.registry.files.choose_victims(2 * OBJECT_BYTES, wanted, lambda path: OBJECT_BYTES) or []:
            self.registry.files.remove(path)
        for version in self.registry.lookup.versions(ROOT.uri, item):
            self.registry.files.add(cache_path(version.name.bucket, version.name.name))


def measure(items: int) -> list[Figure]:
    """All figures for this many items."""
    manifest = manifest_of(items)
    order_s, _ = timed(lambda: epoch_order(1, 0, np.arange(items, dtype=np.uint32)))
    node = Node(manifest)
    plan, indices = node.plan()
    prepare_s, prepared = timed(lambda: node.registry.prepare(plan, indices))
    register_s, reader = timed(lambda: node.registry.register(prepared))
    steps_s = [register_s]
    is_sorting = True
    while is_sorting:
        took_s, is_sorting = timed(node.registry.eviction.sort_more)
        steps_s.append(took_s)
    policy_us, read_us = (item_us(one, reader, min(READS, items // 4)) for one in (node.read_by_policy, node.read))
    return [
        Figure(f"{items:,} items: an epoch's order", order_s, "s"),
        Figure("a plan prepared, in a thread", prepare_s, "s"),
        Figure(f"{items:,}: a plan put in force, longest step on the event loop", max(steps_s) * 1e3, "ms", MAX_STEP_MS),
        Figure(f"{items:,}: planner, for each item read", policy_us, "us", MAX_READ_US),
        Figure("with names, reports and lookups", read_us, "us"),
    ]


def item_us(read: Callable[[Reader], int], reader: Reader, items: int) -> float:
    """Microseconds of CPU for each item that is read."""
    reads, started_s = 0, time.thread_time()
    while reads < items:
        reads += read(reader)
    return (time.thread_time() - started_s) / reads * 1e6


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """The CPU seconds that a call took in this thread, and its result."""
    started_s = time.thread_time()
    result = call()
    return time.thread_time() - started_s, result


def main() -> int:
    """The command."""
    parser = command_line(__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=ITEMS, help="how many items (default: 1 and 10 million)")
    options = parser.parse_args()
    figures = [figure for items in options.items for figure in measure(items)]
    return finish("The planner: half of the items in the cache, one reader", figures, options)


if __name__ == "__main__":
    sys.exit(main())
