"""The benchmarks' parts: a counting server in its own process, a daemon started by command line, a paced reader."""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.epoch_order import Indices, order_digest, plan_order
from gcs_prefetchd.shared.manifest import Manifest, load_manifest
from gcs_prefetchd.shared.messages import Plan, ReadReport, pack_indices
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["BUCKET", "DATA_ROOT", "Reader", "daemon", "get_json", "make_objects", "media_gets", "server", "together"]

BUCKET = "bench"
DATA_ROOT = f"gs://{BUCKET}/items"
PROGRAM = [sys.executable, "-m", "gcs_prefetchd"]
REPORT_EVERY_S = 0.02


def make_objects(folder: Path, items: int, smallest_bytes: int, largest_bytes: int, seed: int = 0) -> int:
    """Write pairs of objects of random bytes whose sizes are spread evenly between the bounds; returns their total bytes."""
    random = np.random.default_rng(seed)
    total = 0
    for part, end in (("images", "jpg"), ("labels", "png")):
        (folder / BUCKET / "items" / part).mkdir(parents=True)
        sizes = random.integers(smallest_bytes, largest_bytes, items, endpoint=True)
        for item, size in enumerate(sizes.tolist()):
            (folder / BUCKET / "items" / part / f"{item:07}.{end}").write_bytes(random.bytes(size))
        total += int(sizes.sum())
    return total


@contextmanager
def server(buckets: Path, latency_ms: float, bytes_per_s: int = 0) -> Iterator[str]:
    """A GCS-speaking server; yields its URL."""
    command = [sys.executable, "-m", "gcs_prefetchd.testing", "--root", str(buckets), "--port", "0"]
    command += ["--latency-ms", str(latency_ms)] + (["--bytes-per-s", str(bytes_per_s)] if bytes_per_s else [])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(word.rstrip(":,") for word in process.stdout.readline().split() if word.startswith("http"))
        finally:
            process.terminate()


@contextmanager
def daemon(cache_dir: Path, endpoint: str, cache_bytes: int, **settings: object) -> Iterator[DaemonClient]:
    """A daemon over the data root, started and stopped with its own commands; yields a client of it."""
    arguments = ["--data-root", DATA_ROOT, "--cache-dir", str(cache_dir), "--cache-size", str(cache_bytes), "--anonymous"]
    arguments += ["--endpoint", endpoint, "--http", "127.0.0.1:0", "--set", "min_free=0"]
    arguments += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    subprocess.run([*PROGRAM, "start", *arguments], check=True, stdout=subprocess.DEVNULL)
    try:
        with closing(DaemonClient(cache_dir)) as client:
            yield client
    finally:
        subprocess.run([*PROGRAM, "stop", "--cache-dir", str(cache_dir)], check=True, stdout=subprocess.DEVNULL)


def get_json(url: str) -> dict[str, Any]:
    """The JSON response of a URL."""
    with urllib.request.urlopen(url) as response:
        return dict(json.loads(response.read()))


def media_gets(endpoint: str) -> int:
    """Number of object requests since the server's start."""
    return int(get_json(f"{endpoint}/_counts?objects=false")["requests"]["media"])


@dataclass(slots=True)
class Reader:
    """A job that reads complete epochs at a fixed rate, as a training run does: plan, files, demands, reports."""

    cache_dir: Path
    job: str
    seed: int
    items_per_s: float
    kind: str = "shuffled"
    hits: int = 0
    waited_s: float = 0.0
    _reported: list[str] = field(default_factory=list)
    _reports: int = 0
    _last_report_s: float = 0.0

    def read(self, epochs: int, at_tenth: Callable[[int, int], None] = lambda epoch, tenth: None) -> float:
        """Read this many epochs; `at_tenth` is called after each tenth of one. Returns the seconds taken."""
        with closing(DaemonClient(self.cache_dir)) as client, closing(client.lease(self.job)):
            manifest = load_manifest(Path(client.manifest(DATA_ROOT).path))
            indices = np.arange(len(manifest), dtype=np.uint32)
            started_s = time.perf_counter()
            due_s = started_s
            for epoch in range(epochs):
                order = plan_order(self.kind, self.seed, epoch, indices)
                client.send_plan(self._plan(manifest, epoch, order), pack_indices(indices.tolist()))
                for position, item in enumerate(order.tolist()):
                    due_s = max(due_s + 1 / self.items_per_s, time.perf_counter() - 0.05)  # lost time is not made up
                    time.sleep(max(0.0, due_s - time.perf_counter()))
                    self._read(client, manifest, item)
                    if (position + 1) * 10 % len(order) < 10:
                        self._report(client)
                        at_tenth(epoch, (position + 1) * 10 // len(order))
            self._report(client)
            return time.perf_counter() - started_s

    def _plan(self, manifest: Manifest, epoch: int, order: Indices) -> Plan:
        return Plan(
            job=self.job,
            stream=self.job,
            data_root=DATA_ROOT,
            manifest=manifest.digest,
            kind=self.kind,
            seed=self.seed,
            epoch=epoch,
            position=0,
            rank=0,
            world=1,
            drop_last=0,
            start=0,
            digest=order_digest(order),
        )

    def _read(self, client: DaemonClient, manifest: Manifest, item: int) -> None:
        names = [version.name for version in manifest.versions(item)]
        missing = [name.uri for name in names if not (self.cache_dir / "objects" / cache_path(name.bucket, name.name)).exists()]
        if missing:
            started_s = time.perf_counter()
            errors = [error for error in client.fetch(missing) if error]
            if errors:
                raise RuntimeError(errors[0])
            self.waited_s += time.perf_counter() - started_s
        else:
            self.hits += 1
        self._reported += [name.uri for name in names]
        if time.perf_counter() - self._last_report_s > REPORT_EVERY_S:
            self._report(client)

    def _report(self, client: DaemonClient) -> None:
        self._reports += 1
        report = ReadReport(self.job, self.job, self._reports, len(self._reported), 0, 0, 0.0, self._reported)
        client.report_reads(report)
        self._reported = []
        self._last_report_s = time.perf_counter()


def together(readers: list[Reader], epochs: int) -> float:
    """Run the readers at the same time; returns the total seconds."""
    started_s = time.perf_counter()
    threads = [threading.Thread(target=reader.read, args=[epochs]) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started_s
