"""A power cut: the next daemon finds what the disk had at some moment, and nothing else. No wrong byte is read."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gcs_prefetchd.shared.checked_read import read_checked
from support.caches import content, needs_mount, opened, put
from support.faults import Tally, ext4_disk

pytestmark = needs_mount

LIMIT = 10_000_000
SIZE = 30_000


async def publish(disk: Path, publications: int, copy: Callable[[], object]) -> dict[bytes, str]:
    """Publish objects, some of which replace other generations, and copy the disk meanwhile; returns their paths."""
    published = {}
    async with opened(disk, LIMIT) as cache:

        async def publish_one(number: int, name: int) -> None:
            data = content(number, SIZE)
            published[data] = await put(cache, f"images/{name}.jpg", data, generation=number + 1)

        for number in range(publications // 2):
            await publish_one(number, number % 40)
        await asyncio.to_thread(sync, disk)
        for number in range(publications // 2, publications):
            await publish_one(number, number % 40 if number % 2 else number)
        # Another program syncs a file of its own, and with it the names of all files, but not their bytes.
        await asyncio.to_thread(write_and_sync, disk / "other")
        copying = asyncio.create_task(asyncio.to_thread(copy))
        for number in range(publications, publications + 20):
            await publish_one(number, number)
        await copying
    return published


def sync(disk: Path) -> None:
    subprocess.run(["sync", "-f", disk], check=True)


def write_and_sync(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(b"x")
        os.fsync(stream.fileno())


async def open_after_power_cut(disk: Path, published: dict[bytes, str], tally: Tally) -> int:
    """Open the directory as the next daemon does; returns how many files the power cut left empty or damaged."""
    files = [path.relative_to(disk / "objects").as_posix() for path in (disk / "objects").rglob("*.jpg")]
    read = {path: read_checked(disk / "objects", path) for path in files}
    complete = {path: data for path, data in read.items() if data is not None}
    tally.repetitions += len(files)
    tally.wrong_bytes += sum(published.get(data) != path for path, data in complete.items())
    async with opened(disk, LIMIT) as cache:
        await cache.rescan()
        tally.lost_objects += sum(cache.stamp(path) is None for path in complete)
        for path in files:
            if path not in complete:
                assert not await cache.verify(path)
                await put(cache, path.partition("/")[2], b"again", generation=10**6)
        assert await cache.check() == []
        assert cache.directory.leftover_files() == []
    return len(files) - len(complete)


async def cut_power(folder: Path, publications: int, tally: Tally) -> int:
    image, copy = folder.with_suffix(".img"), folder.with_suffix(".copy")
    with ext4_disk(folder) as disk:
        published = await publish(disk, publications, lambda: shutil.copyfile(image, copy))
    await asyncio.to_thread(check_file_system, copy)
    with ext4_disk(folder.with_suffix(".after"), image=copy) as disk:
        return await open_after_power_cut(disk, published, tally)


def check_file_system(image: Path) -> None:
    """The disk changes while it is copied: a real power cut does not tear apart what that does."""
    subprocess.run(["e2fsck", "-fy", image], capture_output=True, check=False)


async def test_after_a_power_cut_files_are_complete_or_misses_and_the_cache_works(tmp_path: Path) -> None:
    tally = Tally("power cut")
    damaged = await cut_power(tmp_path / "cut", 200, tally)
    assert damaged < tally.repetitions
    assert (tally.wrong_bytes, tally.lost_objects) == (0, 0)


@pytest.mark.torture
async def test_after_many_power_cuts_files_are_complete_or_misses(tmp_path: Path, tally: Tally) -> None:
    damaged = 0
    for number in range(20):
        damaged += await cut_power(tmp_path / f"cut{number}", 100 + 10 * number, tally)
    assert (tally.wrong_bytes, tally.lost_objects) == (0, 0)
    assert damaged > 0  # otherwise the test proves nothing


async def test_the_empty_files_that_a_power_cut_leaves_are_misses_and_their_bytes_are_not_counted(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache", LIMIT) as cache:
        paths = [await put(cache, f"images/{number}.jpg", content(number, SIZE)) for number in range(10)]
    for path in paths[:5]:
        os.truncate(tmp_path / "cache/objects" / path, 0)
    for path in paths[:3]:  # whose attributes had not reached the disk, either
        os.removexattr(tmp_path / "cache/objects" / path, "user.gcs.object")
    async with opened(tmp_path / "cache", LIMIT) as cache:
        await cache.rescan()
        assert (len(cache), cache.bytes) == (5, 5 * SIZE)
        for number in range(5):
            await put(cache, f"images/{number}.jpg", content(number, SIZE))
        assert await cache.check() == []
