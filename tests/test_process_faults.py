"""Faults of processes: daemons and readers that are killed, stopped, or starved of what they need. Every promise holds."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fault_support import Daemon, faulted_daemon, promises, wait_for
from gcs_dataset.reports import ReadReporter, Reads
from gcs_prefetchd.client import DaemonClient
from gcs_prefetchd.errors import DaemonUnavailableError
from gcs_prefetchd.testing import Kind, ServingGCS, serving
from support import BUCKET, DATA_ROOT, put_items, run_command, start_arguments

GOOD = f"gs://{BUCKET}/train/good"
DATA = bytes(range(256)) * 400
MORE = [f"gs://{BUCKET}/train/more/{number}" for number in range(200)]
LARGE = [f"gs://{BUCKET}/train/large/{number}" for number in range(40)]
LARGE_BYTES = 2_000_000


def data_of(uri: str, size_bytes: int = 60_000) -> bytes:
    """The bytes of an object; no two have the same."""
    return (uri.encode() * (size_bytes // len(uri) + 1))[:size_bytes]


def key(uri: str) -> str:
    """What the server counts the object under."""
    return uri.removeprefix("gs://")


def put(server: ServingGCS, uri: str, data: bytes) -> None:
    """Put an object of this URI."""
    server.put(BUCKET, uri.removeprefix(f"gs://{BUCKET}/"), data)


@pytest.fixture
def server() -> Iterator[ServingGCS]:
    """A server with two items and many objects beside them."""
    with serving() as server:
        put_items(server, 2)
        server.put(BUCKET, "train/good", DATA)
        for uri in MORE:
            put(server, uri, data_of(uri))
        yield server


@pytest.fixture
def daemon(server: ServingGCS, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that gives up after 3 s, and compares and lists every second; the first two of `MORE` are cached."""
    often = ["--set", "deadline_s=3", "--set", "rescan_s=1", "--set", "relist_s=1"]
    with faulted_daemon(tmp_path / "cache", server.url, often) as daemon:
        for item in range(2):
            assert daemon.client.fetch([f"{DATA_ROOT}/images/{item:05}.jpg"]) == [""]
        assert daemon.client.fetch(MORE[:2]) == ["", ""]
        yield daemon


def read_at_once(daemon: Daemon, uris: list[str]) -> list[str]:
    """Demand them all together; returns the errors, and asserts that what is no error is the object."""
    errors = daemon.client.fetch(uris)
    for uri, error in zip(uris, errors, strict=True):
        if not error:
            assert daemon.cached(uri) == data_of(uri)
    return [error for error in errors if error]


@contextmanager
def limited(daemon: Daemon, kind: int, limit: int) -> Iterator[None]:
    """The running daemon has less of something that a process needs."""
    before = resource.prlimit(daemon.pid, kind)
    resource.prlimit(daemon.pid, kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, kind, before)


@pytest.mark.parametrize("left", [0, 1, 3])
def test_without_descriptors_left_the_daemon_lives_and_recovers(daemon: Daemon, server: ServingGCS, left: int) -> None:
    open_now = max(int(entry.name) for entry in Path(f"/proc/{daemon.pid}/fd").iterdir()) + 1
    with promises(daemon, GOOD, DATA):
        with limited(daemon, resource.RLIMIT_NOFILE, open_now + left):
            errors = read_at_once(daemon, MORE)
        assert read_at_once(daemon, MORE) == []
    assert len(errors) > 0
    assert all("Too many open files" in error for error in errors)


def test_what_is_cached_stays_while_there_is_no_descriptor_to_look_at_it(daemon: Daemon, server: ServingGCS) -> None:
    open_now = max(int(entry.name) for entry in Path(f"/proc/{daemon.pid}/fd").iterdir()) + 1
    with promises(daemon, GOOD, DATA):
        with limited(daemon, resource.RLIMIT_NOFILE, open_now):
            assert daemon.client.fetch(MORE[:2]) == ["", ""]
        assert daemon.client.fetch(MORE[:2]) == ["", ""]
    assert [server.counts.media[key(uri)] for uri in MORE[:2]] == [1, 1]


@pytest.mark.parametrize("left_bytes", [0, 20_000_000])
def test_without_memory_left_reads_fail_and_the_cache_stays_right(daemon: Daemon, server: ServingGCS, left_bytes: int) -> None:
    """Whether the daemon lives through it or not."""
    for uri in LARGE:
        put(server, uri, data_of(uri, LARGE_BYTES))
    virtual_pages = int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[0])
    limit_bytes = virtual_pages * resource.getpagesize() + left_bytes
    with limited(daemon, resource.RLIMIT_AS, limit_bytes), contextlib.suppress(DaemonUnavailableError):
        assert any(daemon.client.fetch(LARGE))
    try:
        daemon.stats()
    except OSError:
        daemon.process.wait(30)  # it is on its way out, which takes `stop_deadline_s` at most
    daemon.kill()
    server.reset()
    published = [uri for uri in LARGE if daemon.cached(uri) is not None]
    with faulted_daemon(daemon.cache_dir, server.url) as next_one:
        for uri in LARGE:
            assert next_one.read(uri) == data_of(uri, LARGE_BYTES)
        assert not any(server.counts.media[key(uri)] for uri in published + MORE[:2])


# --- Signals


def demanding(daemon: Daemon, uris: list[str], readers: int = 4) -> ThreadPoolExecutor:
    """Readers that demand one object after the other until each has been asked for, or the daemon is gone."""
    left = iter(uris)

    def read() -> None:
        with closing(DaemonClient(daemon.cache_dir)) as client, contextlib.suppress(DaemonUnavailableError):
            for uri in left:
                client.fetch([uri])

    pool = ThreadPoolExecutor(readers)
    for _ in range(readers):
        pool.submit(read)
    return pool


def test_a_stop_under_load_is_clean_and_loses_nothing(daemon: Daemon, server: ServingGCS) -> None:
    with demanding(daemon, MORE):
        server.wait_for(lambda counts: counts.total(Kind.MEDIA) > 40)
        daemon.stop()
    assert not any(path.is_file() for path in (daemon.cache_dir / "tmp").rglob("*"))
    published = [uri for uri in MORE if daemon.cached(uri) is not None]
    assert published
    server.reset()
    with faulted_daemon(daemon.cache_dir, server.url) as next_one:
        for uri in MORE:
            assert next_one.read(uri) == data_of(uri)
        assert not any(server.counts.media[key(uri)] for uri in published)


def test_a_daemon_that_was_suspended_goes_on(daemon: Daemon, server: ServingGCS) -> None:
    with promises(daemon, GOOD, DATA), demanding(daemon, MORE):
        server.wait_for(lambda counts: counts.total(Kind.MEDIA) > 40)
        with suspended(daemon):
            for uri in MORE[:2]:
                assert daemon.read(uri) == data_of(uri)  # hits need no daemon
            with closing(DaemonClient(daemon.cache_dir, timeout_s=0.5)) as client:
                with pytest.raises(DaemonUnavailableError, match="TimeoutError"):
                    client.fetch(MORE[-1:])
                started_s = time.monotonic()
                for _ in range(100):
                    with pytest.raises(DaemonUnavailableError):
                        client.fetch(MORE[-1:])
                assert time.monotonic() - started_s < 5
    for uri in MORE:
        assert daemon.read(uri) == data_of(uri)
    assert max(server.counts.media.values()) == 1


@contextmanager
def suspended(daemon: Daemon) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def connections(daemon: Daemon) -> int:
    """How many there are to its Unix socket, with those that it has not accepted yet."""
    return Path("/proc/net/unix").read_text().count(f"{daemon.cache_dir}/daemon.sock\n")


def test_reads_that_a_suspended_daemon_was_told_of_are_counted_once(daemon: Daemon) -> None:
    """The report times out, is sent again, and both arrive when it goes on."""
    reporter = ReadReporter(daemon.cache_dir, "job")
    before = connections(daemon)
    with suspended(daemon):
        reporter.add(Reads(hits=3), MORE[:3])
        wait_for(lambda: connections(daemon) > before + 1, within_s=30)
    wait_for(lambda: daemon.stats()["reads"]["hits"])
    reporter.add(Reads(misses=1), [])
    wait_for(lambda: daemon.stats()["reads"]["misses"])
    assert daemon.stats()["reads"]["hits"] == 3
    reporter.close()


@pytest.mark.parametrize("same", ["directory", "port"])
def test_a_second_daemon_is_refused_in_one_line_and_harms_nothing(daemon: Daemon, server: ServingGCS, same: str) -> None:
    cache_dir = daemon.cache_dir if same == "directory" else daemon.cache_dir.with_name("another")
    extra = ["--http", daemon.http.removeprefix("http://")] if same == "port" else []
    lease = daemon.client.lease("job")
    with promises(daemon, GOOD, DATA):
        result = run_command("start", *start_arguments(cache_dir, server.url, extra))
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert (f"pid {daemon.pid}" if same == "directory" else "the port is in use") in result.stderr
        assert lease.is_held
        assert daemon.client.status().pid == daemon.pid
    lease.close()
