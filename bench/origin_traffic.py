"""How much of a dataset is fetched again each epoch: a real daemon, a counting server, caches smaller than the dataset.

    python bench/origin_traffic.py [--json] [--quick] [--plot FILE.png]

References: the lower bound N - C + window for a shuffled order, exact offline results for an endless stream and for
two jobs, and the same daemon with policy=lru. All numbers are items (an image and its label), from epoch 2 on.
"""

import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from comparison import command_line, draw
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.epoch_order import plan_order
from offline import belady_hits, endless_misses
from rig import BUCKET, Reader, daemon, make_objects, media_gets, server, together

SMALLEST_BYTES, LARGEST_BYTES = 2_000, 8_000
LATENCY_MS = 10.0
ITEMS_PER_S = 500.0
SLOW_LATENCY_MS = 16.0
SLOW_SHARE = 0.50


@dataclass(frozen=True, slots=True)
class Scale:
    """The amount of work: items, epochs of a job, epochs of the job that is faster than its origin, cache sizes."""

    items: int
    epochs: int
    slow_epochs: int
    shares: tuple[float, ...]


FULL = Scale(2000, 6, 3, (0.10, 0.25, 0.50, 0.75, 0.90))
# The rates are those of the full run: a faster reader would measure the processor. With fewer items a tenth of an epoch
# would be too few for its share of the misses to mean anything.
QUICK = Scale(700, 3, 2, (0.50,))


@dataclass(frozen=True, slots=True)
class Row:
    """One run: `value` is what was measured and `target` its reference, in items unless the name says otherwise."""

    name: str
    cache_share: float
    value: float
    reference: float
    target: str
    ok: bool
    note: str = ""


class Bench:
    """The runs; each starts with an empty cache directory and its own server."""

    def __init__(self, buckets: Path, scratch: Path, total_bytes: int, scale: Scale) -> None:
        self.buckets = buckets
        self.scratch = scratch
        self.total_bytes = total_bytes
        self.scale = scale
        self._runs = 0

    def shuffled(self, share: float, policy: str) -> list[Row]:
        """One job over shuffled epochs."""
        tenths = np.zeros((self.scale.epochs, 10))
        windows: list[int] = []
        before = 0
        with self._rig(share, policy=policy) as (endpoint, client, cache_dir):

            def count(epoch: int, tenth: int) -> None:
                nonlocal before
                gets = media_gets(endpoint)
                tenths[epoch, tenth - 1] = (gets - before) / 2
                before = gets
                windows.extend(stream["window_items"] for stream in client.stats()["streams"] if epoch)

            Reader(cache_dir, "job", 1, ITEMS_PER_S).read(self.scale.epochs, count)
            residence = gets_per_residence(endpoint, client)
        fetched = float(tenths[1:].sum(axis=1).mean())
        window = round(float(np.mean(windows)))
        bound = min(self.scale.items, self.scale.items * (1 - share) + window)
        if policy == "lru":
            return [Row("shuffled, LRU", share, fetched, bound, "", True)]
        unevenness = float((tenths[1:].mean(axis=0) / tenths[1:].mean()).max())
        return [
            Row("shuffled", share, fetched, bound, "<= 1.01 x (N - C + window)", fetched <= 1.01 * bound, f"window {window}"),
            Row("worst tenth of an epoch / mean", share, unevenness, 1.0, "<= 1.3", unevenness <= 1.3),
            Row("GETs per object and residence", share, residence, 1.0, "1", residence == 1),
        ]

    def endless(self, share: float) -> list[Row]:
        """One job that draws with replacement."""
        with self._rig(share) as (endpoint, _, cache_dir):
            marks: list[int] = []
            reader = Reader(cache_dir, "job", 1, ITEMS_PER_S, kind="endless")
            reader.read(self.scale.epochs, lambda epoch, tenth: marks.append(media_gets(endpoint)) if tenth == 10 else None)
        fetched = (marks[-1] - marks[0]) / 2 / (self.scale.epochs - 1)
        reads = [item for epoch in range(self.scale.epochs) for item in self._order("endless", 1, epoch)]
        items = self.scale.items
        exact = endless_misses(reads, int(items * share), items, items) / (self.scale.epochs - 1)
        return [Row("endless", share, fetched, exact, "<= 1.05 x exact offline", fetched <= 1.05 * exact)]

    def two_jobs(self, share: float) -> list[Row]:
        """Two jobs with different seeds on the same data; hits per read."""
        with self._rig(share) as (endpoint, _, cache_dir):
            readers = [Reader(cache_dir, f"job {seed}", seed, ITEMS_PER_S / 2) for seed in (1, 2)]
            before = media_gets(endpoint)
            together(readers, self.scale.epochs)
            fetched = (media_gets(endpoint) - before) / 2
        epochs = range(self.scale.epochs)
        orders = [[item for epoch in epochs for item in self._order("shuffled", seed, epoch)] for seed in (1, 2)]
        reads = [item for pair in zip(*orders, strict=True) for item in pair]
        hits, exact = 1 - fetched / len(reads), belady_hits(reads, int(self.scale.items * share)) / len(reads)
        return [Row("two jobs, hits per read", share, hits, exact, ">= 0.85 x exact Belady", hits >= 0.85 * exact)]

    def slow_origin(self, share: float) -> list[Row]:
        """A reader twice as fast as the origin: the epoch's time over the ideal one, in which the origin never rests."""
        rows, epochs = [], self.scale.slow_epochs
        for policy in ("plan", "lru"):
            with self._rig(share, latency_ms=SLOW_LATENCY_MS, concurrency=4, policy=policy) as (endpoint, _, cache_dir):
                # A reader that never pauses misses every item of the first epoch: that is the origin's speed. It is a job of
                # its own: the daemon would treat the first reports of a second reader of that name as duplicates.
                cold_s = Reader(cache_dir, "cold", 1, math.inf).read(1)
                items_per_s = 2 * self.scale.items / cold_s
                before = media_gets(endpoint)
                took_s = Reader(cache_dir, "job", 2, items_per_s).read(epochs) / epochs
                fetched = (media_gets(endpoint) - before) / 2 / epochs
            ideal_s = max(self.scale.items / items_per_s, self.scale.items * (1 - share) / (items_per_s / 2))
            target = "<= 1.05 x ideal" if policy == "plan" else ""
            ok = not target or took_s <= 1.05 * ideal_s
            name = f"origin at half the rate, {policy}: s per epoch"
            rows.append(Row(name, share, took_s, ideal_s, target, ok, f"{fetched:,.0f} items fetched"))
        return rows

    def _order(self, kind: str, seed: int, epoch: int) -> list[int]:
        order: list[int] = plan_order(kind, seed, epoch, np.arange(self.scale.items, dtype=np.uint32)).tolist()
        return order

    def _rig(self, share: float, *, latency_ms: float = LATENCY_MS, **settings: object) -> "_Rig":
        self._runs += 1
        return _Rig(self, self.scratch / str(self._runs), int(self.total_bytes * share), latency_ms, settings)


class _Rig:
    """Server and daemon of one run."""

    def __init__(self, bench: Bench, cache_dir: Path, cache_bytes: int, latency_ms: float, settings: dict[str, object]) -> None:
        self._server = server(bench.buckets, latency_ms)
        self._cache_dir = cache_dir
        self._cache_bytes = cache_bytes
        self._settings = settings

    def __enter__(self) -> tuple[str, DaemonClient, Path]:
        endpoint = self._server.__enter__()
        self._daemon = daemon(self._cache_dir, endpoint, self._cache_bytes, **self._settings)
        return endpoint, self._daemon.__enter__(), self._cache_dir

    def __exit__(self, *exc_info: object) -> None:
        self._daemon.__exit__(None, None, None)
        self._server.__exit__(None, None, None)


def gets_per_residence(endpoint: str, client: DaemonClient) -> float:
    """Requests over the objects that are or were cached: 1 if nothing is fetched twice."""
    while (stats := client.stats())["origin"]["in_flight"] or stats["cache"]["reserved_bytes"]:
        time.sleep(0.1)
    residences: int = stats["cache"]["objects"] + stats["cache"]["evictions"]
    return media_gets(endpoint) / residences


def main() -> int:
    parser = command_line(__doc__)
    quick = f"{QUICK.items} items for {FULL.items:,}, {QUICK.epochs} epochs for {FULL.epochs}"
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"every kind of run, but {quick}, one cache of half the data: about 70 s",
    )
    parser.add_argument("--only", choices=["shuffled", "endless", "two_jobs", "slow_origin"], help="one kind of run")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="gcs-prefetchd-bench-") as scratch:
        total_bytes = make_objects(Path(scratch, "buckets"), scale.items, SMALLEST_BYTES, LARGEST_BYTES)
        assert Path(scratch, "buckets", BUCKET).is_dir()
        rows = run(Bench(Path(scratch, "buckets"), Path(scratch), total_bytes, scale), options.only)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows, scale.items)
    if options.plot:
        draw(lambda axes: plot(axes, rows, scale.items), "Items fetched in each later epoch", options.plot)
    return 0 if all(row.ok for row in rows) else 1


def run(bench: Bench, only: str | None) -> list[Row]:
    """Every run in turn."""
    rows: list[Row] = []
    for share in bench.scale.shares:
        if only in (None, "shuffled"):
            rows += bench.shuffled(share, "plan") + bench.shuffled(share, "lru")
        if only in (None, "endless"):
            rows += bench.endless(share)
        if only in (None, "two_jobs"):
            rows += bench.two_jobs(share)
    if only in (None, "slow_origin"):
        rows += bench.slow_origin(SLOW_SHARE)
    return rows


def show(rows: list[Row], items: int) -> None:
    """The table."""
    table = Table("run", "cache holds", "measured", "reference", "ratio", "target", "", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        ratio = row.value / row.reference if row.reference else math.nan
        verdict = "" if not row.target else "ok" if row.ok else "MISSED"
        cells = [f"{row.value:,.3g}" if row.value < 10 else f"{row.value:,.0f}"]
        cells += [f"{row.reference:,.3g}" if row.reference < 10 else f"{row.reference:,.0f}", f"{ratio:.3f}"]
        table.add_row(row.name, f"{row.cache_share:.0%}", *cells, row.target, f"{verdict} {row.note}")
    Console(width=140).print(f"{items:,} items, sizes varying 4x, {LATENCY_MS:g} ms, {ITEMS_PER_S:g} items/s", table)


def plot(axes: Any, rows: list[Row], items: int) -> None:
    """Items fetched per epoch against the cache's share of the dataset."""
    for name, label in (("shuffled, LRU", "LRU"), ("shuffled", "by the plan"), ("endless", "by the plan, with replacement")):
        points = [(row.cache_share, row.value / items) for row in rows if row.name == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.plot([0, 1], [1, 0], "k--", linewidth=1, label="lower bound, shuffled")
    axes.set(
        xlabel="cache holds, share of the dataset", ylabel="fetched each later epoch, share of the dataset", ylim=(0, 1.05)
    )
    axes.legend()


if __name__ == "__main__":
    sys.exit(main())
