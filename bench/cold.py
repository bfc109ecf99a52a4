"""How fast the first epoch runs from an empty cache, beside local files and other readers of the same bucket.

    python bench/cold.py [--json] [--quick] [--runs N] [--plot FILE.png]

Items are a 512x512 JPEG of about 100 KB and a PNG label, behind 30 ms of latency (nginx, else our own server), in batches of
8 with 0, 2 and 8 workers. The timed span is the same for all: from `next(iter(loader))`,
which starts the workers, to the last item. Each run has its own process; imports, listings and construction of the loader
happen before. Ours starts with a daemon that was started just before over an empty directory. It has already started to fill
it, in an order that is not the job's: `head start` is the share of items that were cached at the start. All items are read:
a part would not be representative of ours, which fetches ahead. "decoded" sends one number per pair of images to the main
process, so that reading and decoding are timed; "without decode" sends the length of the bytes.

Slow readers read fewer items, as the table shows; their rate does not depend on it. gcsfs and obstore are compared where
`pip install gcsfs obstore` has been run, an rclone mount where Debian's `rclone fuse3` are installed.
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, SubsetRandomSampler

from comparison import Row, Target, apart, arguments, finish
from fast_origin import has_nginx
from gcs_dataset import ImageDataset, PlannedDataLoader, get_local_dataloaders
from pictures import make_pictures
from readers import BATCH, cached, cached_bytes, length, origin, widths
from rig import BUCKET, DATA_ROOT, daemon
from rivals import RIVALS, Rival
from seeds import AsyncSeed, sync_seed_loader

LATENCY_MS = 30.0
WORKERS = (0, 2, 8)
DISTINCT, NAMES_EACH = 188, 8
ITEMS = DISTINCT * NAMES_EACH
SLOW_ITEMS = {0: 8, 2: 16, 8: 64}
CACHE_BYTES = 2_000_000_000
OURS, OUR_BYTES, LOCAL, SYNC, ASYNC = "ours", "ours, bytes", "local files", "sync seed", "async seed, bytes"


@dataclass(frozen=True, slots=True)
class Place:
    """The paths and the number of workers of a run."""

    url: str
    local: Path
    scratch: Path
    workers: int

    @property
    def items(self) -> list[str]:
        """The ids of the dataset."""
        return [f"{number:06}" for number in range(ITEMS)]


@dataclass(frozen=True, slots=True)
class Run:
    """The measurements of one run."""

    items: int
    seconds: float
    head_start: float = 0.0  # share of the items that were cached at the start

    @property
    def per_s(self) -> float:
        """Items a second."""
        return self.items / self.seconds


def timed(loader: Iterable[Any], items: int) -> float:
    """Seconds from the start of the iteration to the batch that completes this many items."""
    started_s = time.perf_counter()
    batches = iter(loader)
    for _ in range(items // BATCH):
        next(batches)
    return time.perf_counter() - started_s


def run_ours(make: Callable[[Path, int], PlannedDataLoader], place: Place) -> Run:
    """Through a daemon that has just started; raises RuntimeError if a read bypassed it."""
    with tempfile.TemporaryDirectory(dir=place.scratch) as folder:
        cache_dir = Path(folder, "cache")
        with daemon(cache_dir, place.url, CACHE_BYTES) as client:
            loader = make(cache_dir, place.workers)
            images = cache_dir / "objects" / BUCKET / "items" / "images"
            here = [(images / f"{item:06}.jpg").exists() for item in loader.sampler.order(0)[:ITEMS].tolist()]
            run = Run(ITEMS, timed(loader, ITEMS), sum(here) / ITEMS)
            if fallbacks := client.stats()["reads"]["fallbacks"]:
                raise RuntimeError(f"{fallbacks} reads bypassed the daemon")
            return run


def run_local(place: Place) -> Run:
    """The same DataLoader over a folder."""
    loader = get_local_dataloaders(place.local, BATCH, widths, test_ratio=0.0, num_workers=place.workers)["train"]
    return Run(ITEMS, timed(loader, ITEMS))


def run_sync_seed(place: Place) -> Run:
    """The sync seed: a client and a bucket per image."""
    return _run_slow(sync_seed_loader, place)


def run_async_seed(place: Place) -> Run:
    """The async seed: 128 items in flight per worker, in random order, delivered as they arrive, not decoded."""
    dataset = AsyncSeed(place.url, DATA_ROOT, place.items, length)
    return Run(ITEMS, timed(DataLoader(dataset, BATCH, num_workers=place.workers), ITEMS))


def run_rival(rival: Rival, place: Place) -> Run:
    """The alternatives that users would choose."""
    with rival.open(place.url, place.scratch) as loader:
        return _run_slow(loader, place)


def _run_slow(loader: Callable[..., Any], place: Place) -> Run:
    dataset = ImageDataset(DATA_ROOT, place.items, loader, widths)
    items = SLOW_ITEMS[place.workers]
    sampler = SubsetRandomSampler(range(items))  # no more: workers finish what they were given before they stop
    return Run(items, timed(DataLoader(dataset, BATCH, sampler=sampler, num_workers=place.workers), items))


WAYS: dict[str, Callable[[Place], Run]] = {
    OURS: partial(run_ours, cached),
    LOCAL: run_local,
    SYNC: run_sync_seed,
    OUR_BYTES: partial(run_ours, cached_bytes),
    ASYNC: run_async_seed,
    **{rival.name: partial(run_rival, rival) for rival in RIVALS if rival.is_installed},
}


def measure(place: Place, runs: int) -> dict[str, list[Run]]:
    """All readers in turn, several times."""
    measured: dict[str, list[Run]] = {name: [] for name in WAYS}
    for number in range(runs):
        for name, way in WAYS.items():
            measured[name].append(apart(partial(way, place)))
        print(f"{place.workers} workers: run {number + 1} of {runs} done", file=sys.stderr)
    return measured


def rows_of(workers: int, measured: dict[str, list[Run]]) -> Iterator[Row]:
    """The comparisons for one number of workers."""
    per_s = {name: statistics.median(run.per_s for run in runs) for name, runs in measured.items()}

    def row(what: str, ours: str, reference: str, target: Target | None = None) -> Row:
        head_start = statistics.median(run.head_start for run in measured[ours])
        note = f"head start {head_start:.1%}"
        if reference in measured and (items := measured[reference][0].items) != ITEMS:
            note += f", reference {items} items"
        return Row(what, f"{workers} workers", per_s[ours], reference, per_s.get(reference), "items/s", target, note)

    yield row("decoded", OURS, LOCAL, Target(0.85))
    yield row("decoded", OURS, SYNC, Target(5.0))
    for rival in RIVALS:
        yield row("decoded", OURS, rival.name)
    yield row("without decode", OUR_BYTES, ASYNC, Target(1.0))


def draw(axes: Any, rows: list[Row]) -> None:
    """Items per second of each reader, grouped by workers."""
    rates: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, per_s in ((f"ours, {row.what}", row.ours), (row.reference, row.value)):
            if per_s is not None:
                rates.setdefault(name, {})[row.setting] = per_s
    settings = list(dict.fromkeys(row.setting for row in rows))
    width = 0.8 / len(rates)
    for number, (name, by_setting) in enumerate(rates.items()):
        places = [place + (number - (len(rates) - 1) / 2) * width for place in range(len(settings))]
        axes.bar(places, [by_setting[setting] for setting in settings], width, label=name)
    axes.set(yscale="log", ylabel="items/s")
    axes.set_xticks(range(len(settings)), settings)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def main() -> int:
    """The command."""
    options = arguments(__doc__, "2 workers, once")
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # 8 workers on two cores are intended
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="gcs-prefetchd-bench-") as folder:
        scratch = Path(folder)
        local = make_pictures(scratch / "data", DISTINCT, NAMES_EACH)
        with origin(scratch, scratch / "data", LATENCY_MS) as url:
            for workers in (2,) if options.quick else WORKERS:
                rows += rows_of(workers, measure(Place(url, local, scratch, workers), 1 if options.quick else options.runs))
    title = f"First epoch, {ITEMS} items, {LATENCY_MS:g} ms, {'nginx' if has_nginx() else 'our own server'}"
    return finish(title, rows, options, partial(draw, rows=rows))


if __name__ == "__main__":
    sys.exit(main())
