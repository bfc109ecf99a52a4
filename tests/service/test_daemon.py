"""The daemon from start to stop: what it fetches by itself, signals, systemd's protocol."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from gcs_prefetchd.service.manifest_store import list_manifest
from gcs_prefetchd.shared.checksums import read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient, read_daemon_file
from gcs_prefetchd.shared.errors import ObjectMissingError
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, parse_object_uri
from gcs_prefetchd.shared.paths import cache_path, cache_path_of_uri
from gcs_prefetchd.testing import GCSServer, Kind, ServingGCS, Stall, Status, serving
from support.daemons import BUCKET, COMMAND, DATA_ROOT, clean_environment, make_settings, put_items, running, start_arguments

ROOT = DataRoot.parse(DATA_ROOT)
CHANGED = ObjectName(BUCKET, "train/images/00001.jpg")


@contextmanager
def notify_socket(folder: Path) -> Iterator[socket.socket]:
    """What systemd listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(folder / "notify"))
        listener.settimeout(30)
        yield listener
    (folder / "notify").unlink()


@contextmanager
def in_foreground(
    cache_dir: Path, server: ServingGCS, extra: list[str] | None = None, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A daemon as systemd runs it; yields once it is ready, kills what is still there at the end."""
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


async def test_the_data_root_is_prefetched_before_any_reader_has_come(gcs: GCSServer, tmp_path: Path) -> None:
    objects = put_items(gcs, 20)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
        for uri, data in objects.items():
            assert read_checked(daemon.directory.objects, uri.removeprefix("gs://")) == data


async def test_room_that_is_free_is_filled_with_whole_items(gcs: GCSServer, tmp_path: Path) -> None:
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
        await daemon.cache.whole()
        assert len(daemon.cache) == 6
        with closing(DaemonClient(settings.cache_dir)) as client:
            assert (await asyncio.to_thread(client.manifest, DATA_ROOT)).items == 3
            assert await asyncio.to_thread(client.fetch, [f"{DATA_ROOT}/images/00001.jpg"]) == [""]


async def test_an_object_that_changed_in_the_bucket_is_dropped_when_the_data_root_is_listed_again(
    gcs: GCSServer, tmp_path: Path
) -> None:
    put_items(gcs, 3)
    settings = make_settings(tmp_path / "cache", gcs.url)
    async with running(settings) as daemon:
        await daemon.prefetcher.settled()
    gcs.put(BUCKET, "train/images/00001.jpg", b"relabelled")
    changed = f"{BUCKET}/train/images/00001.jpg"
    before = gcs.counts.media[changed]
    async with running(settings) as daemon:
        await gcs.wait_for(lambda counts: counts.media[changed] > before)
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, changed) == b"relabelled"


async def test_an_object_that_was_gone_from_the_bucket_for_a_listing_is_dropped_when_it_is_back(
    gcs: GCSServer, tmp_path: Path
) -> None:
    put_items(gcs, 3)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
        gcs.delete(BUCKET, CHANGED.name)
        await daemon.bucket_sync.relist(ROOT)
        gcs.put(BUCKET, CHANGED.name, b"back")
        await daemon.bucket_sync.relist(ROOT)
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, cache_path(CHANGED.bucket, CHANGED.name)) == b"back"


async def test_what_a_daemon_that_was_killed_had_not_dropped_yet_is_dropped_by_the_next(gcs: GCSServer, tmp_path: Path) -> None:
    """Killed after it had saved a listing, or before it had made one of a data root whose objects were here."""
    put_items(gcs, 3)
    settings = make_settings(tmp_path / "cache", gcs.url)
    async with running(settings) as daemon:
        await daemon.prefetcher.settled()
        gcs.put(BUCKET, CHANGED.name, b"relabelled")
        (await list_manifest(daemon.gcs_client, ROOT, settings.item_patterns)).save(daemon.directory.manifests)
    async with running(settings) as daemon:
        await daemon.bucket_sync.relist(ROOT)
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, cache_path(CHANGED.bucket, CHANGED.name)) == b"relabelled"
    gcs.put(BUCKET, CHANGED.name, b"again")
    shutil.rmtree(tmp_path / "cache/manifests")
    async with running(settings) as daemon:
        await gcs.wait_for(lambda counts: counts.media[f"{BUCKET}/{CHANGED.name}"] == 3)
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, cache_path(CHANGED.bucket, CHANGED.name)) == b"again"


async def test_what_is_under_way_while_the_data_root_is_listed_is_dropped_where_it_has_changed(
    gcs: GCSServer, tmp_path: Path
) -> None:
    objects = put_items(gcs, 3, size_bytes=1000)
    async with running(make_settings(tmp_path / "cache", gcs.url, window_items=1, cache_size=3500)) as daemon:
        await daemon.prefetcher.settled()  # one item is here, and there is room for half of another
        name = next(name for name in map(parse_object_uri, objects) if daemon.cache.stamp(cache_path_of_uri(name.uri)) is None)
        gcs.faults.add(Stall(after_bytes=10), f"{BUCKET}/{name.name}")
        demanded = asyncio.create_task(daemon.prefetcher.demand(name))
        await gcs.wait_for(lambda counts: counts.open_media > 0)
        gcs.put(BUCKET, name.name, b"r" * 2000)  # no room for it beside its label
        relisting = asyncio.create_task(daemon.bucket_sync.relist(ROOT))
        await asyncio.wait([relisting], timeout=0.5)  # one that did not wait for the download would have ended
        gcs.release()
        await demanded
        await relisting
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, cache_path_of_uri(name.uri)) != objects[name.uri]


async def test_a_missing_bucket_ends_the_start_and_frees_the_directory(gcs: GCSServer, tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "cache", gcs.url, data_roots=["gs://no-such-bucket"])
    with pytest.raises(ObjectMissingError, match=r"gs://no-such-bucket/images/"):
        async with running(settings):
            pass
    put_items(gcs, 1)
    async with running(make_settings(tmp_path / "cache", gcs.url)):
        pass


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_with_status_0(server: ServingGCS, tmp_path: Path, signum: int) -> None:
    with in_foreground(tmp_path / "cache", server) as process:
        process.send_signal(signum)
        assert process.wait(20) == 0
    assert not (tmp_path / "cache/daemon.json").exists()
    assert not (tmp_path / "cache/daemon.sock").exists()
    assert not any(path.is_file() for path in (tmp_path / "cache/tmp").rglob("*"))


def test_downloads_under_way_do_not_hold_up_a_stop(tmp_path: Path) -> None:
    with serving() as server:
        put_items(server, 6)
        server.faults.add(Stall(after_bytes=10))
        with in_foreground(tmp_path / "cache", server) as process:
            server.wait_for(lambda counts: counts.open_media > 0)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert not any(path.is_file() for path in (tmp_path / "cache/tmp").rglob("*"))


def test_a_signal_during_the_start_ends_it_at_once(tmp_path: Path) -> None:
    with serving() as server:
        put_items(server, 2)
        server.faults.add(Stall(), kind=Kind.LIST)
        command = [*COMMAND, "start", *start_arguments(tmp_path / "cache", server.url), "--foreground"]
        with subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, text=True) as process:
            server.wait_for(lambda counts: counts.total(Kind.LIST) > 0)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0


def test_systemd_is_told_of_the_start_the_watchdog_and_the_stop(server: ServingGCS, tmp_path: Path) -> None:
    with notify_socket(tmp_path) as listener:
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000"}
        command = [*COMMAND, "start", *start_arguments(tmp_path / "cache", server.url), "--foreground"]
        with subprocess.Popen(command, env=clean_environment() | environment, stderr=subprocess.DEVNULL) as process:
            told = [listener.recv(100)]
            while {b"READY=1", b"WATCHDOG=1"} - set(told):
                told.append(listener.recv(100))
            process.send_signal(signal.SIGTERM)
            while told[-1] != b"STOPPING=1":
                told.append(listener.recv(100))
            assert process.wait(20) == 0


def test_a_foreground_daemon_logs_to_stderr_and_at_the_level_that_was_set(server: ServingGCS, tmp_path: Path) -> None:
    with in_foreground(tmp_path / "cache", server) as process:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert "INFO ready: statistics at http://127.0.0.1:" in log
    with in_foreground(tmp_path / "cache", server, ["--set", "log_level=error"]) as process:
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[1] == ""


def test_a_killed_daemon_leaves_a_directory_that_the_next_one_takes(server: ServingGCS, tmp_path: Path) -> None:
    with in_foreground(tmp_path / "cache", server) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert (tmp_path / "cache/daemon.sock").exists()
    with in_foreground(tmp_path / "cache", server) as process:
        about = read_daemon_file(tmp_path / "cache")
        assert about["pid"] == process.pid
        with closing(DaemonClient(tmp_path / "cache")) as client:
            assert client.status().instance_id == about["instance_id"]


def test_the_cache_is_for_the_user_and_the_group_alone(server: ServingGCS, tmp_path: Path) -> None:
    with in_foreground(tmp_path / "cache", server):
        with closing(DaemonClient(tmp_path / "cache")) as client:
            everything = [f"{DATA_ROOT}/{part}" for i in range(6) for part in (f"images/{i:05}.jpg", f"labels/{i:05}.png")]
            assert set(client.fetch(everything)) == {""}  # nothing comes and goes in tmp/ any more
        for folder, _, files in os.walk(tmp_path / "cache"):
            for path in (Path(folder), *(Path(folder) / name for name in files)):
                others, group_writes = 0o007, 0 if path.is_socket() else 0o020
                assert path.stat().st_mode & (others | group_writes) == 0, path


def test_what_it_starts_with_is_written_for_others_to_find(server: ServingGCS, tmp_path: Path) -> None:
    with in_foreground(tmp_path / "cache", server) as process:
        about = json.loads((tmp_path / "cache/daemon.json").read_text())
        assert about["pid"] == process.pid
        assert about["data_roots"] == [DATA_ROOT]
        assert about["socket"] == str(tmp_path / "cache/daemon.sock")
        assert about["http"].startswith("http://127.0.0.1:")
