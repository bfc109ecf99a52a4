"""A daemon in a process of its own, and the promises that hold for it whatever goes wrong, checked before and after a fault."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.objects import parse_object_uri
from gcs_prefetchd.shared.paths import cache_path
from support.daemons import COMMAND, DATA_ROOT, clean_environment, start_arguments

DATA = bytes(range(256)) * 100
LONGEST_LINE_BYTES = 2048
RESPONSE_S = 1.0  # within which /stats responds, whatever else happens
START_S = 60.0
SETTLE_S = 10.0  # within which the resources that a fault used are released
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) .+")


@dataclass(slots=True)
class Tally:
    """The results of a loop over a fault. For a failed read the daemon returned an error: training then reads from GCS."""

    case: str
    repetitions: int = 0
    wrong_bytes: int = 0
    lost_objects: int = 0
    failed_reads: int = 0


def table_of(rows: Sequence[Tally]) -> str:
    """The rows as a table in Markdown, for `docs/reliability.md`."""
    heads = ["case", "repetitions", "wrong bytes", "lost objects", "failed reads"]
    cells = [[str(value) for value in astuple(row)] for row in rows]
    lines = [heads, ["---", *["---:"] * 4], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class DaemonProcess:
    """A running daemon as its user sees it: its socket, its statistics over TCP, its files, its log."""

    def __init__(self, process: subprocess.Popen[bytes], cache_dir: Path, log: Path) -> None:
        self.process = process
        self.cache_dir = cache_dir
        self.log = log
        about = json.loads((cache_dir / "daemon.json").read_bytes())
        self.pid = int(about["pid"])
        self.http = str(about["http"]).rstrip("/")
        self.client = DaemonClient(cache_dir)

    def stats(self) -> dict[str, Any]:
        """`/stats` over TCP; raises TimeoutError if it takes longer than is promised."""
        with urllib.request.urlopen(f"{self.http}/stats", timeout=RESPONSE_S) as response:
            return dict(json.load(response))

    def read(self, uri: str) -> bytes | str:
        """The object's bytes, checked, as a reader of `gcs_dataset` gets them: from its file or by a demand; or why not."""
        data = self.cached(uri)
        if data is None:
            (error,) = self.client.fetch([uri])
            if error:
                return error
            data = self.cached(uri)
        return "fetched, but not in the cache" if data is None else data

    def cached(self, uri: str) -> bytes | None:
        """The bytes of the object's file in the cache; None if it is missing or damaged."""
        name = parse_object_uri(uri)
        return read_checked(self.cache_dir / "objects", cache_path(name.bucket, name.name))

    def lines(self) -> list[str]:
        """Its log."""
        return self.log.read_text().splitlines()

    def lines_about(self, uri: str) -> list[str]:
        """The warnings and errors in its log that name the object."""
        return [line for line in self.lines() if uri in line and re.search(" (WARNING|ERROR) ", line)]

    def wait_for_line(self, pattern: str, timeout_s: float = 30.0) -> str:
        """The first line of its log that contains the pattern, as soon as it is logged; fails if none is."""
        with subprocess.Popen(["tail", "-n", "+1", "-f", self.log], stdout=subprocess.PIPE, text=True) as following:
            timer = threading.Timer(timeout_s, following.kill)
            timer.start()
            try:
                assert following.stdout is not None
                found = next((line for line in following.stdout if re.search(pattern, line)), None)
            finally:
                timer.cancel()
                following.kill()
        assert found is not None, f"no line contains {pattern}: {self.log.read_text()}"
        return found.rstrip("\n")

    def kill(self) -> None:
        """SIGKILL, and wait for the exit."""
        with contextlib.suppress(ProcessLookupError):  # it has exited already
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait for the exit, which must be clean."""
        os.kill(self.pid, signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log.read_text()


@contextmanager
def faulted_daemon(
    cache_dir: Path,
    endpoint: str,
    extra: Sequence[str] = (),
    *,
    under: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> Iterator[DaemonProcess]:
    """A daemon in the foreground, its log in a file beside the cache; killed at the end if it still runs.

    `under` is a command that runs it: strace, prlimit, unshare.
    """
    log = cache_dir.with_name(cache_dir.name + ".log")
    arguments = ["start", *start_arguments(cache_dir, endpoint, extra), "--foreground", "--set", f"log_file={log}"]
    with log.open("ab") as stderr, _readiness() as (address, wait):
        process = subprocess.Popen(
            [*under, *COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=clean_environment() | {"NOTIFY_SOCKET": address} | (environment or {}),
        )
        try:
            wait(process)
        except BaseException:
            process.kill()
            process.wait()
            raise AssertionError(log.read_text()) from None
    daemon = DaemonProcess(process, cache_dir, log)
    try:
        with contextlib.closing(daemon.client):
            yield daemon
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon.pid, signal.SIGKILL)
            process.kill()
            process.wait()


def cached_items(daemon: DaemonProcess) -> list[str]:
    """Cache the two items of the fixture `server`; returns the URIs of their parts."""
    parts = [f"{DATA_ROOT}/{part}" for i in range(2) for part in (f"images/{i:05}.jpg", f"labels/{i:05}.png")]
    assert set(daemon.client.fetch(parts)) == {""}
    return parts


def data_of(name: str, size_bytes: int) -> bytes:
    """The bytes of an object; no two have the same."""
    return (name.encode() * (size_bytes // len(name) + 1))[:size_bytes]


def wait_for(condition: Callable[[], object], within_s: float = SETTLE_S) -> None:
    """Check the condition repeatedly until it holds."""
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, f"the condition does not hold after {within_s:g} s"


@contextmanager
def _readiness() -> Iterator[tuple[str, Callable[[subprocess.Popen[bytes]], None]]]:
    """What systemd is to a daemon: an address that receives READY=1, and a function that waits for it, or for an early exit."""
    name = f"gcs-prefetchd-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(f"\0{name}")

        def wait(process: subprocess.Popen[bytes]) -> None:
            exited = os.pidfd_open(process.pid)
            try:
                readable, _, _ = select.select([notified.fileno(), exited], [], [], START_S)
                assert notified.fileno() in readable, "the daemon exited before it was ready, or never was"
            finally:
                os.close(exited)

        yield f"@{name}", wait


@contextmanager
def ext4_disk(point: Path, size_bytes: int = 32 << 20, image: Path | None = None) -> Iterator[Path]:
    """A small ext4 disk of its own at `point`, in a file beside it, or the one in the file `image`; needs_mount."""
    point.mkdir()
    if image is None:
        image = point.with_name(point.name + ".img")
        with image.open("wb") as file:
            file.truncate(size_bytes)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", point], check=True)


@contextmanager
def promises(daemon: DaemonProcess, good: str, data: bytes, *, entries_stay: bool = True) -> Iterator[None]:
    """Assert that the promises hold after the body as before it, and the bound throughout.

    `good` is the URI of an object that no fault touches and that is not in the cache yet, `data` its bytes. `entries_stay`:
    everything that was cached before must still be cached.
    """
    entries = set(daemon.client.cached_objects())  # first, because it connects, and the connection stays
    wait_for(lambda: "anon_inode:inotify" in _links(daemon))  # it starts to watch its files just after it is ready
    before = _usage(daemon)
    with _bound_kept(daemon):
        yield
    assert daemon.process.poll() is None, daemon.log.read_text()
    daemon.stats()
    assert daemon.read(good) == data
    if entries_stay:
        assert entries <= set(daemon.client.cached_objects())
    _wait_until_released(daemon, before)
    for line in daemon.lines():
        assert LINE.fullmatch(line), line
        assert len(line.encode()) <= LONGEST_LINE_BYTES, line


def _links(daemon: DaemonProcess) -> list[str]:
    """The targets of its descriptors."""
    links = []
    for descriptor in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(descriptor.readlink()))
    return links


def _usage(daemon: DaemonProcess) -> dict[str, int]:
    """The counts in which leaks would show. Connections to GCS are kept open on purpose, and fetch processes start, each with a
    socket and a pidfd: so sockets and pidfds do not count."""
    return {
        "files": sum(not link.startswith(("socket:", "anon_inode:[pidfd]")) for link in _links(daemon)),
        "downloads": daemon.stats()["origin"]["in_flight"],
        "reserved_bytes": daemon.stats()["cache"]["reserved_bytes"],
        "tasks": daemon.stats()["process"]["tasks"],
        "temporary_files": len([path for path in (daemon.cache_dir / "tmp").rglob("*") if path.is_file()]),
    }


def _wait_until_released(daemon: DaemonProcess, before: dict[str, int]) -> None:
    until_s = time.monotonic() + SETTLE_S
    while True:
        more = {what: (before[what], now) for what, now in _usage(daemon).items() if now > before[what]}
        if not more:
            return
        assert time.monotonic() < until_s, f"more than before the fault: {more}"


@contextmanager
def _bound_kept(daemon: DaemonProcess) -> Iterator[None]:
    """Measure all files, finished or not, repeatedly until the body ends: together they never exceed the limit."""
    ended, most = threading.Event(), [0]
    limit_bytes = daemon.stats()["cache"]["limit_bytes"]

    def held_bytes() -> int:
        return sum(map(_bytes_below, (daemon.cache_dir / "objects", daemon.cache_dir / "tmp")))

    def measure() -> None:
        while not ended.wait(0.02):
            held = held_bytes()
            if held > limit_bytes:  # a file and the one evicted for it while the folders were read are both counted
                held = min(held_bytes(), held_bytes())
            most.append(held)

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert max(most) <= limit_bytes


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # renamed or evicted meanwhile
                total += Path(parent, name).lstat().st_size
    return total
