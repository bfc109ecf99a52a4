"""How long listing a data root takes: one page after another, and as the daemon does it.

    python bench/listing.py [--pairs 1000000] [--latency-ms 30] [--runs 3] [--json] [--plot FILE.png]

The reference requests one page after another from gcloud-aio-storage and keeps nothing. Ours ends with the manifest. The
reference is run once, because it takes longest; ours is the median of the runs.
"""

import asyncio
import gc
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop
from gcloud.aio.storage import Storage

from comparison import Row, Target, command_line, finish
from fast_origin import computed_origin, has_nginx
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.credentials import Access
from gcs_prefetchd.gcs.list_pages import FIELDS
from gcs_prefetchd.service.manifest_store import list_manifest
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, load_manifest
from gcs_prefetchd.shared.objects import DataRoot

ROOT = DataRoot("bench", "train")
TARGET = 0.2  # share of the time that one page after another takes


@dataclass(frozen=True, slots=True)
class Listed:
    """One way of listing."""

    what: str
    seconds: float
    cpu_s: float
    requests: int
    longest_pause_ms: float  # of the event loop


async def one_page_after_another(endpoint: str) -> int:
    """The bare loop; returns its requests."""
    requests = 0
    async with aiohttp.ClientSession() as session:
        storage = Storage(session=session, api_root=endpoint, api_is_dev=True)  # type: ignore[arg-type]  # as in gcs/client.py
        for folder in ItemPatterns().folders():
            token = ""
            while True:
                params = {"prefix": ROOT.folder + folder, "fields": FIELDS} | ({"pageToken": token} if token else {})
                page = await storage.list_objects(ROOT.bucket, params=params)
                requests += 1
                token = page.get("nextPageToken", "")
                if not token:
                    break
    return requests


async def as_the_daemon(endpoint: str) -> tuple[int, Manifest]:
    """Ours; returns its requests and the manifest."""
    async with GCSClient(Access(endpoint, anonymous=True)) as origin:
        manifest = await list_manifest(origin, ROOT, ItemPatterns())
        return origin.counters.requests, manifest


async def measured(what: str, listing: Callable[[], Awaitable[int]]) -> Listed:
    """Run and time it."""
    pauses = asyncio.create_task(_longest_pause_s())
    started_s, cpu_s = time.perf_counter(), time.process_time()
    requests = await listing()
    seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    pauses.cancel()
    return Listed(what, seconds, cpu_s, requests, await pauses * 1000)


async def _longest_pause_s() -> float:
    longest_s, tick_s = 0.0, 0.001
    while True:
        before_s = time.perf_counter()
        try:
            await asyncio.sleep(tick_s)
        except asyncio.CancelledError:
            return longest_s
        longest_s = max(longest_s, time.perf_counter() - before_s - tick_s)


async def compare(endpoint: str, runs: int) -> tuple[Listed, Listed, Manifest]:
    """The reference, ours (of several runs that of the median time) and the manifest."""
    manifests: list[Manifest] = []

    async def ours() -> int:
        manifests.clear()
        requests, manifest = await as_the_daemon(endpoint)
        manifests.append(manifest)
        return requests

    rows = [await measured("in ranges, to the manifest (ours)", ours) for _ in range(runs)]
    reference = await measured("one page after another", lambda: one_page_after_another(endpoint))
    return reference, sorted(rows, key=lambda row: row.seconds)[len(rows) // 2], manifests[0]


def saved_and_loaded(manifest: Manifest, folder: Path, runs: int) -> dict[str, float]:
    """Seconds to write the manifest, and the median to map it and compare its digest."""
    started_s = time.perf_counter()
    saved = manifest.save(folder)
    times = {"save": time.perf_counter() - started_s}
    loads = []
    for _ in range(runs):
        started_s = time.perf_counter()
        load_manifest(saved)
        loads.append(time.perf_counter() - started_s)
    return times | {"load": statistics.median(loads)}


def rows_of(setting: str, reference: Listed, ours: Listed) -> list[Row]:
    """The comparison: only the time has a target."""
    name = reference.what
    return [
        Row("listed in", setting, ours.seconds, name, reference.seconds, "s", Target(TARGET, is_most=True)),
        Row("CPU", setting, ours.cpu_s, name, reference.cpu_s, "s"),
        Row("requests", setting, ours.requests, name, reference.requests, ""),
        Row("event loop's longest pause", setting, ours.longest_pause_ms, name, reference.longest_pause_ms, "ms"),
    ]


def main() -> int:
    """The command."""
    parser = command_line(__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="how many (default 1,000,000)")
    parser.add_argument("--latency-ms", type=float, default=30.0, help="of each page (default 30)")
    parser.add_argument("--runs", type=int, default=3, help="number of runs for the medians (default 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        gc.freeze()  # as the daemon does
        with (
            computed_origin(run, options.pairs, options.latency_ms) as endpoint,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop,
        ):
            reference, ours, manifest = loop.run(compare(endpoint, options.runs))
        assert len(manifest) == options.pairs
        times = saved_and_loaded(manifest, run / "manifests", max(3, options.runs))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    server = "nginx" if has_nginx() else "our own server"
    rows = rows_of(f"{options.pairs:,} pairs, {options.latency_ms:g} ms", reference, ours)
    manifest_s = ", ".join(f"{what} {seconds:.3f} s" for what, seconds in times.items())
    return finish(f"Listing, {server}; the manifest: {manifest_s}; memory at most {peak_mb:,} MB", rows, options)


if __name__ == "__main__":
    sys.exit(main())
