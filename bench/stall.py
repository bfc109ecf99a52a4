"""How much a consumer that is slower than the link waits for data, and how soon a new job gets its first batch.

    python bench/stall.py [--json] [--quick] [--runs N] [--plot FILE.png]

Items are a 512x512 JPEG of about 100 KB and a PNG label behind 30 ms of latency (nginx, else our own server).

Share waited: a consumer that takes 250 ms for a batch of 32 reads the first epoch through a daemon that has just started,
with 2 workers; beside it the same from local files. The share is the time within `next()` from the second batch on, over the
total time from then on. It includes torch's time to hand over a batch, about 1 ms, which local files show.

First batch: of 8 items that are not cached. The daemon has its manifest and is either at rest, its small cache full of other
items, or busy filling an empty one. The clock runs from `iter()` of a PlannedDataLoader without workers, which sends the plan,
to its first batch. Decoding time is subtracted: it is measured by reading the same items again from the cache. In round trips.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from comparison import Row, Target, apart, arguments, finish
from fast_origin import has_nginx
from gcs_dataset import get_local_dataloaders
from gcs_prefetchd.shared.daemon_client import DaemonClient
from pictures import make_pictures
from readers import BATCH, cached, origin, widths
from rig import daemon

LATENCY_MS = 30.0
DISTINCT, NAMES_EACH = 300, 10
CACHE_BYTES, SMALL_CACHE_BYTES = 2_000_000_000, 20_000_000  # of 300 MB
WORKERS = 2
LARGE_BATCH, LARGE_BATCH_S = 32, 0.25
BATCHES = 12


@dataclass(frozen=True, slots=True)
class Place:
    """The paths of a run."""

    url: str
    local: Path
    scratch: Path


@contextmanager
def started(place: Place, cache_bytes: int) -> Iterator[tuple[DaemonClient, Path]]:
    """A daemon that has just started, and its cache directory."""
    with tempfile.TemporaryDirectory(dir=place.scratch) as folder:
        cache_dir = Path(folder, "cache")
        with daemon(cache_dir, place.url, cache_bytes) as client:
            yield client, cache_dir


def waited_share(loader: Iterable[Any]) -> float:
    """The share of its time, after the first batch, that the consumer waited."""
    iterator = iter(loader)
    next(iterator)
    started_s, waited_s = time.perf_counter(), 0.0
    for _ in range(BATCHES):
        time.sleep(LARGE_BATCH_S)
        requested_s = time.perf_counter()
        next(iterator)
        waited_s += time.perf_counter() - requested_s
    return waited_s / (time.perf_counter() - started_s)


def ours_waited(place: Place) -> float:
    """The share of waiting through the daemon."""
    with started(place, CACHE_BYTES) as (_, cache_dir):
        return waited_share(cached(cache_dir, WORKERS, LARGE_BATCH))


def local_waited(place: Place) -> float:
    """The share of waiting with local files."""
    loader = get_local_dataloaders(place.local, LARGE_BATCH, widths, test_ratio=0.0, num_workers=WORKERS)["train"]
    return waited_share(loader)


def first_batch(place: Place, cache_bytes: int) -> tuple[float, float]:
    """Seconds to the first batch, and the decoding part of them; if `small`, the cache is full and the daemon at rest."""
    with started(place, cache_bytes) as (client, cache_dir):
        while cache_bytes == SMALL_CACHE_BYTES and not _is_at_rest(client):
            time.sleep(0.05)
        loader = cached(cache_dir, 0)
        first = loader.sampler.order(0)[:BATCH].tolist()
        started_s = time.perf_counter()
        next(iter(loader))
        took_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        for index in first:
            loader.dataset[index]
        return took_s, time.perf_counter() - started_s


def _is_at_rest(client: DaemonClient) -> bool:
    stats = client.stats()
    return bool(stats["cache"]["objects"] and not stats["origin"]["in_flight"] + stats["cache"]["reserved_bytes"])


def rows_of(place: Place, runs: int) -> Iterator[Row]:
    """Both comparisons."""
    ways: tuple[Callable[[], float], ...] = (partial(ours_waited, place), partial(local_waited, place))
    shares = [[apart(way) for way in ways] for _ in range(runs)]
    ours, local = (100 * statistics.median(side) for side in zip(*shares, strict=True))
    setting = f"{LARGE_BATCH_S * 1000:g} ms per batch"
    yield Row("share waited", setting, ours, "local files", local, "%", Target(1.0, is_most=True, of_ours=True))
    for setting, cache_bytes in (("daemon at rest", SMALL_CACHE_BYTES), ("daemon filling", CACHE_BYTES)):
        firsts = [apart(partial(first_batch, place, cache_bytes)) for _ in range(runs)]
        first_ms = 1000 * statistics.median(took_s - decode_s for took_s, decode_s in firsts)
        raw_ms, decode_ms = (1000 * statistics.median(side) for side in zip(*firsts, strict=True))
        note = f"{raw_ms:.0f} ms with {decode_ms:.0f} ms of decode"
        yield Row("first batch", setting, first_ms, "round trip", LATENCY_MS, "ms", Target(5.0, is_most=True), note)


def main() -> int:
    """The command."""
    options = arguments(__doc__, "once")
    runs = 1 if options.quick else options.runs
    with tempfile.TemporaryDirectory(prefix="gcs-prefetchd-bench-") as folder:
        scratch = Path(folder)
        local = make_pictures(scratch / "data", DISTINCT, NAMES_EACH)
        with origin(scratch, scratch / "data", LATENCY_MS) as url:
            rows = list(rows_of(Place(url, local, scratch), runs))
    server = "nginx" if has_nginx() else "our own server"
    return finish(f"Waiting in a first epoch, {LATENCY_MS:g} ms, {server}", rows, options)


if __name__ == "__main__":
    sys.exit(main())
