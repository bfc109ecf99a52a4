"""Every system call by which a daemon creates, renames and removes files fails in turn, as in SQLite's own tests.

strace makes them fail, in the one thread that makes files or in the one that has the index.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gcs_prefetchd.cache.disk_index import DiskIndex
from gcs_prefetchd.cache.object_writer import BUFFER_BYTES
from gcs_prefetchd.testing import ServingGCS, serving
from support.caches import content
from support.daemons import BUCKET, DATA_ROOT, put_items
from support.faults import DaemonProcess, Tally, faulted_daemon, promises, wait_for

SMALL, LARGE = content(1, 100_000), content(2, 2 * BUFFER_BYTES + 1000)
GOOD = f"{DATA_ROOT}/good.jpg"
LIMIT = 3 * len(LARGE) // 2
CALLS = ["openat", "writev", "fsetxattr", "rename", "mkdir", "unlink"]
ERRORS = ["ENOSPC", "EIO"]


def _may_trace() -> bool:
    if os.geteuid() != 0 or shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-e", "inject=rename:error=EIO", "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _may_trace(), reason="needs strace, and to be root")


@contextmanager
def traced(which: int, output: Path, *options: str) -> Iterator[Callable[[], str]]:
    """Trace a thread or, with -f, a process; yields a function that returns what was seen up to now."""
    output.unlink(missing_ok=True)
    command = ["strace", "-p", str(which), "-o", str(output), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        try:
            yield output.read_text
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait()


@contextmanager
def failing(thread: int, call: str, error: str, when: str, output: Path) -> Iterator[Callable[[], bool]]:
    """Make the thread's n-th call fail (with a +, all later ones, too); yields a function that returns whether one failed."""
    with traced(thread, output, f"--trace={call}", f"--inject={call}:error={error}:when={when}") as seen:
        yield lambda: "(INJECTED)" in seen()


@pytest.fixture
def server() -> Iterator[ServingGCS]:
    with serving() as server:
        put_items(server, 2, size_bytes=1000)
        server.put(BUCKET, "train/good.jpg", SMALL)
        yield server


@pytest.fixture
def daemon(server: ServingGCS, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon whose cache holds one large object at a time."""
    extra = ["--cache-size", str(LIMIT), "--set", "deadline_s=3"]
    with faulted_daemon(tmp_path / "cache", server.url, extra) as daemon:
        wait_for(lambda: len(daemon.client.cached_objects()) == 4)
        yield daemon
        daemon.stop()
    assert list((tmp_path / "cache/tmp").rglob("*/*")) == []


def file_thread(daemon: DaemonProcess, server: ServingGCS, output: Path) -> int:
    """The id of the thread that renames files."""
    server.put(BUCKET, "train/first.jpg", SMALL)
    with traced(daemon.pid, output, "-f", "--trace=rename") as seen:
        assert daemon.read(f"{DATA_ROOT}/first.jpg") == SMALL
        wait_for(lambda: "rename(" in seen())
        return int(seen().split()[0])


def fetch_and_evict(daemon: DaemonProcess, server: ServingGCS, name: str) -> list[bytes | str]:
    """Fetch a small and a large object into a new folder, so that others are evicted for them."""
    reads = []
    for part, data in (("small", SMALL), ("large", LARGE)):
        server.put(BUCKET, f"train/{name}/{part}.jpg", data)
        reads.append(daemon.read(f"{DATA_ROOT}/{name}/{part}.jpg"))
    return reads


def count(tally: Tally, daemon: DaemonProcess, name: str, reads: list[bytes | str]) -> None:
    tally.repetitions += 1
    for part, data, read in zip(("small", "large"), (SMALL, LARGE), reads, strict=True):
        if isinstance(read, str):
            tally.failed_reads += 1
            assert f"{DATA_ROOT}/{name}/{part}.jpg" in read
        elif read != data:
            tally.wrong_bytes += 1
    tally.lost_objects += sum(daemon.cached(uri) is None for uri in daemon.client.cached_objects())


@pytest.mark.parametrize("call", CALLS)
def test_a_failing_system_call_is_an_error_that_names_the_object_and_the_next_read_succeeds(
    call: str, daemon: DaemonProcess, server: ServingGCS, tmp_path: Path
) -> None:
    tally = Tally(call)
    thread = file_thread(daemon, server, tmp_path / "trace")
    with promises(daemon, GOOD, SMALL, entries_stay=False):
        fetch_and_evict(daemon, server, "before")
        with failing(thread, call, "EIO", "1", tmp_path / "trace") as has_failed:
            count(tally, daemon, "fault", fetch_and_evict(daemon, server, "fault"))
            assert has_failed()
        assert fetch_and_evict(daemon, server, "fault") == [SMALL, LARGE]
    assert (tally.wrong_bytes, tally.lost_objects) == (0, 0)


def test_a_file_that_cannot_be_closed_costs_no_read(daemon: DaemonProcess, server: ServingGCS, tmp_path: Path) -> None:
    """strace skips the call, though the kernel always closes the file: what is left open here is left by the test."""
    thread = file_thread(daemon, server, tmp_path / "trace")
    with failing(thread, "close", "EIO", "1+", tmp_path / "trace") as has_failed:
        assert fetch_and_evict(daemon, server, "fault") == [SMALL, LARGE]
        assert has_failed()


@pytest.mark.torture
@pytest.mark.parametrize("from_then_on", ["", "+"])
@pytest.mark.parametrize("error", ERRORS)
def test_every_system_call_that_creates_or_removes_files_fails_in_turn(
    error: str, from_then_on: str, daemon: DaemonProcess, server: ServingGCS, tmp_path: Path, tally: Tally
) -> None:
    thread = file_thread(daemon, server, tmp_path / "trace")
    with promises(daemon, GOOD, SMALL, entries_stay=False):
        fetch_and_evict(daemon, server, "before")
        for call in CALLS:
            for number in itertools.count(1):
                name = f"{call}-{number}"
                with failing(thread, call, error, f"{number}{from_then_on}", tmp_path / "trace") as has_failed:
                    count(tally, daemon, name, fetch_and_evict(daemon, server, name))
                    if not has_failed():
                        break
                assert fetch_and_evict(daemon, server, name) == [SMALL, LARGE]
            assert number > 1, call
    assert (tally.wrong_bytes, tally.lost_objects) == (0, 0)


# --- The index

COMMITTER = """
import sys
from pathlib import Path
from gcs_prefetchd.shared.errors import CacheWriteError
from gcs_prefetchd.cache.disk_index import INDEX_ERRORS, DiskIndex, IndexRecord
from gcs_prefetchd.shared.checked_read import Stamp

folder, index = Path(sys.argv[1]), None
for line in sys.stdin:
    do, _, path = line.strip().partition(" ")
    try:
        if do == "open":
            index = DiskIndex(folder)
        elif do == "apply":
            index.apply({path: IndexRecord(Stamp(1, 2, 3), 4.0), "last": IndexRecord(Stamp(len(path), 2, 3), 4.0)})
        elif index is not None:
            index.close(complete=True)
    except (CacheWriteError, *INDEX_ERRORS) as exc:
        print(f"{type(exc).__name__}: {exc}", flush=True)
    else:
        print("done", flush=True)
"""
COMMITS = ["pwrite64", "pread64", "fsync", "fdatasync", "openat", "unlink", "ftruncate"]
OPENINGS = ["pwrite64", "fsync", "fdatasync", "unlink", "ftruncate"]


@contextmanager
def committer(folder: Path) -> Iterator[tuple[int, Callable[[str], str]]]:
    """A process with an index; yields its id and a function that makes it open, apply or close, and returns the outcome."""
    command = [sys.executable, "-c", COMMITTER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def send(line: str) -> str:
            stdin.write(line + "\n")
            stdin.flush()
            return stdout.readline().strip()

        try:
            yield process.pid, send
        finally:
            process.kill()


def paths_in(folder: Path) -> set[str]:
    """The records of the index, read by opening it."""
    index = DiskIndex(folder)
    records, after = index.page(0, 100_000)
    assert after is None
    index.close(complete=index.complete)
    return {path for path, _ in records}


@pytest.mark.torture
@pytest.mark.parametrize("error", ERRORS)
def test_every_system_call_of_an_index_commit_fails_in_turn_and_commits_are_atomic(
    error: str, tmp_path: Path, tally: Tally
) -> None:
    committed = set()
    with committer(tmp_path / "index") as (pid, send):
        assert send("open") == "done"
        for call in COMMITS:
            for number in itertools.count(1):
                path = f"{call}/{number}"
                with failing(pid, call, error, str(number), tmp_path / "trace") as has_failed:
                    outcome = send(f"apply {path}")
                    if not has_failed():
                        break
                tally.repetitions += 1
                tally.failed_reads += outcome != "done"
                if outcome != "done":
                    assert send(f"apply {path}/again") == "done"
                    committed.add(f"{path}/again")
                else:
                    committed.add(path)
            if outcome == "done":
                committed.add(path)
        assert send("close") == "done"
    found = paths_in(tmp_path / "index")
    tally.lost_objects += len(committed - found)
    assert found == committed | {"last"}


@pytest.mark.torture
@pytest.mark.parametrize("error", ERRORS)
def test_every_system_call_of_opening_and_closing_an_index_fails_in_turn(error: str, tmp_path: Path, tally: Tally) -> None:
    with committer(tmp_path / "index") as (pid, send):
        for call in OPENINGS:
            for number in itertools.count(1):
                with failing(pid, call, error, str(number), tmp_path / "trace") as has_failed:
                    outcomes = [send("open"), send("close")]
                    if not has_failed():
                        break
                tally.repetitions += 1
                tally.failed_reads += outcomes[0] != "done"
                assert [send("open"), send("apply a/b"), send("close")] == ["done"] * 3
    assert paths_in(tmp_path / "index") == {"a/b", "last"}
