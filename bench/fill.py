"""How fast an empty cache is filled, and at what CPU cost: the daemon beside a bare loop that writes the same files.

    python bench/fill.py [--json] [--quick] [--runs N] [--plot FILE.png]

The loop is gcloud-aio-storage on uvloop, which checks, retries and indexes nothing (`bare_loop.py`); `tuned` has the daemon's
malloc settings as well. The daemon's figures are those of its processes: GET, crc32c, write, stamp, publish, index. Each fill
is timed after its first tenth. If root runs it, each fill gets a new ext4 file system (a mounted file): recent deletions
make new files expensive on ext4: two to four times for the loop, which creates them in their final folder. Otherwise all share
the scratch folder's disk. Before each fill, the same number of bytes is written and removed: a virtual machine pays for memory
that it touches for the first time.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from comparison import Row, Target, arguments, finish
from fast_origin import file_origin, has_nginx
from rig import daemon, make_objects, server

CONCURRENCY = 128
LOWEST_RATE, HIGHEST_CPU = Target(0.9), Target(1.15, is_most=True)  # beside the bare loop
SAMPLE_S, SELDOM_S = 0.02, 0.1  # each sample costs the daemon a millisecond, so few are taken except at both ends
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BARE = [sys.executable, str(Path(__file__).parent / "bare_loop.py")]


@dataclass(frozen=True, slots=True)
class Case:
    """One fill: how many objects, their size, and the origin."""

    objects: int
    object_bytes: int
    latency_ms: float
    tls: bool = False

    def __str__(self) -> str:
        size = f"{self.object_bytes // 1000} KB" if self.object_bytes < 1_000_000 else f"{self.object_bytes // 1_000_000} MB"
        return f"{size}, {self.latency_ms:g} ms, {'TLS' if self.tls else 'http'}"


CASES = [
    Case(3000, 100_000, 0),
    Case(3000, 100_000, 30),
    Case(400, 1_000_000, 0),
    Case(400, 1_000_000, 30),
    Case(3000, 100_000, 30, tls=True),
]


@dataclass(frozen=True, slots=True)
class Fill:
    """The measurements of one fill after its first tenth."""

    objects: int
    seconds: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        """Objects per second."""
        return self.objects / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU per object."""
        return self.cpu_s / self.objects * 1e6


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
            time.sleep(SELDOM_S if objects // 10 <= here < objects * 8 // 10 else SAMPLE_S)
        first, last = marks[0], marks[-1]
        return Fill(last[2] - first[2], last[0] - first[0], last[1] - first[1])


def fill_bare(url: str, folder: Path, *, tuned: bool) -> Fill:
    """Run the bare loop."""
    command = [*BARE, url, str(folder), str(CONCURRENCY), *(["--tuned"] if tuned else [])]
    return Fill(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure(case: Case, runs: int, scratch: Path) -> list[Row]:
    """Run all three in turn, several times."""
    data = scratch / f"{case.object_bytes}"
    if not data.is_dir():
        make_objects(data, case.objects // 2, case.object_bytes, case.object_bytes)
    fills: dict[str, list[Fill]] = {"ours": [], "bare": [], "tuned": []}
    with origin(scratch, data, case) as url:
        for run in range(runs):
            for name in fills:
                _touch_memory(scratch / "touched", case.objects * case.object_bytes)
                with new_disk(scratch, 2 * case.objects * case.object_bytes + (256 << 20)) as disk:
                    if name == "ours":
                        fills[name].append(fill_ours(url, disk / "cache", case.objects, case.object_bytes))
                    else:
                        fills[name].append(fill_bare(url, disk / "files", tuned=name == "tuned"))
            print(f"{case}: run {run + 1} of {runs} done", file=sys.stderr)
    return list(rows_of(case, fills))


@contextmanager
def origin(scratch: Path, data: Path, case: Case) -> Iterator[str]:
    """nginx if it is installed, else our own server, which then is the bottleneck."""
    if not has_nginx():
        with server(data, case.latency_ms) as url:
            yield url
        return
    with tempfile.TemporaryDirectory(dir=scratch) as run:
        tls = _certificate(Path(run)) if case.tls else None
        if tls is not None:
            os.environ["SSL_CERT_FILE"] = str(tls[0])  # for the processes that read from it
        with file_origin(Path(run), data, case.latency_ms, tls=tls) as url:
            yield url
        os.environ.pop("SSL_CERT_FILE", None)


def _certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


@contextmanager
def new_disk(scratch: Path, size_bytes: int) -> Iterator[Path]:
    """A folder on a new file system; without root, on the existing one."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        if os.geteuid() != 0:
            yield Path(folder)
            return
        image, disk = Path(folder, "image"), Path(folder, "disk")
        disk.mkdir()
        with image.open("wb") as file:
            file.truncate(size_bytes)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, disk], check=True)
        try:
            yield disk
        finally:
            subprocess.run(["umount", disk], check=True)


def _touch_memory(file: Path, size_bytes: int) -> None:
    block = bytes(1 << 20)
    with file.open("wb", buffering=0) as stream:
        for _ in range(size_bytes // len(block)):
            stream.write(block)
    file.unlink()


def _cpu_s(pid: int) -> float:
    """CPU ticks of the daemon and its fetch processes, including those that have ended."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    fields = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in (pid, *children)]
    return sum(int(ticks) for own in fields for ticks in own[11:15]) / TICKS_PER_S


def rows_of(case: Case, fills: Mapping[str, Sequence[Fill]]) -> Iterator[Row]:
    """Medians: targets are compared with the bare loop; the tuned loop is shown beside it."""
    per_s = {name: statistics.median(one.per_s for one in fills[name]) for name in fills}
    cpu_us = {name: statistics.median(one.cpu_us for one in fills[name]) for name in fills}
    for name, rate_target, cpu_target in (("bare", LOWEST_RATE, HIGHEST_CPU), ("tuned", None, None)):
        yield Row("rate", str(case), per_s["ours"], f"{name} loop", per_s[name], "objects/s", rate_target)
        yield Row("CPU an object", str(case), cpu_us["ours"], f"{name} loop", cpu_us[name], "us", cpu_target)


def main() -> int:
    """The command."""
    options = arguments(__doc__, "one case, once")
    with tempfile.TemporaryDirectory(prefix="gcs-prefetchd-bench-") as scratch:
        cases, runs = (CASES[1:2], 1) if options.quick else (CASES, options.runs)
        rows = [row for case in cases if has_nginx() or not case.tls for row in measure(case, runs, Path(scratch))]
    return finish("Filling an empty cache", rows, options)


if __name__ == "__main__":
    sys.exit(main())
