"""How long reading a cached item takes, verified, beside plain reads of the same files from a folder.

    python bench/warm.py [--json] [--quick] [--runs N] [--plot FILE.png]

One process, items of a 512x512 JPEG of about 100 KB and a PNG label, all of them in the cache, the daemon running. With a
hot page cache both sides take turns every 20 items, so that other load on the machine hits both: "decoded" is an
ImageDataset's item with CachedLoader and with pil_loader, "without decode" the verified bytes and `open().read()`. With the
page cache dropped before every run (all of it if /proc/sys/vm/drop_caches is writable, else these files by posix_fadvise; the
title says which) both are DataLoaders without workers, ours with its plan sent to the daemon; their rates
count from the first batch on.

Rows "opens watched" have the daemon's setting watch_opens on: then every hit also costs the daemon CPU.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader

from comparison import Row, Target, apart, arguments, finish
from gcs_dataset import CachedLoader, ImageDataset, get_local_dataloaders, get_manifest, pil_loader
from gcs_prefetchd.shared.malloc import keep_freed_memory
from pictures import make_pictures
from readers import BATCH, PlainBytes, StoredBytes, cached, cached_bytes, origin, widths
from rig import DATA_ROOT, daemon

ITEMS = 200
TURN_ITEMS = 20
PASSES = 2  # over all items, in each run with the page cache hot
CACHE_BYTES = 1_000_000_000
DROP = Path("/proc/sys/vm/drop_caches")
Ways = tuple[Callable[[int], object], Callable[[int], object]]


def ways_to_decode(cache_dir: Path, local: Path) -> Ways:
    """An item, cached and local."""
    manifest = get_manifest(DATA_ROOT, cache_dir)
    ours = ImageDataset(DATA_ROOT, manifest.ids, CachedLoader(cache_dir, manifest=manifest), widths)
    return ours.__getitem__, ImageDataset(local, manifest.ids, pil_loader, widths).__getitem__


def ways_to_read(cache_dir: Path, local: Path) -> Ways:
    """An item's bytes, cached and local."""
    manifest = get_manifest(DATA_ROOT, cache_dir)
    return StoredBytes(cache_dir, manifest, "warm").read, PlainBytes(local).read


def item_us(ways: Callable[[Path, Path], Ways], cache_dir: Path, local: Path) -> tuple[float, float]:
    """Microseconds per item, ours and local: medians over turns of `TURN_ITEMS`."""
    keep_freed_memory()  # as worker_init_fn does
    both = ways(cache_dir, local)
    turns: tuple[list[float], list[float]] = ([], [])
    for one in both:
        for index in range(ITEMS):
            one(index)
    for first in list(range(0, ITEMS, TURN_ITEMS)) * PASSES:
        for one, took_us in zip(both, turns, strict=True):
            started_s = time.perf_counter()
            for index in range(first, first + TURN_ITEMS):
                one(index)
            took_us.append((time.perf_counter() - started_s) / TURN_ITEMS * 1e6)
    return statistics.median(turns[0]), statistics.median(turns[1])


def epoch_s(make: Callable[[Path], Iterable[object]], folder: Path) -> float:
    """Seconds of one epoch after its first batch, the page cache dropped just before it."""
    loader = make(folder)
    drop_page_cache(folder)
    batches = iter(loader)
    next(batches)
    started_s = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - started_s


def local_decoded(folder: Path) -> Iterable[object]:
    """The DataLoader over a folder."""
    return get_local_dataloaders(folder, BATCH, widths, test_ratio=0.0, num_workers=0)["train"]


def local_bytes(folder: Path) -> Iterable[object]:
    """The same without the decoding."""
    return DataLoader(PlainBytes(folder), BATCH, shuffle=True)


def drop_page_cache(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    if os.access(DROP, os.W_OK):
        os.sync()  # dirty pages stay
        DROP.write_text("3")
        return
    for path in folder.rglob("*"):
        if path.is_file() and os.access(path, os.R_OK):
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def hot_rows(setting: str, cache_dir: Path, local: Path, runs: int, *, targets: bool = True) -> Iterator[Row]:
    """With the page cache hot: microseconds per item."""
    for what, ways, most in (("decoded", ways_to_decode, 1.03), ("without decode", ways_to_read, 1.5)):
        took_us = [apart(partial(item_us, ways, cache_dir, local)) for _ in range(runs)]
        ours, plain = (statistics.median(side) for side in zip(*took_us, strict=True))
        target = Target(most, is_most=True) if targets else None
        yield Row(what, setting, ours, "plain local files", plain, "us/item", target)


def dropped_rows(cache_dir: Path, local: Path, runs: int) -> Iterator[Row]:
    """With the page cache dropped: items per second."""
    for what, make, make_local in (
        ("decoded", partial(cached, workers=0), local_decoded),
        ("without decode", partial(cached_bytes, workers=0), local_bytes),
    ):
        ways = (partial(epoch_s, make, cache_dir), partial(epoch_s, make_local, local))
        took_s = [[apart(way) for way in ways] for _ in range(runs)]
        ours, plain = ((ITEMS - BATCH) / statistics.median(side) for side in zip(*took_s, strict=True))
        yield Row(what, "page cache dropped", ours, "plain local files", plain, "items/s", Target(1.2))


@contextmanager
def full_daemon(cache_dir: Path, url: str, **settings: object) -> Iterator[None]:
    """A daemon whose cache holds everything; raises RuntimeError if a read missed."""
    with daemon(cache_dir, url, CACHE_BYTES, **settings) as client:
        while client.stats()["cache"]["objects"] < 2 * ITEMS:
            time.sleep(0.05)
        yield
        reads = client.stats()["reads"]
        if reads["misses"] + reads["fallbacks"]:
            raise RuntimeError(f"not all reads were hits: {reads}")


def main() -> int:
    """The command."""
    options = arguments(__doc__, "once")
    runs = 1 if options.quick else options.runs
    with tempfile.TemporaryDirectory(prefix="gcs-prefetchd-bench-") as folder:
        scratch, cache_dir = Path(folder), Path(folder, "cache")
        local = make_pictures(scratch / "data", ITEMS)
        with origin(scratch, scratch / "data", 0) as url:
            with full_daemon(cache_dir, url, watch_opens="true"):
                watched = list(hot_rows("hot, opens watched", cache_dir, local, runs, targets=False))
            # Dropped last: files read back from disk are laid out differently in the page cache than files just written.
            with full_daemon(cache_dir, url):
                rows = [*hot_rows("page cache hot", cache_dir, local, runs), *watched, *dropped_rows(cache_dir, local, runs)]
    how = "drop_caches" if os.access(DROP, os.W_OK) else "posix_fadvise"
    return finish(f"Later epochs, {ITEMS} items, one process, page cache dropped by {how}", rows, options)


if __name__ == "__main__":
    sys.exit(main())
