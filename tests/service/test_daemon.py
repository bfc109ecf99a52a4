"""The daemon from start to stop: what it fetches on its own, signals, and systemd's protocol."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient, read_daemon_file
from gcs_prefetchd.shared.errors import ObjectMissingError
from gcs_prefetchd.testing import GCSServer, Kind, ServingGCS, Stall, Status, serving
from support.daemons import COMMAND, DATA_ROOT, clean_environment, make_settings, put_items, running, start_arguments


@contextmanager
def notify_socket(folder: Path) -> Iterator[socket.socket]:
    """The socket on which systemd would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(folder / "notify"))
        listener.settimeout(30)
        yield listener
    (folder / "notify").unlink()


@contextmanager
def in_foreground(
    cache_dir: Path, server: ServingGCS, extra: list[str] | None = None, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A daemon as systemd runs it. Yields when it is ready, and kills it at the end if it still runs."""
    with notify_socket(cache_dir.parent) as listener:
        environment |= {"NOTIFY_SOCKET": str(cache_dir.parent / "notify")}
        command = [*COMMAND, "start", *start_arguments(cache_dir, server.url, extra or []), "--foreground"]
        with subprocess.Popen(command, env=clean_environment() | environment, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert listener.recv(100) == b"READY=1"
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[ServingGCS]:
    """A server with six items."""
    with serving() as server:
        put_items(server, 6)
        yield server


async def test_the_data_root_is_prefetched_before_any_reader_connects(gcs: GCSServer, tmp_path: Path) -> None:
    objects = put_items(gcs, 20)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
        for uri, data in objects.items():
            assert read_checked(daemon.directory.objects, uri.removeprefix("gs://")) == data


async def test_free_space_is_filled_with_complete_items(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 20, size_bytes=1000)
    async with running(make_settings(tmp_path / "cache", gcs.url, cache_size=7500, window_items=1)) as daemon:
        await daemon.prefetcher.settled()
        names = [Path(path).stem for page in daemon.cache.pages() for path in page]
        assert len(names) == 6
        assert all(names.count(name) == 2 for name in names)


async def test_a_start_without_gcs_serves_what_was_cached(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 3)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
    gcs.faults.add(Status(503), kind=Kind.LIST)
    settings = make_settings(tmp_path / "cache", gcs.url, deadline_s=0.5)
    async with running(settings) as daemon:
        await daemon.cache.wait_until_ready()
        assert len(daemon.cache) == 6
        with closing(DaemonClient(settings.cache_dir)) as client:
            assert (await asyncio.to_thread(client.manifest, DATA_ROOT)).items == 3
            assert await asyncio.to_thread(client.fetch, [f"{DATA_ROOT}/images/00001.jpg"]) == [""]


async def test_a_missing_bucket_fails_the_start_and_frees_the_directory(gcs: GCSServer, tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "cache", gcs.url, data_roots=["gs://no-such-bucket"])
    with pytest.raises(ObjectMissingError, match=r"gs://no-such-bucket/images/"):
        async with running(settings):
            pass
    put_items(gcs, 1)
    async with running(make_settings(tmp_path / "cache", gcs.url)):
        pass


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_daemon_cleanly_with_status_0(server: ServingGCS, tmp_path: Path, signum: int) -> None:
    with in_foreground(tmp_path / "cache", server) as process:
        process.send_signal(signum)
        assert process.wait(20) == 0
    assert not (tmp_path / "cache/daemon.json").exists()
    assert not (tmp_path / "cache/daemon.sock").exists()
    assert not any(path.is_file() for path in (tmp_path / "cache/tmp").rglob("*"))


def test_downloads_in_progress_do_not_delay_a_stop(tmp_path: Path) -> None:
    with serving() as server:
        put_items(server, 6)
        server.faults.add(Stall(after_bytes=10))
        with in_foreground(tmp_path / "cache", server) as process:
            server.wait_for(lambda counts: counts.open_media > 0)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert not any(path.is_file() for path in (tmp_path / "cache/tmp").rglob("*"))


def test_a_signal_during_the_start_stops_it_at_once(tmp_path: Path) -> None:
    with serving() as server:
        put_items(server, 2)
        server.faults.add(Stall(), kind=Kind.LIST)
        command = [*COMMAND, "start", *start_arguments(tmp_path / "cache", server.url), "--foreground"]
        with subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, text=True) as process:
            server.wait_for(lambda counts: counts.total(Kind.LIST) > 0)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0


def test_systemd_is_notified_of_the_start_the_watchdog_and_the_stop(server: ServingGCS, tmp_path: Path) -> None:
    with notify_socket(tmp_path) as listener:
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000"}
        command = [*COMMAND, "start", *start_arguments(tmp_path / "cache", server.url), "--foreground"]
        with subprocess.Popen(command, env=clean_environment() | environment, stderr=subprocess.DEVNULL) as process:
            received = [listener.recv(100)]
            while {b"READY=1", b"WATCHDOG=1"} - set(received):
                received.append(listener.recv(100))
            process.send_signal(signal.SIGTERM)
            while received[-1] != b"STOPPING=1":
                received.append(listener.recv(100))
            assert process.wait(20) == 0


def test_a_foreground_daemon_logs_to_stderr_at_the_level_of_the_setting(server: ServingGCS, tmp_path: Path) -> None:
    with in_foreground(tmp_path / "cache", server) as process:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert "INFO ready: statistics at http://127.0.0.1:" in log
    with in_foreground(tmp_path / "cache", server, ["--set", "log_level=error"]) as process:
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[1] == ""


def test_a_killed_daemon_leaves_a_directory_that_the_next_one_can_claim(server: ServingGCS, tmp_path: Path) -> None:
    with in_foreground(tmp_path / "cache", server) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert (tmp_path / "cache/daemon.sock").exists()
    with in_foreground(tmp_path / "cache", server) as process:
        daemon_file = read_daemon_file(tmp_path / "cache")
        assert daemon_file["pid"] == process.pid
        with closing(DaemonClient(tmp_path / "cache")) as client:
            assert client.status().instance_id == daemon_file["instance_id"]


def test_only_the_user_and_the_group_can_access_the_cache(server: ServingGCS, tmp_path: Path) -> None:
    with in_foreground(tmp_path / "cache", server):
        with closing(DaemonClient(tmp_path / "cache")) as client:
            everything = [f"{DATA_ROOT}/{part}" for i in range(6) for part in (f"images/{i:05}.jpg", f"labels/{i:05}.png")]
            assert set(client.fetch(everything)) == {""}  # no files appear and disappear in tmp/ any more
        for folder, _, files in os.walk(tmp_path / "cache"):
            for path in (Path(folder), *(Path(folder) / name for name in files)):
                others, group_writes = 0o007, 0 if path.is_socket() else 0o020
                assert path.stat().st_mode & (others | group_writes) == 0, path


def test_daemon_json_names_the_process_and_its_addresses(server: ServingGCS, tmp_path: Path) -> None:
    with in_foreground(tmp_path / "cache", server) as process:
        daemon_file = json.loads((tmp_path / "cache/daemon.json").read_text())
        assert daemon_file["pid"] == process.pid
        assert daemon_file["data_roots"] == [DATA_ROOT]
        assert daemon_file["socket"] == str(tmp_path / "cache/daemon.sock")
        assert daemon_file["http"].startswith("http://127.0.0.1:")
