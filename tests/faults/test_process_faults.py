"""Faults of processes: daemons and readers that are killed, stopped, or starved of what they need. Every promise holds."""

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

SIZE = 60_000
LARGE = 2_000_000
FLAGS = ["--set", "deadline_s=3", "--set", "rescan_s=1", "--set", "relist_s=1"]  # compares and lists all the time
_numbers = itertools.count()


def put_new(server: ServingGCS, count: int, size_bytes: int = SIZE) -> list[str]:
    """Put so many objects that nobody has read yet; returns their URIs."""
    names = [f"train/more/{next(_numbers)}" for _ in range(count)]
    for name in names:
        server.put(BUCKET, name, data_of(f"gs://{BUCKET}/{name}", size_bytes))
    return [f"gs://{BUCKET}/{name}" for name in names]


def gets_of(counts: Counts, uris: list[str]) -> int:
    """How many GETs there were for any of them."""
    return sum(counts.media[uri.removeprefix("gs://")] for uri in uris)


@pytest.fixture(scope="module")
def daemon(server: ServingGCS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that lives through it all."""
    with faulted_daemon(tmp_path_factory.mktemp("lives") / "cache", server.url, FLAGS) as daemon:
        for item in range(2):
            assert daemon.client.fetch([f"{DATA_ROOT}/images/{item:05}.jpg"]) == [""]
        yield daemon


@pytest.fixture
def mortal(server: ServingGCS, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon of the test's own, which may end."""
    with faulted_daemon(tmp_path / "cache", server.url, FLAGS) as daemon:
        yield daemon


@contextmanager
def kept(daemon: DaemonProcess, server: ServingGCS) -> Iterator[None]:
    """The promises hold after the body as before it."""
    [good] = put_new(server, 1)
    with promises(daemon, good, data_of(good, SIZE)):
        yield


def read_at_once(daemon: DaemonProcess, uris: list[str]) -> list[str]:
    """Demand them all together; returns the errors, and asserts that what is no error is the object."""
    errors = daemon.client.fetch(uris)
    for uri, error in zip(uris, errors, strict=True):
        if not error:
            assert daemon.cached(uri) == data_of(uri, SIZE)
    return [error for error in errors if error]


@contextmanager
def limited(daemon: DaemonProcess, kind: int, limit: int) -> Iterator[None]:
    """The running daemon has less of something that a process needs."""
    before = resource.prlimit(daemon.pid, kind)
    resource.prlimit(daemon.pid, kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, kind, before)


def no_descriptors(daemon: DaemonProcess) -> AbstractContextManager[None]:
    """Meanwhile the daemon can open nothing: all numbers that it may give are taken."""
    taken = {int(entry.name) for entry in Path(f"/proc/{daemon.pid}/fd").iterdir()}
    return limited(daemon, resource.RLIMIT_NOFILE, min(set(range(len(taken) + 1)) - taken))


def test_without_descriptors_left_the_daemon_lives_and_recovers(daemon: DaemonProcess, server: ServingGCS) -> None:
    uris = put_new(server, 150)
    with kept(daemon, server):
        with no_descriptors(daemon):
            errors = read_at_once(daemon, uris)
        assert read_at_once(daemon, uris) == []
    assert errors
    assert all("Too many open files" in error for error in errors)


def test_what_is_cached_stays_while_there_is_no_descriptor_to_look_at_it(daemon: DaemonProcess, server: ServingGCS) -> None:
    uris = put_new(server, 2)
    with kept(daemon, server):
        assert daemon.client.fetch(uris) == ["", ""]
        with no_descriptors(daemon):
            assert daemon.client.fetch(uris) == ["", ""]
        assert daemon.client.fetch(uris) == ["", ""]
    assert gets_of(server.counts, uris) == 2


def assert_kept(daemon: DaemonProcess, server: ServingGCS, uris: list[str], size_bytes: int = SIZE) -> None:
    """Assert that the next daemon has the objects that this one left, and that it brings the others."""
    published = [uri for uri in uris if daemon.cached(uri) is not None]
    before = gets_of(server.counts, published)
    with faulted_daemon(daemon.cache_dir, server.url) as next_one:
        for uri in uris:
            assert next_one.read(uri) == data_of(uri, size_bytes)
    assert gets_of(server.counts, published) == before


@pytest.mark.parametrize("left_bytes", [0, 2_000_000])
def test_without_memory_left_reads_fail_and_the_cache_stays_right(
    mortal: DaemonProcess, server: ServingGCS, left_bytes: int
) -> None:
    """Whether the daemon lives through it, dies or hangs."""
    uris = put_new(server, 40, LARGE)
    cached = put_new(server, 2, LARGE)
    assert mortal.client.fetch(cached) == ["", ""]
    limit_bytes = int(Path(f"/proc/{mortal.pid}/statm").read_text().split()[0]) * resource.getpagesize() + left_bytes
    with limited(mortal, resource.RLIMIT_AS, limit_bytes), contextlib.suppress(DaemonUnavailableError):
        assert any(mortal.client.fetch(uris))
    mortal.kill()
    assert_kept(mortal, server, uris + cached, LARGE)


# --- Signals


def demanding(daemon: DaemonProcess, uris: list[str], readers: int = 4) -> ThreadPoolExecutor:
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


def test_a_stop_under_load_is_clean_and_loses_nothing(mortal: DaemonProcess, server: ServingGCS) -> None:
    uris = put_new(server, 150)
    with demanding(mortal, uris):
        server.wait_for(lambda counts: gets_of(counts, uris) > 40)
        mortal.stop()
    assert not any(path.is_file() for path in (mortal.cache_dir / "tmp").rglob("*"))
    assert_kept(mortal, server, uris)


def test_a_daemon_that_was_suspended_goes_on(daemon: DaemonProcess, server: ServingGCS) -> None:
    uris = put_new(server, 150)
    assert daemon.client.fetch(uris[:2]) == ["", ""]
    with kept(daemon, server), demanding(daemon, uris[:-1]):
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
    """SIGSTOP, and SIGCONT at the end."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def connections(daemon: DaemonProcess) -> int:
    """How many there are to its Unix socket, with those that it has not accepted yet."""
    return Path("/proc/net/unix").read_text().count(f"{daemon.cache_dir}/daemon.sock\n")


def test_reads_that_a_suspended_daemon_was_told_of_are_counted_once(daemon: DaemonProcess, server: ServingGCS) -> None:
    """The report times out, is sent again, and both arrive when it goes on."""
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
    with kept(daemon, server):
        result = run_command("start", *start_arguments(cache_dir, server.url, extra))
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert (f"pid {daemon.pid}" if same == "directory" else "the port is in use") in result.stderr
        assert lease.is_held
        assert daemon.client.status().pid == daemon.pid
    lease.close()
