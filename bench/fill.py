"""How fast an empty cache is filled, and at what CPU: the daemon beside a bare loop that writes the same files.

    python bench/fill.py [--json] [--quick] [--runs N]

The loop is gcloud-aio-storage on uvloop, which checks, retries and indexes nothing (`bare_loop.py`); `tuned` has the daemon's
malloc settings as well. The daemon's figures are those of its process: GET, crc32c, write, stamp, publish, index.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fast_origin import file_origin, has_nginx
from rig import daemon, make_objects, server

CONCURRENCY = 128
SAMPLE_S = 0.02
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BARE = [sys.executable, str(Path(__file__).parent / "bare_loop.py")]


@dataclass(frozen=True, slots=True)
class Case:
    """What is filled from where."""

    objects: int
    object_bytes: int
    latency_ms: float
    tls: bool = False

    def __str__(self) -> str:
        size = f"{self.object_bytes // 1000} KB" if self.object_bytes < 1_000_000 else f"{self.object_bytes // 1_000_000} MB"
        return f"{size}, {self.latency_ms:g} ms, {'TLS' if self.tls else 'http'}"


CASES = [
    Case(8000, 100_000, 0),
    Case(8000, 100_000, 30),
    Case(1000, 1_000_000, 0),
    Case(1000, 1_000_000, 30),
    Case(8000, 100_000, 30, tls=True),
]


@dataclass(frozen=True, slots=True)
class Fill:
    """What one fill took, from its tenth part on."""

    objects: int
    seconds: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        """Objects a second."""
        return self.objects / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU an object."""
        return self.cpu_s / self.objects * 1e6


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one case."""

    case: str
    ours_per_s: float
    bare_per_s: float
    tuned_per_s: float
    ours_cpu_us: float
    bare_cpu_us: float
    tuned_cpu_us: float


def fill_ours(url: str, cache_dir: Path, objects: int, object_bytes: int) -> Fill:
    """Start a daemon over the bucket and watch it fill its cache."""
    with daemon(cache_dir, url, 2 * objects * object_bytes, concurrency=CONCURRENCY) as client:
        pid = int(json.loads((cache_dir / "daemon.json").read_text())["pid"])
        marks: list[tuple[float, float, int]] = []
        while True:
            here = client.stats()["cache"]["objects"]
            if here >= objects // 10:
                marks.append((time.perf_counter(), _cpu_s(pid), here))
            if here >= objects:
                break
            time.sleep(SAMPLE_S)
        first, last = marks[0], marks[-1]
        return Fill(last[2] - first[2], last[0] - first[0], last[1] - first[1])


def fill_bare(url: str, folder: Path, *, tuned: bool) -> Fill:
    """Run the bare loop."""
    command = [*BARE, url, str(folder), str(CONCURRENCY), *(["--tuned"] if tuned else [])]
    return Fill(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure(case: Case, runs: int, scratch: Path) -> Row:
    """Run all three in turn, several times."""
    data = scratch / f"{case.object_bytes}"
    if not data.is_dir():
        make_objects(data, case.objects // 2, case.object_bytes, case.object_bytes)
    fills: dict[str, list[Fill]] = {"ours": [], "bare": [], "tuned": []}
    with origin(scratch, data, case) as url:
        for run in range(runs):
            with tempfile.TemporaryDirectory(dir=scratch) as target:
                fills["ours"].append(fill_ours(url, Path(target, "cache"), case.objects, case.object_bytes))
            for name in ("bare", "tuned"):
                with tempfile.TemporaryDirectory(dir=scratch) as target:
                    fills[name].append(fill_bare(url, Path(target), tuned=name == "tuned"))
            print(f"{case}: run {run + 1} of {runs} done", file=sys.stderr)
    rates = [statistics.median(one.per_s for one in fills[name]) for name in fills]
    cpus = [statistics.median(one.cpu_us for one in fills[name]) for name in fills]
    return Row(str(case), *rates, *cpus)


@contextmanager
def origin(scratch: Path, data: Path, case: Case) -> Iterator[str]:
    """nginx where it is installed, else our own server, which is the slower part then."""
    if not has_nginx():
        with server(data, case.latency_ms) as url:
            yield url
        return
    with tempfile.TemporaryDirectory(dir=scratch) as run:
        tls = _certificate(Path(run)) if case.tls else None
        with file_origin(Path(run), data, case.latency_ms, tls=tls) as url:
            yield url


def _certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def show(rows: list[Row]) -> None:
    """The table."""
    table = Table("objects", "objects/s: ours", "bare loop", "ratio", "CPU us/object: ours", "bare loop", "ratio", box=None)
    for row in rows:
        rates = [f"{row.ours_per_s:,.0f}", f"{row.bare_per_s:,.0f}", f"{row.ours_per_s / row.bare_per_s:.2f}"]
        cpus = [f"{row.ours_cpu_us:.0f}", f"{row.bare_cpu_us:.0f}", f"{row.ours_cpu_us / row.bare_cpu_us:.2f}"]
        table.add_row(row.case, *rates, *cpus)
        rates = ["", f"{row.tuned_per_s:,.0f}", f"{row.ours_per_s / row.tuned_per_s:.2f}"]
        cpus = ["", f"{row.tuned_cpu_us:.0f}", f"{row.ours_cpu_us / row.tuned_cpu_us:.2f}"]
        table.add_row("  beside the loop with tuned malloc", *rates, *cpus)
    Console(width=140).print(table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="one case, once")
    parser.add_argument("--runs", type=int, default=3, help="the medians are of so many (default 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gcs-prefetchd-bench-") as scratch:
        cases, runs = (CASES[1:2], 1) if options.quick else (CASES, options.runs)
        rows = [measure(case, runs, Path(scratch)) for case in cases if has_nginx() or not case.tls]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
