"""How long a data root takes to be listed: one page after another, and as the daemon lists it.

    listing.py [--pairs 1000000] [--latency-ms 30] [--runs 3] [--json]

The reference asks gcloud-aio-storage for a page after the other and keeps nothing. Ours ends with the manifest. The reference
is run once, for it takes longest; ours is the median of the runs.
"""

import argparse
import asyncio
import gc
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import uvloop
from gcloud.aio.storage import Storage
from rich.console import Console
from rich.table import Table

from fast_origin import computed_origin, has_nginx
from gcs_prefetchd.credentials import Access
from gcs_prefetchd.listing import list_manifest
from gcs_prefetchd.manifest import Layout, Manifest, load_manifest
from gcs_prefetchd.names import DataRoot
from gcs_prefetchd.origin import Origin
from gcs_prefetchd.pages import FIELDS

ROOT = DataRoot("bench", "train")
TARGET = 0.2  # of the time that one page after another takes


@dataclass(frozen=True, slots=True)
class Row:
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
        storage = Storage(session=session, api_root=endpoint, api_is_dev=True)  # type: ignore[arg-type]  # as in origin.py
        for folder in Layout().folders():
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
    async with Origin(Access(endpoint, anonymous=True)) as origin:
        manifest = await list_manifest(origin, ROOT, Layout())
        return origin.traffic.requests, manifest


async def measured(what: str, listing: Callable[[], Awaitable[int]]) -> Row:
    """Run it and take its times."""
    pauses = asyncio.create_task(_longest_pause_s())
    started_s, cpu_s = time.perf_counter(), time.process_time()
    requests = await listing()
    seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    pauses.cancel()
    return Row(what, seconds, cpu_s, requests, await pauses * 1000)


async def _longest_pause_s() -> float:
    longest_s, tick_s = 0.0, 0.001
    while True:
        before_s = time.perf_counter()
        try:
            await asyncio.sleep(tick_s)
        except asyncio.CancelledError:
            return longest_s
        longest_s = max(longest_s, time.perf_counter() - before_s - tick_s)


async def compare(endpoint: str, runs: int) -> tuple[Row, Row, Manifest]:
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
    """Seconds to write it, and the median to map it with its digest compared."""
    started_s = time.perf_counter()
    saved = manifest.save(folder)
    times = {"save": time.perf_counter() - started_s}
    loads = []
    for _ in range(runs):
        started_s = time.perf_counter()
        load_manifest(saved)
        loads.append(time.perf_counter() - started_s)
    return times | {"load": statistics.median(loads)}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        gc.freeze()  # as the daemon does
        with (
            computed_origin(run, args.pairs, args.latency_ms) as endpoint,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop,
        ):
            reference, ours, manifest = loop.run(compare(endpoint, args.runs))
        assert len(manifest) == args.pairs
        times = saved_and_loaded(manifest, run / "manifests", max(3, args.runs))
    ratio = ours.seconds / reference.seconds
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if args.json:
        about = {
            "pairs": args.pairs,
            "latency_ms": args.latency_ms,
            "runs": args.runs,
            "nginx": has_nginx(),
            "peak_mb": peak_mb,
        }
        print(
            json.dumps(
                {**about, "rows": [asdict(reference), asdict(ours)], "ratio": ratio, "target": TARGET, "manifest_s": times}
            )
        )
        return
    table = Table(title=f"{args.pairs:,} pairs at {args.latency_ms:g} ms, {'nginx' if has_nginx() else 'our own server'}")
    for heading in ("", "seconds", "requests", "CPU seconds", "loop's longest pause, ms", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in (reference, ours):
        figures = (f"{row.seconds:.2f}", f"{row.requests:,}", f"{row.cpu_s:.2f}", f"{row.longest_pause_ms:.0f}")
        table.add_row(row.what, *figures, "1" if row is reference else f"{ratio:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"target {TARGET:g}; manifest: "
        + ", ".join(f"{what} {s:.3f} s" for what, s in times.items())
        + f"; peak {peak_mb:,} MB"
    )


if __name__ == "__main__":
    main()
