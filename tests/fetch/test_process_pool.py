"""Fetch processes prefetch for the daemon. Whatever becomes of one, every promise holds and the daemon goes on without it."""

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

FLAGS = ["--set", "fetch_processes=2", "--set", "deadline_s=3", "--set", "relist_s=1"]
SIZE = 100_000
LONG_S = 30.0
_numbers = itertools.count(100)


def put_new(
    server: ServingGCS, items: int, size_bytes: int = SIZE, faults: Sequence[Fault] = (), *, always: bool = False
) -> dict[str, bytes]:
    """Put so many items more; returns the bytes of their objects by URI. The first GET of each object meets one of the faults,
    or every GET."""
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


def fetchers(daemon: DaemonProcess) -> list[int]:
    """The daemon's fetch processes."""
    children = map(int, Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split())
    return [pid for pid in children if b"gcs_prefetchd.fetch.process" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def has_ended(pid: int) -> bool:
    """Whether the process is no more, but perhaps for the entry that its new parent has yet to take note of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def at_work(daemon: DaemonProcess) -> int:
    """How many of them can be told to fetch."""
    return int(daemon.stats()["process"]["fetch_processes"])


def written_bytes(pid: int) -> int:
    """By `write` and the like, to files and sockets."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["wchar"])


def are_cached(daemon: DaemonProcess, objects: dict[str, bytes]) -> bool:
    return all(daemon.cached(uri) == data for uri, data in objects.items())


@contextmanager
def fetching_daemon(server: ServingGCS, cache_dir: Path, extra: list[str] | None = None) -> Iterator[DaemonProcess]:
    """A daemon whose two fetch processes are at work."""
    with faulted_daemon(cache_dir, server.url, [*FLAGS, *(extra or [])]) as daemon:
        wait_for(lambda: at_work(daemon) == 2)
        yield daemon


@contextmanager
def kept(daemon: DaemonProcess, server: ServingGCS) -> Iterator[None]:
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
    """A daemon that lives through it all."""
    with fetching_daemon(server, tmp_path_factory.mktemp("fetching") / "cache") as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def two_at_work(request: pytest.FixtureRequest, server: ServingGCS) -> Iterator[None]:
    """What one test did to the processes is over before the next begins."""
    if "daemon" in request.fixturenames:
        daemon = request.getfixturevalue("daemon")
        wait_for(lambda: at_work(daemon) == 2, LONG_S)
    yield
    server.faults.clear()
    server.release()


# At work


def test_what_is_prefetched_comes_through_them_once_and_is_counted(daemon: DaemonProcess, server: ServingGCS) -> None:
    before, written = daemon.stats()["origin"], sum(map(written_bytes, fetchers(daemon)))
    gets = server.counts.total(Kind.MEDIA)
    with kept(daemon, server):
        objects = put_new(server, 40)
        wait_for(lambda: are_cached(daemon, objects))
        assert server.counts.total(Kind.MEDIA) - gets == len(objects)
        assert sum(map(written_bytes, fetchers(daemon))) - written >= SIZE * len(objects)
        now = daemon.stats()["origin"]
        assert now["bytes"] - before["bytes"] == SIZE * len(objects)
        assert now["requests"] - before["requests"] >= len(objects)
        assert now["errors"] == before["errors"]


def test_large_objects_come_through_them_piece_by_piece(daemon: DaemonProcess, server: ServingGCS) -> None:
    with kept(daemon, server):
        objects = put_new(server, 2, 20_000_000)
        wait_for(lambda: are_cached(daemon, objects), LONG_S)
    assert daemon.stats()["process"]["fetch_memory_bytes"] < 300_000_000


def test_without_any_the_daemon_prefetches_itself(server: ServingGCS, tmp_path: Path) -> None:
    with faulted_daemon(tmp_path / "cache", server.url, ["--set", "fetch_processes=0"]) as daemon:
        wait_for(lambda: f"{DATA_ROOT}/images/00000.jpg" in daemon.client.cached_objects())
        assert fetchers(daemon) == []
        assert at_work(daemon) == 0


def test_nothing_to_prefetch_takes_no_process(tmp_path: Path) -> None:
    with serving() as server:
        objects = put_items(server, 2)
        with fetching_daemon(server, tmp_path / "cache") as daemon:
            wait_for(lambda: are_cached(daemon, objects))
            daemon.stop()
        with faulted_daemon(tmp_path / "cache", server.url, FLAGS) as daemon:
            listed = server.counts.total(Kind.LIST)
            server.wait_for(lambda counts: counts.total(Kind.LIST) >= listed + 4)
            assert fetchers(daemon) == []


# Faults of GCS


def test_after_faults_that_pass_all_is_there_and_right(daemon: DaemonProcess, server: ServingGCS) -> None:
    """Every kind of fault at once, each met by two objects."""
    with kept(daemon, server):
        objects = put_new(server, len(PASSING), faults=PASSING)
        wait_for(lambda: are_cached(daemon, objects), LONG_S)
    assert all(server.counts.media[key_of(uri)] >= 2 for uri in objects)


def test_what_cannot_be_had_is_named_in_one_line_and_comes_when_it_can(daemon: DaemonProcess, server: ServingGCS) -> None:
    with kept(daemon, server):
        objects = put_new(server, 1, faults=[Status(500)], always=True)
        line = daemon.wait_for_line(f"fetch ({'|'.join(objects)}): gave up after 3 s and .* last: .*GCS returned 500")
        assert "planned again in" in line
        server.faults.clear()
        wait_for(lambda: are_cached(daemon, objects), LONG_S)


def test_an_object_that_changes_while_it_comes_is_the_new_one_in_the_end(daemon: DaemonProcess, server: ServingGCS) -> None:
    with kept(daemon, server):
        objects = put_new(server, 1, faults=[Stall(1000)])
        uri = next(iter(objects))
        server.wait_for(lambda counts: counts.media[key_of(uri)] == 1)
        objects[uri] = b"new" * 1000
        server.put(BUCKET, key_of(uri).partition("/")[2], objects[uri])
        wait_for(lambda: are_cached(daemon, objects), LONG_S)


# Faults of the processes


def held_up(server: ServingGCS, items: int) -> dict[str, bytes]:
    """New items, every object of which stops in the middle of its first GET; returns when all of them have."""
    objects = put_new(server, items, faults=[Stall(SIZE // 2)])
    server.wait_for(lambda counts: all(counts.media[key_of(uri)] for uri in objects))
    return objects


def test_what_a_killed_one_had_under_way_is_fetched_all_the_same(daemon: DaemonProcess, server: ServingGCS) -> None:
    with kept(daemon, server):
        objects, before = held_up(server, 10), fetchers(daemon)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: are_cached(daemon, objects), LONG_S)
        wait_for(lambda: at_work(daemon) == 2, LONG_S)
        assert not set(fetchers(daemon)) & set(before)
    for pid in before:
        assert "restarted in 1 s" in daemon.wait_for_line(f"stopped with status -9 .pid {pid}")


def test_kills_at_any_moment_lose_nothing(daemon: DaemonProcess, server: ServingGCS) -> None:
    with kept(daemon, server):
        for _ in range(8):
            gets = server.counts.total(Kind.MEDIA)
            objects = put_new(server, 30)
            server.wait_for(lambda counts, some=gets + 20: counts.total(Kind.MEDIA) >= some)  # type: ignore[misc]
            for pid in fetchers(daemon):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda some=objects: are_cached(daemon, some), LONG_S)  # type: ignore[misc]
    wait_for(lambda: daemon.stats()["cache"]["reserved_bytes"] == 0)
    files = [path for path in (daemon.cache_dir / "objects").rglob("*") if path.is_file()]
    assert daemon.stats()["cache"]["bytes"] == sum(path.stat().st_size for path in files)


def test_one_that_hangs_is_killed_and_its_work_done(daemon: DaemonProcess, server: ServingGCS) -> None:
    with kept(daemon, server):
        objects = held_up(server, 4)
        for pid in (stopped := fetchers(daemon)):
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: are_cached(daemon, objects), LONG_S)
    for pid in stopped:
        daemon.wait_for_line(f"hangs .pid {pid}")


def test_they_end_with_a_daemon_that_is_killed_and_the_next_one_starts_at_once(server: ServingGCS, tmp_path: Path) -> None:
    with fetching_daemon(server, tmp_path / "cache") as daemon:
        objects, pids = held_up(server, 10), fetchers(daemon)
        os.kill(daemon.pid, signal.SIGKILL)
        with fetching_daemon(server, tmp_path / "cache") as next_daemon:
            assert all(map(has_ended, pids))
            with kept(next_daemon, server):
                wait_for(lambda: are_cached(next_daemon, objects), LONG_S)


def test_a_stop_in_the_middle_of_their_downloads_is_clean(server: ServingGCS, tmp_path: Path) -> None:
    with fetching_daemon(server, tmp_path / "cache", ["--set", "deadline_s=60"]) as daemon:
        held_up(server, 10)
        pids = fetchers(daemon)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)  # as systemd does, which signals every process of a service
        daemon.stop()
        assert all(map(has_ended, pids))
        assert [path for path in (tmp_path / "cache/tmp").rglob("*") if path.is_file()] == []
        warnings = [line for line in daemon.lines() if " INFO " not in line]
        assert [line for line in warnings if "items are left out" not in line] == []  # listed between an image and its label


def test_a_stop_does_not_wait_for_one_that_hangs(server: ServingGCS, tmp_path: Path) -> None:
    with fetching_daemon(server, tmp_path / "cache", ["--set", "deadline_s=60"]) as daemon:
        held_up(server, 10)
        for pid in (pids := fetchers(daemon)):
            os.kill(pid, signal.SIGSTOP)
        daemon.stop()  # which is no clean one after stop_deadline_s
        assert all(map(has_ended, pids))
        assert [path for path in (tmp_path / "cache/tmp").rglob("*") if path.is_file()] == []


def test_they_import_nothing_from_where_the_daemon_was_started(server: ServingGCS, tmp_path: Path) -> None:
    """Training code has modules of the same names as Python's own."""
    with contextlib.chdir(tmp_path), fetching_daemon(server, tmp_path / "cache") as daemon:
        (tmp_path / "queue.py").write_text("raise SystemExit('not this one')")
        for pid in (before := fetchers(daemon)):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: at_work(daemon) == 2 and not set(fetchers(daemon)) & set(before))


# Faults of the disk


@needs_mount
def test_a_full_disk_is_an_error_and_what_fits_again_comes(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=8m") as disk, serving() as server:
        put_items(server, 2)
        (disk / "cache").mkdir()
        with fetching_daemon(server, disk / "cache", ["--cache-size", "8MB"]) as daemon:
            filler = disk / "filler"
            filler.write_bytes(bytes(6_000_000))
            objects = put_new(server, 15)
            daemon.wait_for_line("cache gs://.*: No space left on device")
            filler.unlink()
            wait_for(lambda: are_cached(daemon, objects), LONG_S)
            assert [path for path in (disk / "cache/tmp").rglob("*") if path.is_file()] == []
            assert at_work(daemon) == 2
