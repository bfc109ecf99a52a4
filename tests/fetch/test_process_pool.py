"""A daemon with fetch processes: if one of them fails in any way, every promise holds and the daemon continues without it."""

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from gcs_prefetchd.testing import Fault, Kind, ServingGCS, Stall, Status, serving
from support.caches import mounted, needs_mount
from support.daemons import BUCKET, DATA_ROOT, put_items
from support.faults import DaemonProcess, data_of, faulted_daemon, promises, wait_for
from support.origin_faults import PASSING

pytestmark = pytest.mark.xdist_group("process_pool")  # in one process: they share a costly fixture

FLAGS = ["--set", "fetch_processes=2", "--set", "deadline_s=3", "--set", "relist_s=1"]
SIZE = 100_000
LONG_S = 30.0
_numbers = itertools.count(100)


def put_new(
    server: ServingGCS, items: int, size_bytes: int = SIZE, faults: Sequence[Fault] = (), *, always: bool = False
) -> dict[str, bytes]:
    """Put this many more items; returns the bytes of their objects by URI. One of the faults applies to the first GET of each
    object, or to every GET."""
    names = [
        f"train/{part}" for i in itertools.islice(_numbers, items) for part in (f"images/{i:05}.jpg", f"labels/{i:05}.png")
    ]
    for name, fault in zip(names, itertools.cycle(faults)):
        server.faults.add(fault, f"{BUCKET}/{name}", requests=None if always else 1)
    for name in names:
        server.put(BUCKET, name, data_of(name, size_bytes))
    return {f"gs://{BUCKET}/{name}": data_of(name, size_bytes) for name in names}


def key_of(uri: str) -> str:
    return uri.removeprefix("gs://")


def fetch_processes(daemon: DaemonProcess) -> list[int]:
    """The daemon's fetch processes."""
    children = map(int, Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split())
    return [pid for pid in children if b"gcs_prefetchd.fetch.process_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_gone(pid: int) -> bool:
    """Whether the process has ended; it may still be a zombie that its new parent has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def ready_processes(daemon: DaemonProcess) -> int:
    """How many of them accept downloads."""
    return int(daemon.stats()["process"]["fetch_processes"])


def written_bytes(pid: int) -> int:
    """The bytes that a process wrote to files and sockets."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["wchar"])


def are_cached(daemon: DaemonProcess, objects: dict[str, bytes]) -> bool:
    return all(daemon.cached(uri) == data for uri, data in objects.items())


@contextmanager
def daemon_with_processes(server: ServingGCS, cache_dir: Path, extra: list[str] | None = None) -> Iterator[DaemonProcess]:
    """A daemon whose two fetch processes are ready."""
    with faulted_daemon(cache_dir, server.url, [*FLAGS, *(extra or [])]) as daemon:
        wait_for(lambda: ready_processes(daemon) == 2)
        yield daemon


@contextmanager
def promises_kept(daemon: DaemonProcess, server: ServingGCS) -> Iterator[None]:
    """The promises hold after the body as before it."""
    name = f"train/good/{next(_numbers)}"
    server.put(BUCKET, name, data_of(name, SIZE))
    with promises(daemon, f"gs://{BUCKET}/{name}", data_of(name, SIZE)):
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[ServingGCS]:
    with serving() as server:
        put_items(server, 2)
        yield server


@pytest.fixture(scope="module")
def daemon(server: ServingGCS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that survives every test."""
    with daemon_with_processes(server, tmp_path_factory.mktemp("fetching") / "cache") as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def two_ready(request: pytest.FixtureRequest, server: ServingGCS) -> Iterator[None]:
    """Start each test with two ready processes and without faults."""
    if "daemon" in request.fixturenames:
        daemon = request.getfixturevalue("daemon")
        wait_for(lambda: ready_processes(daemon) == 2, LONG_S)
    yield
    server.faults.clear()
    server.release()


# Without faults


def test_prefetched_objects_are_downloaded_by_fetch_processes_once_and_counted(
    daemon: DaemonProcess, server: ServingGCS
) -> None:
    before, written = daemon.stats()["origin"], sum(map(written_bytes, fetch_processes(daemon)))
    gets = server.counts.total(Kind.MEDIA)
    with promises_kept(daemon, server):
        objects = put_new(server, 40)
        wait_for(lambda: are_cached(daemon, objects))
        assert server.counts.total(Kind.MEDIA) - gets == len(objects)
        assert sum(map(written_bytes, fetch_processes(daemon))) - written >= SIZE * len(objects)
        now = daemon.stats()["origin"]
        assert now["bytes"] - before["bytes"] == SIZE * len(objects)
        assert now["requests"] - before["requests"] >= len(objects)
        assert now["errors"] == before["errors"]


def test_large_objects_are_downloaded_by_fetch_processes_in_chunks(daemon: DaemonProcess, server: ServingGCS) -> None:
    with promises_kept(daemon, server):
        objects = put_new(server, 2, 20_000_000)
        wait_for(lambda: are_cached(daemon, objects), LONG_S)
    assert daemon.stats()["process"]["fetch_memory_bytes"] < 300_000_000


def test_without_fetch_processes_the_daemon_prefetches_itself(server: ServingGCS, tmp_path: Path) -> None:
    with faulted_daemon(tmp_path / "cache", server.url, ["--set", "fetch_processes=0"]) as daemon:
        wait_for(lambda: f"{DATA_ROOT}/images/00000.jpg" in daemon.client.cached_objects())
        assert fetch_processes(daemon) == []
        assert ready_processes(daemon) == 0


def test_with_nothing_to_prefetch_no_process_starts(tmp_path: Path) -> None:
    with serving() as server:
        objects = put_items(server, 2)
        with daemon_with_processes(server, tmp_path / "cache") as daemon:
            wait_for(lambda: are_cached(daemon, objects))
            daemon.stop()
        with faulted_daemon(tmp_path / "cache", server.url, FLAGS) as daemon:
            listed = server.counts.total(Kind.LIST)
            server.wait_for(lambda counts: counts.total(Kind.LIST) >= listed + 4)
            assert fetch_processes(daemon) == []


# Faults of GCS


def test_after_transient_faults_every_object_is_cached_and_correct(daemon: DaemonProcess, server: ServingGCS) -> None:
    """Every kind of fault at once, each met by two objects."""
    with promises_kept(daemon, server):
        objects = put_new(server, len(PASSING), faults=PASSING)
        wait_for(lambda: are_cached(daemon, objects), LONG_S)
    assert all(server.counts.media[key_of(uri)] >= 2 for uri in objects)


def test_an_object_that_cannot_be_downloaded_is_named_in_one_line_and_cached_after_the_fault(
    daemon: DaemonProcess, server: ServingGCS
) -> None:
    with promises_kept(daemon, server):
        objects = put_new(server, 1, faults=[Status(500)], always=True)
        line = daemon.wait_for_line(f"fetch ({'|'.join(objects)}): gave up after 3 s and .* last: .*GCS returned 500")
        assert "planned again in" in line
        server.faults.clear()
        wait_for(lambda: are_cached(daemon, objects), LONG_S)


def test_an_object_that_is_replaced_during_its_download_is_cached_as_the_new_one(
    daemon: DaemonProcess, server: ServingGCS
) -> None:
    with promises_kept(daemon, server):
        objects = put_new(server, 1, faults=[Stall(1000)])
        uri = next(iter(objects))
        server.wait_for(lambda counts: counts.media[key_of(uri)] == 1)
        objects[uri] = b"new" * 1000
        server.put(BUCKET, key_of(uri).partition("/")[2], objects[uri])
        wait_for(lambda: are_cached(daemon, objects), LONG_S)


# Faults of the processes


def stall_new(server: ServingGCS, items: int) -> dict[str, bytes]:
    """Put new items whose first GETs stall halfway; returns when all of them stall."""
    objects = put_new(server, items, faults=[Stall(SIZE // 2)])
    server.wait_for(lambda counts: all(counts.media[key_of(uri)] for uri in objects))
    return objects


def test_the_downloads_of_a_killed_process_are_made_all_the_same(daemon: DaemonProcess, server: ServingGCS) -> None:
    with promises_kept(daemon, server):
        objects, before = stall_new(server, 10), fetch_processes(daemon)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: are_cached(daemon, objects), LONG_S)
        wait_for(lambda: ready_processes(daemon) == 2, LONG_S)
        assert not set(fetch_processes(daemon)) & set(before)
    for pid in before:
        assert "restarted in 1 s" in daemon.wait_for_line(f"stopped with status -9 .pid {pid}")


def test_kills_at_any_moment_lose_nothing(daemon: DaemonProcess, server: ServingGCS) -> None:
    with promises_kept(daemon, server):
        for _ in range(8):
            gets = server.counts.total(Kind.MEDIA)
            objects = put_new(server, 30)
            server.wait_for(lambda counts, some=gets + 20: counts.total(Kind.MEDIA) >= some)  # type: ignore[misc]
            for pid in fetch_processes(daemon):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda some=objects: are_cached(daemon, some), LONG_S)  # type: ignore[misc]
    wait_for(lambda: daemon.stats()["cache"]["reserved_bytes"] == 0)
    files = [path for path in (daemon.cache_dir / "objects").rglob("*") if path.is_file()]
    assert daemon.stats()["cache"]["bytes"] == sum(path.stat().st_size for path in files)


def test_a_process_that_hangs_is_killed_and_its_downloads_are_made(daemon: DaemonProcess, server: ServingGCS) -> None:
    with promises_kept(daemon, server):
        objects = stall_new(server, 4)
        for pid in (stopped := fetch_processes(daemon)):
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: are_cached(daemon, objects), LONG_S)
    for pid in stopped:
        daemon.wait_for_line(f"hangs .pid {pid}")


def test_fetch_processes_stop_with_a_killed_daemon_and_the_next_one_starts_at_once(server: ServingGCS, tmp_path: Path) -> None:
    with daemon_with_processes(server, tmp_path / "cache") as daemon:
        objects, pids = stall_new(server, 10), fetch_processes(daemon)
        os.kill(daemon.pid, signal.SIGKILL)
        with daemon_with_processes(server, tmp_path / "cache") as next_daemon:
            assert all(map(is_gone, pids))
            with promises_kept(next_daemon, server):
                wait_for(lambda: are_cached(next_daemon, objects), LONG_S)


def test_a_stop_during_downloads_of_fetch_processes_is_clean(server: ServingGCS, tmp_path: Path) -> None:
    with daemon_with_processes(server, tmp_path / "cache", ["--set", "deadline_s=60"]) as daemon:
        stall_new(server, 10)
        pids = fetch_processes(daemon)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)  # as systemd does, which signals every process of a service
        daemon.stop()
        assert all(map(is_gone, pids))
        assert [path for path in (tmp_path / "cache/tmp").rglob("*") if path.is_file()] == []
        warnings = [line for line in daemon.lines() if " INFO " not in line]
        assert [line for line in warnings if "items are left out" not in line] == []  # listed between an image and its label


def test_a_stop_does_not_wait_for_a_process_that_hangs(server: ServingGCS, tmp_path: Path) -> None:
    with daemon_with_processes(server, tmp_path / "cache", ["--set", "deadline_s=60"]) as daemon:
        stall_new(server, 10)
        for pid in (pids := fetch_processes(daemon)):
            os.kill(pid, signal.SIGSTOP)
        daemon.stop()  # a stop after stop_deadline_s would not be clean
        assert all(map(is_gone, pids))
        assert [path for path in (tmp_path / "cache/tmp").rglob("*") if path.is_file()] == []


def test_fetch_processes_import_nothing_from_the_working_directory(server: ServingGCS, tmp_path: Path) -> None:
    """Training code may have modules of the same names as Python's own."""
    with contextlib.chdir(tmp_path), daemon_with_processes(server, tmp_path / "cache") as daemon:
        (tmp_path / "queue.py").write_text("raise SystemExit('not this one')")
        for pid in (before := fetch_processes(daemon)):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: ready_processes(daemon) == 2 and not set(fetch_processes(daemon)) & set(before))


# Faults of the disk


@needs_mount
def test_a_full_disk_is_an_error_and_objects_are_cached_once_they_fit_again(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=8m") as disk, serving() as server:
        put_items(server, 2)
        (disk / "cache").mkdir()
        with daemon_with_processes(server, disk / "cache", ["--cache-size", "8MB"]) as daemon:
            filler = disk / "filler"
            filler.write_bytes(bytes(6_000_000))
            objects = put_new(server, 15)
            daemon.wait_for_line("cache gs://.*: No space left on device")
            filler.unlink()
            wait_for(lambda: are_cached(daemon, objects), LONG_S)
            assert [path for path in (disk / "cache/tmp").rglob("*") if path.is_file()] == []
            assert ready_processes(daemon) == 2
