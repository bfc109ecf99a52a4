"""Faults of processes: daemons and readers that are killed, stopped, or out of some resource. Every promise holds."""

import contextlib
import itertools
import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from gcs_dataset.read_reports import ReadCounts, ReadReporter
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.errors import DaemonUnavailableError
from gcs_prefetchd.testing import Counts, ServingGCS
from support.daemons import BUCKET, DATA_ROOT, run_command, start_arguments
from support.faults import DaemonProcess, data_of, faulted_daemon, promises, wait_for

pytestmark = pytest.mark.xdist_group("process_faults")  # in one process: they share a costly fixture

SIZE = 60_000
LARGE = 2_000_000
FLAGS = ["--set", "deadline_s=3", "--set", "rescan_s=1", "--set", "relist_s=1"]  # it rescans and lists all the time
_numbers = itertools.count()


def put_new(server: ServingGCS, count: int, size_bytes: int = SIZE) -> list[str]:
    """Put this many new objects; returns their URIs."""
    names = [f"train/more/{next(_numbers)}" for _ in range(count)]
    for name in names:
        server.put(BUCKET, name, data_of(f"gs://{BUCKET}/{name}", size_bytes))
    return [f"gs://{BUCKET}/{name}" for name in names]


def gets_of(counts: Counts, uris: list[str]) -> int:
    """How many GETs the server got for any of them."""
    return sum(counts.media[uri.removeprefix("gs://")] for uri in uris)


@pytest.fixture(scope="module")
def daemon(server: ServingGCS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that survives every test."""
    with faulted_daemon(tmp_path_factory.mktemp("lives") / "cache", server.url, FLAGS) as daemon:
        for item in range(2):
            assert daemon.client.fetch([f"{DATA_ROOT}/images/{item:05}.jpg"]) == [""]
        yield daemon


@pytest.fixture
def own_daemon(server: ServingGCS, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon of the test's own, which may be killed."""
    with faulted_daemon(tmp_path / "cache", server.url, FLAGS) as daemon:
        yield daemon


@contextmanager
def promises_kept(daemon: DaemonProcess, server: ServingGCS) -> Iterator[None]:
    """The promises hold after the body as before it."""
    [good] = put_new(server, 1)
    with promises(daemon, good, data_of(good, SIZE)):
        yield


def demand_together(daemon: DaemonProcess, uris: list[str]) -> list[str]:
    """Demand all of them together; returns the errors, and asserts that the other objects are correct."""
    errors = daemon.client.fetch(uris)
    for uri, error in zip(uris, errors, strict=True):
        if not error:
            assert daemon.cached(uri) == data_of(uri, SIZE)
    return [error for error in errors if error]


@contextmanager
def limited(daemon: DaemonProcess, kind: int, limit: int) -> Iterator[None]:
    """Lower a resource limit of the running daemon, for as long as the body runs."""
    before = resource.prlimit(daemon.pid, kind)
    resource.prlimit(daemon.pid, kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, kind, before)


def no_descriptors(daemon: DaemonProcess) -> AbstractContextManager[None]:
    """The daemon can open nothing while the body runs: all descriptors that it may use are in use."""
    in_use = {int(entry.name) for entry in Path(f"/proc/{daemon.pid}/fd").iterdir()}
    return limited(daemon, resource.RLIMIT_NOFILE, min(set(range(len(in_use) + 1)) - in_use))


def test_a_daemon_without_free_descriptors_survives_and_recovers(daemon: DaemonProcess, server: ServingGCS) -> None:
    uris = put_new(server, 150)
    with promises_kept(daemon, server):
        with no_descriptors(daemon):
            errors = demand_together(daemon, uris)
        assert demand_together(daemon, uris) == []
    assert errors
    assert all("Too many open files" in error for error in errors)


def test_cached_objects_stay_while_no_descriptor_is_free_to_check_them(daemon: DaemonProcess, server: ServingGCS) -> None:
    uris = put_new(server, 2)
    with promises_kept(daemon, server):
        assert daemon.client.fetch(uris) == ["", ""]
        with no_descriptors(daemon):
            assert daemon.client.fetch(uris) == ["", ""]
        assert daemon.client.fetch(uris) == ["", ""]
    assert gets_of(server.counts, uris) == 2


def assert_nothing_lost(daemon: DaemonProcess, server: ServingGCS, uris: list[str], size_bytes: int = SIZE) -> None:
    """Assert that the next daemon has the objects that this one cached, and that it downloads the others."""
    published = [uri for uri in uris if daemon.cached(uri) is not None]
    before = gets_of(server.counts, published)
    with faulted_daemon(daemon.cache_dir, server.url) as next_one:
        for uri in uris:
            assert next_one.read(uri) == data_of(uri, size_bytes)
    assert gets_of(server.counts, published) == before


@pytest.mark.parametrize("left_bytes", [0, 2_000_000])
def test_without_free_memory_reads_fail_and_the_cache_stays_correct(
    own_daemon: DaemonProcess, server: ServingGCS, left_bytes: int
) -> None:
    """Whether the daemon survives it, dies or hangs."""
    uris = put_new(server, 40, LARGE)
    cached = put_new(server, 2, LARGE)
    assert own_daemon.client.fetch(cached) == ["", ""]
    limit_bytes = int(Path(f"/proc/{own_daemon.pid}/statm").read_text().split()[0]) * resource.getpagesize() + left_bytes
    with limited(own_daemon, resource.RLIMIT_AS, limit_bytes), contextlib.suppress(DaemonUnavailableError):
        assert any(own_daemon.client.fetch(uris))
    own_daemon.kill()
    assert_nothing_lost(own_daemon, server, uris + cached, LARGE)


# --- Signals


def demanding(daemon: DaemonProcess, uris: list[str], readers: int = 4) -> ThreadPoolExecutor:
    """Readers that demand one object after the other, until each has been demanded or the daemon is gone."""
    left = iter(uris)

    def read() -> None:
        with closing(DaemonClient(daemon.cache_dir)) as client, contextlib.suppress(DaemonUnavailableError):
            for uri in left:
                client.fetch([uri])

    pool = ThreadPoolExecutor(readers)
    for _ in range(readers):
        pool.submit(read)
    return pool


def test_a_stop_under_load_is_clean_and_loses_nothing(own_daemon: DaemonProcess, server: ServingGCS) -> None:
    uris = put_new(server, 150)
    with demanding(own_daemon, uris):
        server.wait_for(lambda counts: gets_of(counts, uris) > 40)
        own_daemon.stop()
    assert not any(path.is_file() for path in (own_daemon.cache_dir / "tmp").rglob("*"))
    assert_nothing_lost(own_daemon, server, uris)


def test_a_daemon_that_was_suspended_continues(daemon: DaemonProcess, server: ServingGCS) -> None:
    uris = put_new(server, 150)
    assert daemon.client.fetch(uris[:2]) == ["", ""]
    with promises_kept(daemon, server), demanding(daemon, uris[:-1]):
        server.wait_for(lambda counts: gets_of(counts, uris) > 40)
        with suspended(daemon), closing(DaemonClient(daemon.cache_dir, timeout_s=0.5)) as client:
            for uri in uris[:2]:
                assert daemon.read(uri) == data_of(uri, SIZE)  # hits need no daemon
            with pytest.raises(DaemonUnavailableError, match="TimeoutError"):
                client.fetch(uris[-1:])
            with pytest.raises(DaemonUnavailableError, match="not contacted again yet"):
                client.fetch(uris[-1:])
    for uri in uris:
        assert daemon.read(uri) == data_of(uri, SIZE)
    assert gets_of(server.counts, uris) == len(uris)


@contextmanager
def suspended(daemon: DaemonProcess) -> Iterator[None]:
    """Suspend the daemon while the body runs."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def connections(daemon: DaemonProcess) -> int:
    """How many connections its Unix socket has, including those that it has not accepted yet."""
    return Path("/proc/net/unix").read_text().count(f"{daemon.cache_dir}/daemon.sock\n")


def test_reads_that_were_reported_to_a_suspended_daemon_are_counted_once(daemon: DaemonProcess, server: ServingGCS) -> None:
    """The report times out and is sent again; both arrive when the daemon continues."""
    uris = put_new(server, 3)
    reporter = ReadReporter(daemon.cache_dir, "job")
    before = connections(daemon)
    with suspended(daemon):
        reporter.add(ReadCounts(hits=3), uris)
        wait_for(lambda: connections(daemon) > before + 1, within_s=30)
    wait_for(lambda: daemon.stats()["reads"]["hits"])
    reporter.add(ReadCounts(misses=1), [])
    wait_for(lambda: daemon.stats()["reads"]["misses"])
    assert daemon.stats()["reads"]["hits"] == 3
    reporter.close()


@pytest.mark.parametrize("same", ["directory", "port"])
def test_a_second_daemon_is_refused_in_one_line_and_harms_nothing(daemon: DaemonProcess, server: ServingGCS, same: str) -> None:
    cache_dir = daemon.cache_dir if same == "directory" else daemon.cache_dir.with_name("another")
    extra = ["--http", daemon.http.removeprefix("http://")] if same == "port" else []
    lease = daemon.client.lease("job")
    with promises_kept(daemon, server):
        result = run_command("start", *start_arguments(cache_dir, server.url, extra))
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert (f"pid {daemon.pid}" if same == "directory" else "the port is in use") in result.stderr
        assert lease.is_held
        assert daemon.client.status().pid == daemon.pid
    lease.close()
