"""Disks that are full, fail or become read-only under a daemon: hits work, misses are errors, and later all works again."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from gcs_prefetchd.cache.object_writer import BUFFER_BYTES
from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.shared.errors import CacheWriteError
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.testing import ServingGCS, serving
from support.caches import content, file_of, index_elsewhere, mounted, needs_mount, opened, put, version_of
from support.daemons import BUCKET, DATA_ROOT, put_items, run_command, start_arguments
from support.faults import ext4_disk, faulted_daemon, promises, wait_for

pytestmark = needs_mount

BAD, GOOD = (f"{DATA_ROOT}/images/{name}.jpg" for name in ("bad", "good"))
DATA = content(1, 200_000)
PAGE = 4096


@pytest.fixture
def server() -> Iterator[ServingGCS]:
    with serving() as server:
        put_items(server, 2, size_bytes=20_000)
        for uri in (BAD, GOOD):
            server.put(BUCKET, uri.removeprefix(f"gs://{BUCKET}/"), DATA)
        yield server


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size_bytes in (1 << 20, PAGE, 1):
            try:
                while True:
                    file.write(bytes(size_bytes))
            except OSError:
                os.fsync(file.fileno())


def take_all_inodes(disk: Path) -> None:
    (disk / "fillers").mkdir()
    try:
        for number in range(1 << 20):
            (disk / f"fillers/{number}").touch()
    except OSError:
        return


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 pages in memory, with the index elsewhere."""
    with mounted(tmp_path / "disk", "tmpfs", f"size={300 * PAGE}") as disk:
        index_elsewhere(disk, tmp_path / "index")
        yield disk


@contextmanager
def full(disk: Path) -> Iterator[None]:
    fill(disk)
    yield
    (disk / "filler").unlink()


@contextmanager
def without_inodes(disk: Path) -> Iterator[None]:
    take_all_inodes(disk)
    yield
    shutil.rmtree(disk / "fillers")


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    # Mounted over itself: remounting a disk is refused while files are open for writing, except after errors, which stay.
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


Fault = Callable[[Path], AbstractContextManager[None]]


@pytest.mark.parametrize(
    ("fault", "cause"), [(full, "No space left"), (without_inodes, "No space left"), (read_only, "Read-only")]
)
def test_while_the_disk_refuses_writes_hits_work_and_misses_are_errors_and_then_all_works(
    fault: Fault, cause: str, server: ServingGCS, tmp_path: Path
) -> None:
    extra = [*("--cache-size", "20MB"), *("--set", "relist_s=3")]
    with ext4_disk(tmp_path / "disk") as disk, faulted_daemon(disk, server.url, extra) as daemon:
        hit = f"{DATA_ROOT}/images/00000.jpg"
        before = daemon.read(hit)
        assert isinstance(before, bytes)
        with promises(daemon, GOOD, DATA):
            with fault(disk):
                assert daemon.read(hit) == before
                error = daemon.read(BAD)
                assert isinstance(error, str)
                assert error.startswith(f"cache {BAD}: {cause}")
                put_items(server, 3, size_bytes=20_000)  # all are new generations, and one item is new
                wait_for(lambda: any("cannot save its listing" in line for line in daemon.lines()))
                assert daemon.read(hit) == before
            assert daemon.read(BAD) == DATA
            wait_for(lambda: len(daemon.client.cached_objects()) >= 7, 20)
        assert len(daemon.lines_about(BAD)) == 1
        daemon.stop()


@pytest.mark.parametrize(
    ("fault", "cause"), [(full, "disk is full"), (without_inodes, "No space left on device"), (read_only, "not writable")]
)
def test_a_start_on_a_disk_that_refuses_writes_is_a_one_line_error_and_loses_nothing(
    fault: Fault, cause: str, server: ServingGCS, tmp_path: Path
) -> None:
    extra = ["--cache-size", "20MB"]
    hit = f"{DATA_ROOT}/images/00000.jpg"
    with ext4_disk(tmp_path / "disk") as disk:
        with faulted_daemon(disk, server.url, extra) as daemon:
            before = daemon.read(hit)
            wait_for(lambda: len(daemon.client.cached_objects()) == 4)
            daemon.stop()
        index = (disk / "index/cache.db").stat()
        with fault(disk):
            tried = run_command("start", *start_arguments(disk, server.url, extra))
            assert tried.returncode == 1
            assert tried.stderr.count("\n") == 1
            assert str(disk) in tried.stderr
            assert cause in tried.stderr
        assert (disk / "index/cache.db").stat().st_ino == index.st_ino  # which has the order of use
        with faulted_daemon(disk, server.url, extra) as daemon:
            assert daemon.read(hit) == before
            assert server.counts.media[hit.removeprefix("gs://")] == 1
            daemon.stop()


def change_attributes(change: str, file: Path) -> None:
    subprocess.run(["chattr", change, file], check=True)


async def test_a_file_that_cannot_be_removed_still_counts_and_objects_that_need_its_space_fail(tmp_path: Path) -> None:
    with ext4_disk(tmp_path / "disk") as disk:
        async with opened(disk, 1_000_000) as cache:
            path = await put(cache, "a.jpg", content(1, 600_000))
            change_attributes("+i", file_of(cache, path))
            with pytest.raises(
                CacheWriteError, match=r"^cache gs://pictures/b\.jpg: no space for 600 KB: pictures/a\.jpg cannot be"
            ):
                await put(cache, "b.jpg", content(2, 600_000))
            assert (cache.bytes, cache.capacity.reserved_bytes) == (600_000, 0)
            assert await cache.check() == []
            change_attributes("-i", file_of(cache, path))
            await put(cache, "b.jpg", content(2, 600_000))
            assert (cache.bytes, cache.capacity.reserved_bytes) == (600_000, 0)
            assert await cache.check() == []


async def test_one_file_that_cannot_be_removed_does_not_keep_the_others(tmp_path: Path) -> None:
    with ext4_disk(tmp_path / "disk") as disk:
        async with opened(disk, 1_000_000) as cache:
            paths = [await put(cache, f"{i}.jpg", content(i, 300_000)) for i in range(3)]
            change_attributes("+i", file_of(cache, paths[0]))
            with pytest.raises(CacheWriteError):
                await put(cache, "next.jpg", content(9, 300_000))
            await put(cache, "next.jpg", content(9, 300_000))
            assert await cache.check() == []
            change_attributes("-i", file_of(cache, paths[0]))


async def test_what_a_download_has_written_counts_once_against_the_free_space(small_disk: Path) -> None:
    floor, large = 20 * PAGE, content(1, BUFFER_BYTES)  # of 1,200 KB
    async with opened(small_disk, 10 * BUFFER_BYTES, floor) as cache:
        kept = await put(cache, "kept.jpg", b"kept")
        async with Reservation(cache, ObjectName(BUCKET, "large.jpg")).writer() as writer:
            await writer.start(version_of("large.jpg", large))
            await writer.write(large)
            await put(cache, "small.jpg", b"small")
            assert shutil.disk_usage(small_disk).free >= floor
            await writer.start(version_of("large.jpg", large))  # from the first byte on again
            await writer.write(large)
            await writer.publish(version_of("large.jpg", large))
        assert cache.stamp(kept) is not None
        assert cache.evictions == cache.capacity.written_bytes == 0
        assert await cache.check() == []


async def test_a_download_that_fails_leaves_nothing_counted_as_written(small_disk: Path) -> None:
    data = content(1, BUFFER_BYTES)
    async with opened(small_disk, 10 * BUFFER_BYTES, PAGE) as cache:
        async with Reservation(cache, ObjectName(BUCKET, "large.jpg")).writer() as writer:
            await writer.start(version_of("large.jpg", data))
            await writer.write(data)
            assert cache.capacity.written_bytes == len(data)
        assert (cache.capacity.written_bytes, cache.capacity.reserved_bytes) == (0, 0)
        assert cache.directory.leftover_files() == []
