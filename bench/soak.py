"""A daemon under a mixed load with faults: wrong bytes, failed reads, and whether its resources stay flat.

    python bench/soak.py [--minutes 3] [--json] [--seed 0] [--plot FILE.png]

Readers in processes, in epochs and endlessly; an origin with all its faults, one after another; objects that are
overwritten; listings every second; a cache that holds a third of the data. In the first third the daemon is killed and
restarted now and then; the last of these daemons must use no more of any resource at the end than after that third. Readers
and faults pause for both measurements. Finally it is killed once more, and the next daemon must find everything that it had.
Exit status 1 if a target is missed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from comparison import command_line
from figures import Figure, finish
from gcs_prefetchd.service.daemonize import wait_for_exit
from gcs_prefetchd.shared.daemon_client import DaemonClient, read_daemon_file
from rig import DATA_ROOT, PROGRAM, get_json, server
from soak_load import Bucket, OriginFaults, Readers

ITEMS = 300
CACHE_SHARE = 3
RELIST_S = 1
SAMPLE_EVERY_S = 0.1
PATIENCE_S = 60.0
KILL_EVERY_S = 10.0  # in the first third
# Allowed growth of a long-running daemon: allocators and kept connections settle late.
MORE_MEMORY_BYTES, MORE_OPEN_FILES, MORE_TASKS, MORE_THREADS = 24_000_000, 24, 12, 6
RESPONSE_S = 1.0
LONGEST_LINE_BYTES = 2048


class Daemon:
    """The daemon under test, over all its starts; they share a directory and a log."""

    def __init__(self, cache_dir: Path, endpoint: str, cache_bytes: int) -> None:
        self.cache_dir = cache_dir
        self.log = cache_dir.with_name("daemon.log")
        self._arguments = [
            "--data-root",
            DATA_ROOT,
            "--cache-dir",
            str(cache_dir),
            "--cache-size",
            str(cache_bytes),
            "--anonymous",
        ]
        self._arguments += ["--endpoint", endpoint, "--http", "127.0.0.1:0", "--set", f"log_file={self.log}"]
        settings = {"min_free": 0, "relist_s": RELIST_S, "rescan_s": 2, "deadline_s": 3, "concurrency": 16}
        self._arguments += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        self.fallbacks = self.misses = self.hits = self.lives = 0
        self._url = ""

    def start(self) -> None:
        """Start it once more."""
        subprocess.run([*PROGRAM, "start", *self._arguments], check=True, stdout=subprocess.DEVNULL)
        self._url = str(read_daemon_file(self.cache_dir)["http"])
        self.lives += 1

    def kill(self) -> None:
        """SIGKILL; the readers' reports are counted first."""
        self._count()
        pid = int(str(read_daemon_file(self.cache_dir)["pid"]))
        with wait_for_exit(pid) as wait:
            os.kill(pid, signal.SIGKILL)
            wait()

    def stop(self) -> None:
        """Stop it for good."""
        self._count()
        subprocess.run([*PROGRAM, "stop", "--cache-dir", str(self.cache_dir)], check=True, stdout=subprocess.DEVNULL)

    def stats(self) -> dict[str, Any]:
        """Its current statistics."""
        return get_json(f"{self._url}/stats")

    def objects(self) -> set[str]:
        """Its objects, once it is ready."""
        with closing(DaemonClient(self.cache_dir)) as client:
            until(lambda: bool(client.stats()["cache"]["ready"]))
            return set(client.cached_objects())

    def disk_bytes(self) -> int:
        """Bytes of all files that count."""
        return sum(map(bytes_below, (self.cache_dir / "objects", self.cache_dir / "tmp")))

    def temporary_files(self) -> int:
        """Downloads in progress, or leftovers."""
        return sum(path.is_file() for path in (self.cache_dir / "tmp").rglob("*"))

    def _count(self) -> None:
        reads = self.stats()["reads"]
        self.hits += reads["hits"]
        self.misses += reads["misses"]
        self.fallbacks += reads["fallbacks"]


class Watch:
    """Samples the daemon in a thread: its most bytes on disk, its longest response."""

    def __init__(self, daemon: Daemon) -> None:
        self.disk_bytes = 0
        self.response_s = 0.0
        self._daemon = daemon
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample until the context is left."""
        self._ended.clear()
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            self.disk_bytes = max(self.disk_bytes, self._daemon.disk_bytes())
            requested_s = time.perf_counter()
            self._daemon.stats()
            self.response_s = max(self.response_s, time.perf_counter() - requested_s)


def bytes_below(folder: Path) -> int:
    """Bytes of all files; files deleted meanwhile may or may not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def until(holds: Callable[[], bool]) -> None:
    """Poll until it holds; raises TimeoutError."""
    given_up_s = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > given_up_s:
            raise TimeoutError(f"{holds} does not hold after {PATIENCE_S:g} s")
        time.sleep(0.05)


def settled(daemon: Daemon) -> dict[str, int]:
    """The daemon's resources at rest: the least of a few samples, because it lists every second."""
    until(lambda: not (stats := daemon.stats())["origin"]["in_flight"] and not stats["cache"]["reserved_bytes"])
    looks = []
    for _ in range(20):
        time.sleep(RELIST_S / 8)
        looks.append({**daemon.stats()["process"], "temporary_files": daemon.temporary_files()})
    return {what: min(look[what] for look in looks) for what in looks[0]}


def soak(seconds: float, folder: Path, seed: int) -> list[Figure]:
    """Load a daemon for this long; returns the figures."""
    bucket = Bucket(folder, ITEMS)
    with ExitStack() as stack:
        endpoint = stack.enter_context(server(bucket.folder, 5))
        os.environ["STORAGE_EMULATOR_HOST"] = endpoint
        os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "true"
        daemon = Daemon(folder / "cache", endpoint, limit_bytes := bucket.bytes // CACHE_SHARE)
        daemon.start()
        stack.callback(daemon.stop)
        watch, readers = Watch(daemon), Readers(daemon.cache_dir, ITEMS)
        with readers.reading():
            until(lambda: readers.all_read)
            with OriginFaults(endpoint, bucket, seed) as first:
                kill_now_and_then(daemon, watch, seconds / 3)
            with readers.paused():
                before = settled(daemon)
            with OriginFaults(endpoint, bucket, seed + 1) as second, watch.watching():
                time.sleep(seconds * 2 / 3)
            with readers.paused():
                after, are_alive = settled(daemon), readers.all_read
                lost = lost_by_a_kill(daemon)
    reads, wrong, failed = readers.counts
    return [
        Figure("objects read", reads, ""),
        Figure("wrong bytes", wrong, "", 0),
        Figure("reads that failed", failed, "", 0),
        Figure("readers that died", int(not are_alive), "", 0),
        Figure("objects lost over a kill", lost, "", 0),
        Figure("hits", daemon.hits, ""),
        Figure("misses", daemon.misses, ""),
        Figure("fallbacks", daemon.fallbacks, ""),
        Figure("faults of the origin", first.faults + second.faults, ""),
        Figure("items overwritten", first.overwritten + second.overwritten, ""),
        Figure("starts of the daemon", daemon.lives, ""),
        Figure("bytes on disk at most", watch.disk_bytes / 1e3, "KB", limit_bytes / 1e3),
        Figure("longest response of /stats", watch.response_s, "s", RESPONSE_S),
        *growth(before, after),
        *bad_log_lines(daemon.log),
    ]


def kill_now_and_then(daemon: Daemon, watch: Watch, seconds: float) -> None:
    """Kill and restart the daemon now and then."""
    for _ in range(kills := max(1, int(seconds / KILL_EVERY_S))):
        with watch.watching():
            time.sleep(seconds / kills)
        daemon.kill()
        time.sleep(0.3)  # readers have no daemon for a while
        daemon.start()


def lost_by_a_kill(daemon: Daemon) -> int:
    """Kill and restart the daemon; returns how many objects the next one lacks, though none was evicted for space."""
    had = daemon.objects()
    daemon.kill()
    daemon.start()
    gone = had - daemon.objects()
    return max(0, len(gone) - int(daemon.stats()["cache"]["evictions"]))


def growth(before: dict[str, int], after: dict[str, int]) -> list[Figure]:
    """The daemon's resources at the end, against those after the first third."""
    return [
        Figure("memory at the end", after["memory_bytes"] / 1e6, "MB", (before["memory_bytes"] + MORE_MEMORY_BYTES) / 1e6),
        Figure("open files at the end", after["open_files"], "", before["open_files"] + MORE_OPEN_FILES),
        Figure("tasks at the end", after["tasks"], "", before["tasks"] + MORE_TASKS),
        Figure("threads at the end", after["threads"], "", before["threads"] + MORE_THREADS),
        Figure("files in tmp/ at the end", after["temporary_files"], "", before["temporary_files"]),
    ]


def bad_log_lines(log: Path) -> list[Figure]:
    """Lines that should not be in the log."""
    lines = log.read_bytes().splitlines()
    return [
        Figure("lines of the log that are longer than 2 KB", sum(len(line) > LONGEST_LINE_BYTES for line in lines), "", 0),
        Figure("tracebacks in the log", sum(line.startswith(b"Traceback") for line in lines), "", 0),
    ]


def main() -> int:
    """Soak, print, and return the exit status."""
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="minutes of load (default %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default %(default)d)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(options.minutes * 60, Path(folder), options.seed)
    return finish(f"Mixed load with faults, {options.minutes * 60:g} s", figures, options)


if __name__ == "__main__":
    sys.exit(main())
