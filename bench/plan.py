"""What knowing the order costs: an epoch's order, a plan's registration, and the planner's time for each item that is read.

    python bench/plan.py [--items 1000000] [--json]

One reader of a shuffled order, half of the items in the cache: it reports what it read, its window is filled, and for each
item that comes another goes. No disk and no network: the planner's own time, of one thread, in the daemon's own code.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from gcs_prefetchd.layout import Layout
from gcs_prefetchd.manifest import Listing, Manifest, Objects
from gcs_prefetchd.names import DataRoot, cache_path
from gcs_prefetchd.order import epoch_order, order_digest
from gcs_prefetchd.protocol import Plan
from gcs_prefetchd.readers import Reader
from gcs_prefetchd.registry import Registry

ROOT = DataRoot("bench", "train")
OBJECT_BYTES = 100_000
AT_ONCE = 10_000
READS, REPORTED_AT_ONCE = 100_000, 25
WINDOW_ITEMS = 100

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, and what it should at most be; None where nothing is asked of it."""

    what: str
    value: float
    unit: str
    target: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target was met."""
        return "" if self.target is None else "met" if self.value <= self.target else "missed"


def listing(items: int) -> Manifest:
    """So many pairs."""
    listed, layout = Listing(ROOT, Layout()), Layout()
    for part in range(len(layout.patterns)):
        for start in range(0, items, AT_ONCE):
            names = [ROOT.folder + layout.part_name(f"{i:08}", part) for i in range(start, min(start + AT_ONCE, items))]
            listed.add(Objects(names, *(np.full(len(names), value, dtype=np.int64) for value in (1, OBJECT_BYTES, 7))))
    return listed.freeze()


class Node:
    """A planner and a cache that holds half of everything, as far as the planner can tell."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.registry = Registry(0, len(manifest) * OBJECT_BYTES, window_items=WINDOW_ITEMS)
        self.registry.set_manifest(self.registry.number(manifest))
        for item in range(0, len(manifest), 2):
            for part in range(2):
                self.registry.planner.adopt(ROOT.uri, item, part)
        self.registry.sort_anew()
        while self.registry.sort_on():
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
        items = [stream.item_at(place) for place in range(stream.start, stream.start + REPORTED_AT_ONCE)]
        registry.note_reads("job", [version.name for item in items for version in self.manifest.versions(item)])
        place = max(stream.planned, stream.start)
        while place < min(stream.known, stream.window_start(WINDOW_ITEMS) + WINDOW_ITEMS):
            item = stream.item_at(place)
            if registry.is_here(reader, item):
                registry.planned(reader, item)
            else:
                self._fetch(reader, item)
            place += 1
        stream.planned = place
        return len(items)

    def read_by_planner(self, reader: Reader) -> int:
        """The same, of the planner alone: no names, no reports."""
        stream, planner, now_s = reader.stream, self.registry.planner, time.monotonic()
        for _ in range(REPORTED_AT_ONCE):
            planner.read(ROOT.uri, stream, stream.item_at(stream.start), now_s)
        planner.reveal(ROOT.uri, stream, WINDOW_ITEMS, now_s)
        for place in range(max(stream.planned, stream.start), min(stream.known, stream.start + WINDOW_ITEMS)):
            item = stream.item_at(place)
            if not planner.shelves[ROOT.uri].parts(item):
                due_s = planner.shelves[ROOT.uri].soonest_s(item, now_s)
                for victim in planner.victims(2, due_s, lambda _: 2, now_s) or []:
                    for part in range(2):
                        planner.left(victim[0], int(victim[1]), part)
                for part in range(2):
                    planner.arrived(ROOT.uri, item, part, now_s)
            stream.planned = place + 1
        return REPORTED_AT_ONCE

    def _fetch(self, reader: Reader, item: int) -> None:
        for path in self.registry.choose(2 * OBJECT_BYTES, (ROOT.uri, item), lambda path: OBJECT_BYTES) or []:
            self.registry.left(path)
        for version in self.registry.versions(reader, item):
            self.registry.arrived(cache_path(version.name.bucket, version.name.name))


def measure(items: int) -> list[Row]:
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
        took_s, is_sorting = timed(node.registry.sort_on)
        slices.append(took_s)
    planner_us, read_us = (item_us(one, reader, min(READS, items // 4)) for one in (node.read_by_planner, node.read))
    return [
        Row("an epoch's order", order_s, "s"),
        Row("a plan worked out, in a thread", prepare_s, "s"),
        Row("a plan put in force, longest step on the event loop", max(slices) * 1e3, "ms", 20.0),
        Row("planner, for each item read", planner_us, "us", 5.0),
        Row("with names, reports and places", read_us, "us"),
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


def show(items: int, rows: list[Row]) -> None:
    """The table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("what", "measured", "at most", ""):
        table.add_column(column, justify="left" if column in ("what", "") else "right")
    for row in rows:
        target = "" if row.target is None else f"{row.target:g} {row.unit}"
        table.add_row(row.what, f"{row.value:.3g} {row.unit}", target, row.verdict)
    Console(width=140).print(f"{items:,} items, half of them in the cache, one reader", table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000, help="how many (default 1,000,000)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    rows = measure(options.items)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(options.items, rows)
    return 0 if all(row.verdict != "missed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
