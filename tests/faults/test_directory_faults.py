"""People and programs change the directory of a running daemon: right bytes or an error, and every promise holds."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.service.manifest_store import load_newest_manifest, remove_old_manifests
from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.paths import cache_path_of_uri
from gcs_prefetchd.testing import ServingGCS
from support.caches import content, opened, put, rows
from support.caches import file_of as file_at
from support.daemons import BUCKET, run_command, start_arguments
from support.datasets import manifest_of
from support.faults import DaemonProcess, faulted_daemon, promises

pytestmark = pytest.mark.xdist_group("directory_faults")  # in one process: they share a costly fixture

DATA = bytes(range(256)) * 400
# Root may read everything; without these capabilities it is refused like other users.
AS_ANYBODY = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
needs_setpriv = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")


@pytest.fixture(scope="module")
def daemon(server: ServingGCS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon for all tests that leave its directory as it was; it keeps some of the disk free, as by default."""
    extra = ["--set", "deadline_s=3", "--set", "min_free=1MB"]
    under = AS_ANYBODY if not needs_setpriv.args[0] else []
    with faulted_daemon(tmp_path_factory.mktemp("directory") / "cache", server.url, extra, under=under) as daemon:
        yield daemon


@pytest.fixture
def objects(request: pytest.FixtureRequest, server: ServingGCS) -> tuple[str, str]:
    """The URIs of two new objects: one for the fault, and a good one."""
    test = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    for name in ("bad", "good"):
        server.put(BUCKET, f"train/{test}/{name}.jpg", DATA)
    return f"gs://{BUCKET}/train/{test}/bad.jpg", f"gs://{BUCKET}/train/{test}/good.jpg"


def file_of(daemon: DaemonProcess, uri: str) -> Path:
    return daemon.cache_dir / "objects" / cache_path_of_uri(uri)


# --- Files


def truncate(file: Path) -> None:
    os.truncate(file, len(DATA) // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def zero(file: Path) -> None:
    file.write_bytes(bytes(len(DATA)))


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")


def flip(file: Path) -> None:
    file.write_bytes(b"\x01" + DATA[1:])


def swap(file: Path) -> None:
    """Replace the file by another object's, with its stamp."""
    other = next(path for path in (file.parents[1] / "images").iterdir())
    file.unlink()
    shutil.copy2(other, file)


def put_a_foreign_file(file: Path) -> None:
    file.unlink()
    file.write_text("mine")


def put_a_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


def put_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_a_device(file: Path) -> None:
    file.unlink()
    os.mknod(file, 0o20666, os.makedev(1, 5))  # /dev/zero


def close_to_all(file: Path) -> None:
    file.chmod(0)


ROOT_ONLY = [pytest.param(put_a_device, marks=needs_setpriv), pytest.param(close_to_all, marks=needs_setpriv)]
DAMAGE = [truncate, empty, zero, grow, flip, swap, put_a_foreign_file, put_a_link, put_a_pipe, Path.unlink, *ROOT_ONLY]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_cached_file_that_is_damaged_replaced_or_unreadable_is_fetched_again(
    daemon: DaemonProcess, objects: tuple[str, str], server: ServingGCS, damage: Callable[[Path], None]
) -> None:
    bad, good = objects
    assert daemon.client.fetch([f"gs://{BUCKET}/train/images/00000.jpg", bad]) == ["", ""]
    with promises(daemon, good, DATA):
        damage(file_of(daemon, bad))
        assert daemon.client.fetch([bad]) == [""]  # as a reader does whose own read failed
        assert daemon.cached(bad) == DATA
    assert server.counts.media[bad.removeprefix("gs://")] == 2
    assert file_of(daemon, bad).stat().st_mode & 0o777 == 0o640


def test_a_folder_in_place_of_a_file_is_an_error_that_names_the_object_until_it_is_gone(
    daemon: DaemonProcess, objects: tuple[str, str]
) -> None:
    bad, good = objects
    with promises(daemon, good, DATA):
        (file_of(daemon, bad) / "folder").mkdir(parents=True)
        assert daemon.read(bad) == f"cache {bad}: Is a directory ({daemon.cache_dir})"
        assert (file_of(daemon, bad) / "folder").is_dir()
        shutil.rmtree(file_of(daemon, bad))
        assert daemon.read(bad) == DATA
    (line,) = daemon.lines_about(bad)
    assert "Is a directory" in line


# --- Links


def test_a_link_in_place_of_a_folder_is_not_followed_whatever_its_target(
    daemon: DaemonProcess, objects: tuple[str, str], tmp_path: Path
) -> None:
    bad, good = objects
    folder = file_of(daemon, bad).parent
    with promises(daemon, good, DATA, entries_stay=False):
        assert daemon.read(bad) == DATA
        folder.rename(tmp_path / "outside")
        folder.symlink_to(tmp_path / "outside")
        (tmp_path / "outside/bad.jpg").write_text("mine")
        error = daemon.read(bad)
        assert isinstance(error, str)
        assert bad in error
        assert "symbolic link" in error
        assert [path.name for path in (tmp_path / "outside").iterdir()] == ["bad.jpg"]
        assert (tmp_path / "outside/bad.jpg").read_text() == "mine"
        folder.unlink()
        assert daemon.read(bad) == DATA


@pytest.mark.parametrize("folder", ["objects", "tmp", "manifests"])
def test_a_directory_with_a_link_for_a_folder_is_refused_at_the_start_and_its_target_untouched(
    folder: str, server: ServingGCS, tmp_path: Path
) -> None:
    with faulted_daemon(tmp_path / "cache", server.url) as daemon:
        daemon.stop()
    (tmp_path / "cache" / folder).rename(tmp_path / "moved")
    (tmp_path / "cache" / folder).symlink_to(tmp_path / "outside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious").touch()

    refused = run_command("start", *start_arguments(tmp_path / "cache", server.url))

    assert refused.returncode == 1
    assert refused.stderr == f"gcs-prefetchd: cache directory {tmp_path}/cache: {folder} is a symbolic link; remove it\n"
    assert (tmp_path / "outside/precious").exists()


# --- The directory


@contextmanager
def renamed(cache_dir: Path) -> Iterator[None]:
    elsewhere = cache_dir.with_name("elsewhere")
    cache_dir.rename(elsewhere)
    yield
    elsewhere.rename(cache_dir)


@contextmanager
def replaced_by_an_empty_one(cache_dir: Path) -> Iterator[None]:
    with renamed(cache_dir):
        cache_dir.mkdir()
        yield
        cache_dir.rmdir()  # which fails if anything was written there


@contextmanager
def replaced_by_a_link(cache_dir: Path) -> Iterator[None]:
    with renamed(cache_dir):
        outside = cache_dir.with_name("outside")
        for folder in ("objects/pictures", "tmp"):
            (outside / folder).mkdir(parents=True)
        for number in range(256):
            (outside / f"tmp/{number:02x}").mkdir()
        cache_dir.symlink_to(outside)
        yield
        assert [path for path in outside.rglob("*") if not path.is_dir()] == []
        cache_dir.unlink()


@contextmanager
def closed_by_its_mode(cache_dir: Path) -> Iterator[None]:
    cache_dir.chmod(0)
    yield
    cache_dir.chmod(0o750)


@contextmanager
def without_its_objects_for_a_while(cache_dir: Path) -> Iterator[None]:
    (cache_dir / "objects").rename(cache_dir.with_name("elsewhere"))
    (cache_dir / "objects").touch()
    yield
    (cache_dir / "objects").unlink()
    cache_dir.with_name("elsewhere").rename(cache_dir / "objects")


REMOVALS = [
    renamed,
    replaced_by_an_empty_one,
    replaced_by_a_link,
    pytest.param(closed_by_its_mode, marks=needs_setpriv),
    without_its_objects_for_a_while,
]


@pytest.mark.parametrize("removed", REMOVALS)
def test_a_directory_that_is_moved_away_and_back_loses_nothing_and_works_again(
    daemon: DaemonProcess, objects: tuple[str, str], removed: Callable[[Path], ExitStack]
) -> None:
    """Its socket is deleted, too, so that no reader reaches it; prefetching and rescans continue."""
    bad, good = objects
    daemon.client.fetch([f"gs://{BUCKET}/train/images/00000.jpg"])
    with promises(daemon, good, DATA):
        daemon.client.status()  # open a connection before the socket's path is gone
        with removed(daemon.cache_dir):
            (error,) = daemon.client.fetch([bad])
            assert bad in error
            assert str(daemon.cache_dir) in error
        assert daemon.read(bad) == DATA


def test_a_daemon_whose_directory_was_deleted_continues_and_leaves_the_next_daemon_alone(
    server: ServingGCS, tmp_path: Path, objects: tuple[str, str]
) -> None:
    cache_dir = tmp_path / "cache"
    with faulted_daemon(cache_dir, server.url, ["--set", "rescan_s=1"]) as first:
        assert first.read(objects[0]) == DATA
        shutil.rmtree(cache_dir)
        (error,) = first.client.fetch([objects[1]])
        assert error.startswith(f"cache {objects[1]}: ")
        assert not cache_dir.exists()
        with faulted_daemon(cache_dir, server.url) as second:
            assert second.read(objects[0]) == DATA
            (error,) = first.client.fetch([objects[1]])
            assert objects[1] in error
            first.stats()
            first.stop()
            assert second.read(objects[0]) == second.read(objects[1]) == DATA
            assert second.client.status().pid == second.pid
            second.stop()


def test_folders_of_tmp_that_were_removed_are_created_again(daemon: DaemonProcess, objects: tuple[str, str]) -> None:
    """Some systems clean up every folder named tmp."""
    bad, good = objects
    with promises(daemon, good, DATA):
        shutil.rmtree(daemon.cache_dir / "tmp")
        assert daemon.read(bad) == DATA


# --- The index


def write_garbage(cache_dir: Path) -> None:
    (cache_dir / "index/cache.db").write_bytes(b"garbage" * 10_000)


def remove(cache_dir: Path) -> None:
    shutil.rmtree(cache_dir / "index")


def change_its_form(cache_dir: Path) -> None:
    with rows(cache_dir) as index:
        index.executescript("DROP TABLE Cache; CREATE TABLE Cache (a, b)")


@pytest.mark.parametrize("damage", [write_garbage, remove, change_its_form])
def test_an_index_damaged_while_the_daemon_runs_costs_nothing_and_is_rebuilt_at_the_next_start(
    damage: Callable[[Path], None], server: ServingGCS, tmp_path: Path, objects: tuple[str, str]
) -> None:
    bad, good = objects
    with faulted_daemon(tmp_path / "cache", server.url) as daemon:
        assert daemon.read(bad) == DATA
        with promises(daemon, good, DATA):
            damage(tmp_path / "cache")
        daemon.stop()
    with faulted_daemon(tmp_path / "cache", server.url) as daemon:
        for uri in (bad, good):
            assert daemon.client.fetch([uri]) == [""]
            assert server.counts.media[uri.removeprefix("gs://")] == 1
        daemon.stop()


def test_an_index_locked_by_another_program_costs_nothing_but_a_warning(
    daemon: DaemonProcess, objects: tuple[str, str]
) -> None:
    bad, good = objects
    with rows(daemon.cache_dir) as index:
        index.execute("BEGIN EXCLUSIVE")
        with promises(daemon, good, DATA):
            assert daemon.read(bad) == DATA
        with pytest.raises(sqlite3.OperationalError, match="within a transaction"):
            index.execute("BEGIN")
        index.execute("ROLLBACK")


async def test_rows_of_another_version_are_rebuilt_from_the_files_before_any_space_is_reserved(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        paths = [await put(cache, f"{i}.jpg", content(i, 200_000)) for i in range(4)]
    with rows(tmp_path / "cache") as index:
        index.execute("UPDATE Cache SET value = value || ' of a newer version' WHERE key = ?", paths[:1])
        index.execute("UPDATE Cache SET value = '200000' WHERE key = ?", paths[1:2])
    async with opened(tmp_path / "cache") as cache:
        assert (len(cache), cache.bytes) == (4, 800_000)
        await put(cache, "next.jpg", content(9, 400_000))
        assert await cache.check() == []


# --- Rescans and the clock


async def test_a_rescan_forgets_nothing_while_the_directory_is_away(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    paths = [await put(cache, f"{i}.jpg", content(i, 300_000)) for i in range(3)]
    with renamed(cache.directory.path):
        assert await cache.rescan() == (0, 0)
        await cache.check_file(paths[0])
    assert (len(cache), cache.bytes) == (3, 900_000)
    assert f"{cache.directory.objects}: not compared" in caplog.text
    assert await cache.rescan() == (0, 0)


async def test_files_behind_a_link_are_no_longer_cached(cache: Cache, tmp_path: Path) -> None:
    path = await put(cache, "train/a.jpg", b"a")
    folder = file_at(cache, path).parent
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    assert await cache.rescan() == (0, 1)
    assert read_checked(tmp_path / "outside", "a.jpg") is None  # its stamp is valid for its own path only
    assert (tmp_path / "outside/a.jpg").read_bytes() == b"a"


async def test_an_eviction_removes_nothing_behind_a_link(cache: Cache, tmp_path: Path) -> None:
    path = await put(cache, "train/a.jpg", content(1, 600_000))
    folder = file_at(cache, path).parent
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    await put(cache, "b.jpg", content(2, 600_000))
    assert (tmp_path / "outside/a.jpg").read_bytes() == content(1, 600_000)


def test_a_listing_is_the_newest_and_stays_whatever_the_clock_was_before(tmp_path: Path) -> None:
    ahead_s = time.time() + 365 * 86_400
    for generation in range(1, 10):
        folder = manifest_of(2, generation).save(tmp_path)
        os.utime(folder, (ahead_s, ahead_s))
    newest = manifest_of(2, 10)
    newest.save(tmp_path)
    remove_old_manifests(tmp_path, newest.data_root)
    found = load_newest_manifest(tmp_path, newest.data_root, newest.item_patterns)
    assert found is not None
    assert found.digest == newest.digest
    assert len(list(tmp_path.iterdir())) == 8
