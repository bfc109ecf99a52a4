"""How soon a killed daemon serves a large cache again, and with how much memory.

    python bench/restart.py [--objects 1000000] [--digits 7] [--folder DIR] [--json] [--plot FILE.png]

The cache is written as the daemon would have left it: stamped files, an index and a listing, in a temporary folder; half of
the objects are images, half are their labels. A daemon opens it, is killed with SIGKILL, and is started again; GCS is
unreachable throughout. `--digits` is the length of the ids.
"""

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from comparison import command_line
from figures import Figure, finish
from gcs_dataset.cached_loader import CachedLoader
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.disk_index import DiskIndex, IndexRecord
from gcs_prefetchd.service.daemonize import wait_for_exit
from gcs_prefetchd.shared.checked_read import Stamp, crc32c_of, write_stamp
from gcs_prefetchd.shared.daemon_client import DaemonClient, read_daemon_file
from gcs_prefetchd.shared.epoch_order import order_digest, plan_order
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, ManifestBuilder, ObjectColumns
from gcs_prefetchd.shared.messages import Plan, pack_indices
from gcs_prefetchd.shared.objects import DataRoot
from gcs_prefetchd.shared.paths import cache_path
from rig import PROGRAM

ROOT = DataRoot("bench", "train")
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
GENERATION = 1_795_251_185_968_152
AT_ONCE = 5000
DEADLINE_S = 240.0
FIRST_HIT_S, COMPLETE_S, RESIDENT_MB = 1.0, 60.0, 200.0


def image_bytes(kind: str, mode: str) -> bytes:
    """A very small image."""
    encoded = io.BytesIO()
    Image.new(mode, (8, 8)).save(encoded, kind)
    return encoded.getvalue()


def make_cache(path: Path, pairs: int, digits: int) -> Manifest:
    """A cache directory that holds this many pairs, as if a daemon had fetched them and been killed."""
    directory = CacheDirectory(path)
    directory.claim()
    manifest = _listing(pairs, digits)
    manifest.save(directory.manifests)
    index = DiskIndex(directory.index)
    for part, data in enumerate((image_bytes("JPEG", "RGB"), image_bytes("PNG", "L"))):
        (directory.objects / _path(manifest, 0, part)).parent.mkdir(parents=True)
        for start in range(0, pairs, AT_ONCE):
            records = {}
            for item in range(start, min(start + AT_ONCE, pairs)):
                where, stamp = _path(manifest, item, part), Stamp(GENERATION, len(data), crc32c_of(data))
                with (directory.objects / where).open("wb", buffering=0) as file:
                    file.write(data)
                    write_stamp(file.fileno(), stamp, where)
                records[where] = IndexRecord(stamp, GENERATION / 1e6 + (item * 7919) % pairs)  # used in another order
            index.apply(records)
    index.close()
    directory.close()
    return manifest


def _listing(pairs: int, digits: int) -> Manifest:
    item_patterns, sizes = ItemPatterns(), [len(image_bytes("JPEG", "RGB")), len(image_bytes("PNG", "L"))]
    crcs = [crc32c_of(image_bytes("JPEG", "RGB")), crc32c_of(image_bytes("PNG", "L"))]
    listing = ManifestBuilder(ROOT, item_patterns)
    for part in range(len(item_patterns.patterns)):
        for start in range(0, pairs, AT_ONCE):
            names = [
                ROOT.folder + item_patterns.part_name(f"{i:0{digits}}", part) for i in range(start, min(start + AT_ONCE, pairs))
            ]
            columns = (np.full(len(names), value, dtype=np.int64) for value in (GENERATION, sizes[part], crcs[part]))
            listing.add(ObjectColumns(names, *columns))
    return listing.build()


def _path(manifest: Manifest, item: int, part: int) -> str:
    name = manifest.part_name(item, part)
    return cache_path(name.bucket, name.name)


@contextmanager
def killed(cache_dir: Path) -> Iterator[int]:
    """A daemon over the cache, started with the command line and killed at the end; yields its process id."""
    arguments = ["--data-root", ROOT.uri, "--cache-dir", str(cache_dir), "--cache-size", "10GB", "--anonymous"]
    arguments += ["--endpoint", NOWHERE, "--http", "127.0.0.1:0", "--set", "min_free=0"]
    subprocess.run([*PROGRAM, "start", *arguments], check=True, stdout=subprocess.DEVNULL)
    pid = int(str(read_daemon_file(cache_dir)["pid"]))
    with wait_for_exit(pid) as wait:
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGKILL)
            wait()


def until_ready(client: DaemonClient, objects: int) -> float:
    """Wait until the daemon knows every object; returns its longest response time meanwhile, in seconds."""
    longest_s, started_s = 0.0, time.perf_counter()
    while True:
        requested_s = time.perf_counter()
        cache = client.stats()["cache"]
        longest_s = max(longest_s, time.perf_counter() - requested_s)
        if cache["ready"]:
            assert cache["objects"] == objects, cache
            return longest_s
        _give_up_after(started_s)
        time.sleep(0.01)


def _give_up_after(started_s: float) -> None:
    if time.perf_counter() - started_s > DEADLINE_S:
        raise TimeoutError(f"not done after {DEADLINE_S:g} s")


def memory_mb(pid: int, field: str) -> float:
    """VmRSS (current) or VmHWM (peak since its start) of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024 / 1e6


def hit_s(cache_dir: Path, manifest: Manifest, item: int) -> float:
    """Seconds from a reader's start to its first item, which is cached."""
    started_s = time.perf_counter()
    loader = CachedLoader(cache_dir, demand_timeout_s=60.0, manifest=manifest)
    with closing(loader):
        loader.load_item(item, [manifest.part_name(item, part).uri for part in range(2)], ["RGB", "L"])
    return time.perf_counter() - started_s


def demand_s(client: DaemonClient, manifest: Manifest, item: int) -> float:
    """Seconds that the daemon takes to serve a demand for a cached item."""
    started_s = time.perf_counter()
    errors = client.fetch([manifest.part_name(item, part).uri for part in range(2)])
    assert not any(errors), errors
    return time.perf_counter() - started_s


def plan_s(client: DaemonClient, manifest: Manifest) -> float:
    """Seconds until the daemon knows that all items of a plan are cached."""
    indices = np.arange(len(manifest), dtype=np.uint32)
    order = plan_order("shuffled", 1, 0, indices)
    plan = Plan(
        job="restart", stream="restart", data_root=ROOT.uri, manifest=manifest.digest, kind="shuffled", seed=1, epoch=0,
        position=0, rank=0, world=1, drop_last=0, start=0, digest=order_digest(order),
    )  # fmt: skip
    started_s = time.perf_counter()
    client.send_plan(plan, pack_indices(indices.tolist()))
    while any(stream["missing_at_epoch_start"] for stream in client.stats()["streams"]):
        _give_up_after(started_s)
        time.sleep(0.05)
    return time.perf_counter() - started_s


def measured(cache_dir: Path, manifest: Manifest) -> list[Figure]:
    """Start, kill, start again; measure the times and the memory of the second start."""
    objects = 2 * len(manifest)
    with killed(cache_dir), closing(DaemonClient(cache_dir)) as client:
        until_ready(client, objects)
    started_s = time.perf_counter()
    rows = [Figure("first hit of a reader, no daemon yet", hit_s(cache_dir, manifest, len(manifest) // 2), "s", FIRST_HIT_S)]
    with killed(cache_dir) as pid, closing(DaemonClient(cache_dir, timeout_s=120.0)) as client:
        rows.append(Figure("start has returned: the daemon is ready", time.perf_counter() - started_s, "s"))
        response_s = demand_s(client, manifest, len(manifest) // 3)
        rows.append(Figure("first demand served by the daemon", time.perf_counter() - started_s, "s", FIRST_HIT_S))
        rows.append(Figure("of that the daemon took", response_s, "s"))
        rows.append(Figure("its longest response during recovery", until_ready(client, objects), "s"))
        rows.append(Figure("every object known and compared", time.perf_counter() - started_s, "s", COMPLETE_S))
        rows.append(Figure("RSS with the full index", memory_mb(pid, "VmRSS"), "MB", RESIDENT_MB))
        rows.append(Figure("plan of every item known to be cached", plan_s(client, manifest), "s"))
        rows.append(Figure("RSS with a plan of every item", memory_mb(pid, "VmRSS"), "MB", RESIDENT_MB))
        rows.append(Figure("RSS at most", memory_mb(pid, "VmHWM"), "MB"))
    return rows


def main() -> int:
    """Write the cache, measure, and print."""
    parser = command_line(__doc__)
    parser.add_argument("--objects", type=int, default=1_000_000, help="how many (default 1,000,000)")
    parser.add_argument("--digits", type=int, default=7, help="length of an item's id (default 7)")
    parser.add_argument("--folder", type=Path, help="where to write the cache; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        manifest = make_cache(Path(folder) / "cache", options.objects // 2, options.digits)
        figures = measured(Path(folder) / "cache", manifest)
        # Shown before all is removed, which takes minutes for a million files.
        return finish(f"A killed daemon started again, {options.objects:,} objects", figures, options)


if __name__ == "__main__":
    sys.exit(main())
