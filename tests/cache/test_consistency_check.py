"""The check of a cache finds every disagreement between its memory index, its disk index and its files."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.shared.checked_read import Stamp, write_stamp
from support.caches import content, file_of, opened, path_of, put, rows, stamp_of


def write_stamped(file: Path, data: bytes, stamp: Stamp) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(data)
        write_stamp(stream.fileno(), stamp, str(file).rpartition("/objects/")[2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


async def plant_index_only(cache: Cache) -> None:
    with rows(cache.directory.path) as index:
        index.execute("INSERT INTO Cache (key, raw, mode, value) VALUES ('pictures/b.jpg', 1, 1, '1 1 00000000 1.0')")


async def plant_not_in_the_index(cache: Cache) -> None:
    await cache.check()  # which writes the index
    with rows(cache.directory.path) as index:
        index.execute("DELETE FROM Cache")


async def plant_other_stamp(cache: Cache) -> None:
    await cache.check()
    with rows(cache.directory.path) as index:
        index.execute("UPDATE Cache SET value = '7 5000 00000000 1.0'")


async def plant_damage(cache: Cache) -> None:
    flip(file_of(cache, path_of("a.jpg")))


async def plant_absence(cache: Cache) -> None:
    file_of(cache, path_of("a.jpg")).unlink()


async def plant_unindexed(cache: Cache) -> None:
    write_stamped(file_of(cache, path_of("c.jpg")), b"c", stamp_of(b"c"))


async def plant_unindexed_of_wrong_length(cache: Cache) -> None:
    write_stamped(file_of(cache, path_of("c.jpg")), b"", stamp_of(b"c"))


async def plant_wrong_sum(cache: Cache) -> None:
    cache._memory_index.bytes += 1


async def plant_excess(cache: Cache) -> None:
    cache.capacity.limit_bytes = 10


async def plant_leftover(cache: Cache) -> None:
    (cache.directory.tmp / "leftover").touch()


async def plant_garbage(cache: Cache) -> None:
    with rows(cache.directory.path) as index:
        index.execute("INSERT INTO Cache (key, raw, mode, value) VALUES (x'80', 0, 1, 'x')")


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        (plant_index_only, "pictures/b.jpg: in the index only"),
        (plant_not_in_the_index, "pictures/a.jpg: not in the index"),
        (plant_other_stamp, "pictures/a.jpg: index and memory differ"),
        (plant_damage, "pictures/a.jpg: the file is not what the index says"),
        (plant_absence, "pictures/a.jpg: the file is not what the index says"),
        (plant_unindexed, "pictures/c.jpg: a file that the index lacks"),
        (plant_unindexed_of_wrong_length, "pictures/c.jpg: a file that the index lacks"),
        (plant_wrong_sum, "the sum of sizes is not 5001"),
        (plant_excess, "5000 bytes and 0 reserved exceed 10"),
        (plant_leftover, "leftovers in tmp/"),
        (plant_garbage, "the index cannot be read: a pickled key in the index"),
    ],
)
async def test_the_check_reports_every_problem(plant: Callable[[Cache], object], problem: str, tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        await put(cache, "a.jpg", content(1, 5000))
        assert await cache.check() == []
        planted = plant(cache)
        assert asyncio.iscoroutine(planted)
        await planted

        assert await cache.check() == [problem]
