"""The cache keeps its size limit, its order of use and its files, whatever happens to its process, index or directory."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.shared.checked_read import Stamp, read_checked, read_stamp, write_stamp
from gcs_prefetchd.shared.errors import CacheFullError
from support.caches import (
    LIMIT,
    content,
    file_of,
    index_elsewhere,
    keeping,
    mounted,
    names_in,
    needs_mount,
    observer_of,
    opened,
    path_of,
    put,
    rows,
    stamp_of,
)

PAGE = 4096


def write_stamped(file: Path, data: bytes, stamp: Stamp) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(data)
        write_stamp(stream.fileno(), stamp, str(file).rpartition("/objects/")[2])


def names_of(cache: Cache) -> list[str]:
    """The names in the cache, least recently used first."""
    return [name.name for name in names_in(cache)]


# The size limit


async def busy_reader(cache: Cache, seed: int, largest: int, seen: Callable[[], None]) -> None:
    """Do 60 random things to a cache, as prefetches, demands, stops and rescans do."""
    chance = random.Random(seed)
    for step in range(60):
        number = chance.randrange(40) * 4 + seed % 4  # the fetcher never has two downloads of one object
        name, size = f"images/{number}.jpg", chance.randrange(largest + 1) // PAGE * PAGE
        match chance.randrange(12):
            case 0:
                await cache.evict(path_of(name))
            case 1:
                await cache.verify(path_of(name))
            case 2:
                await cache.rescan()
            case 3:
                download = asyncio.create_task(put(cache, name, content(number, size), generation=step + 1))
                for _ in range(chance.randrange(6)):
                    await asyncio.sleep(0)
                download.cancel()
                await asyncio.gather(download, return_exceptions=True)
            case _:
                with contextlib.suppress(CacheFullError):
                    await put(cache, name, content(number, size), generation=step + 1)
        cache.touch(path_of(f"images/{chance.randrange(160)}.jpg"))
        seen()


@pytest.mark.parametrize("seed", range(0, 12, 4))
async def test_cached_and_reserved_bytes_never_exceed_the_limit(cache: Cache, seed: int) -> None:
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, cache.bytes + cache.capacity.reserved_bytes)

    for _ in range(2):
        await asyncio.gather(*(busy_reader(cache, seed + i, 200_000, look) for i in range(4)))
        assert await cache.check() == []
    assert LIMIT * 0.6 < most <= LIMIT
    assert cache.capacity.reserved_bytes == 0
    assert cache.evictions > 0


@needs_mount
async def test_a_disk_as_small_as_the_limit_never_runs_full(tmp_path: Path) -> None:
    """The kernel enforces it: with one byte more than the limit at any moment, a write would fail."""
    limit = 100 * PAGE
    with mounted(tmp_path / "disk", "tmpfs", f"size={limit + 4 * PAGE}") as disk:  # marker, lock and probe have a page each
        index_elsewhere(disk, tmp_path / "index")
        async with opened(disk, limit) as cache:
            await asyncio.gather(*(busy_reader(cache, i, 20 * PAGE, lambda: None) for i in range(4)))
            assert cache.evictions > 0
            assert await cache.check() == []


async def test_the_least_recently_used_is_evicted_first(cache: Cache) -> None:
    for i in range(5):
        await put(cache, f"{i}.jpg", content(i, 200_000))
    cache.touch(path_of("0.jpg"))
    cache.touch(path_of("2.jpg"))

    await put(cache, "5.jpg", content(5, 400_000))

    assert names_of(cache) == ["4.jpg", "0.jpg", "2.jpg", "5.jpg"]
    assert cache.evictions == 2


async def test_reading_a_stamp_or_verifying_does_not_count_as_a_use(cache: Cache) -> None:
    await put(cache, "a.jpg", b"a")
    await put(cache, "b.jpg", b"b")

    assert cache.stamp(path_of("a.jpg")) == stamp_of(b"a")
    assert await cache.verify(path_of("a.jpg"))

    assert names_of(cache) == ["a.jpg", "b.jpg"]


async def test_an_evicted_file_is_gone_from_the_disk_before_its_space_is_reserved(cache: Cache) -> None:
    path = await put(cache, "a.jpg", content(1, 600_000))

    await cache.reserve(500_000)

    assert not file_of(cache, path).exists()
    assert (cache.bytes, cache.capacity.reserved_bytes) == (0, 500_000)
    cache.capacity.release(500_000)


async def test_the_observer_is_notified_of_every_eviction(cache: Cache) -> None:
    path = await put(cache, "a.jpg", content(1, 600_000))
    await put(cache, "b.jpg", content(2, 600_000))

    assert observer_of(cache).losses == [path]


async def test_without_enough_victims_a_reservation_is_refused_and_evicts_nothing(cache: Cache) -> None:
    paths = [await put(cache, f"{i}.jpg", content(i, 300_000)) for i in range(3)]

    with pytest.raises(CacheFullError) as error:
        await cache.reserve(500_000, keeping(cache, *paths[:2]))

    assert names_of(cache) == ["0.jpg", "1.jpg", "2.jpg"]
    assert (cache.capacity.reserved_bytes, cache.evictions) == (0, 0)
    assert "500 KB" in str(error.value)
    assert "900 KB of 1.0 MB" in str(error.value)
    assert "\n" not in str(error.value)


async def test_an_object_larger_than_the_cache_is_refused_and_evicts_nothing(cache: Cache) -> None:
    await put(cache, "a.jpg", b"a")

    with pytest.raises(CacheFullError, match=r"no space for 1\.0 MB: the whole cache is 1\.0 MB"):
        await cache.reserve(LIMIT + 1)

    assert names_of(cache) == ["a.jpg"]


async def test_an_object_exactly_as_large_as_the_cache_fits(cache: Cache) -> None:
    await put(cache, "a.jpg", b"a")
    await put(cache, "b.jpg", content(1, LIMIT))

    assert names_of(cache) == ["b.jpg"]


async def test_downloads_in_progress_count_with_what_they_reserved(cache: Cache) -> None:
    await cache.reserve(600_000)
    with pytest.raises(CacheFullError, match="reserves 600 KB"):
        await cache.reserve(600_000)
    cache.capacity.release(600_000)


async def test_a_new_generation_replaces_the_old_one(cache: Cache) -> None:
    path = await put(cache, "a.jpg", content(1, 100), generation=1)
    await put(cache, "a.jpg", content(2, 300), generation=2)

    assert cache.stamp(path) == stamp_of(content(2, 300), 2)
    assert (len(cache), cache.bytes) == (1, 300)


async def test_the_bytes_of_a_download_are_reserved_or_cached_and_never_both(cache: Cache) -> None:
    """Otherwise an object that fits beside the one just published would be refused for a moment."""
    publishing = asyncio.create_task(put(cache, "a.jpg", content(1, 600_000)))
    while not publishing.done():
        await cache.reserve(400_000)
        cache.capacity.release(400_000)
        await asyncio.sleep(0)
    assert names_of(cache) == ["a.jpg"]
    assert cache.evictions == 0


async def test_evicting_an_object_while_its_next_generation_arrives_leaves_the_new_file(cache: Cache) -> None:
    for generation in range(1, 60):
        data = content(generation, 1000)
        arriving = asyncio.create_task(put(cache, "a.jpg", data, generation))
        for _ in range(generation % 12):
            await asyncio.sleep(0)
        await cache.evict(path_of("a.jpg"))
        await arriving
        stamp = cache.stamp(path_of("a.jpg"))
        assert (stamp is not None) == file_of(cache, path_of("a.jpg")).exists()
    assert await cache.check() == []


async def test_evicting_an_object_whose_replacement_is_abandoned_evicts_it_then(cache: Cache) -> None:
    path = await put(cache, "a.jpg", b"old")
    await cache.paths.claim(path)
    await cache.evict(path)
    assert cache.stamp(path) is not None
    cache.paths.abandon(path)
    assert cache.stamp(path) is None
    await cache.evict(path)
    assert not file_of(cache, path).exists()
    assert await cache.check() == []


async def test_an_empty_object_evicted_and_fetched_at_the_same_moment_is_cached(cache: Cache) -> None:
    """It reserves no bytes, so only its path makes it wait for the unlinking of the older file."""
    for _ in range(50):
        path = await put(cache, "empty.jpg", b"")
        evicting = asyncio.create_task(cache.evict(path))
        await asyncio.sleep(0)
        await put(cache, "empty.jpg", b"")
        await evicting
        assert read_checked(cache.directory.objects, path) == b""


# The free-space floor


async def test_a_floor_larger_than_the_free_space_refuses_every_object(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    async with opened(tmp_path / "cache", LIMIT, min_free_bytes=total) as cache:
        with pytest.raises(CacheFullError, match=r"keeps .+ of the disk free"):
            await cache.reserve(1)
        assert cache.capacity.reserved_bytes == 0


@needs_mount
async def test_the_disk_keeps_its_free_space(tmp_path: Path) -> None:
    floor = 100 * PAGE
    with mounted(tmp_path / "disk", "tmpfs", f"size={3 * floor}") as disk:
        index_elsewhere(disk, tmp_path / "index")
        async with opened(disk, 10 * floor, floor) as cache:
            for i in range(40):
                await put(cache, f"{i}.jpg", content(i, 10 * PAGE))
                assert shutil.disk_usage(disk).free >= floor
            assert 10 < len(cache) < 20
            assert await cache.check() == []


@needs_mount
async def test_concurrent_reservations_evict_no_more_for_the_floor_than_they_need(tmp_path: Path) -> None:
    floor = 100 * PAGE
    with mounted(tmp_path / "disk", "tmpfs", f"size={2 * floor}") as disk:
        index_elsewhere(disk, tmp_path / "index")
        async with opened(disk, 10 * floor, floor) as cache:
            for i in range(90):
                await put(cache, f"{i}.jpg", content(i, PAGE))
            await asyncio.gather(*(cache.reserve(PAGE) for _ in range(40)))
            assert len(cache) >= 90 - 40
            assert shutil.disk_usage(disk).free >= floor + 40 * PAGE


@needs_mount
async def test_shrinking_makes_up_for_what_other_programs_write(tmp_path: Path) -> None:
    floor = 100 * PAGE
    with mounted(tmp_path / "disk", "tmpfs", f"size={3 * floor}") as disk:
        index_elsewhere(disk / "cache", tmp_path / "index")
        async with opened(disk / "cache", 10 * floor, floor) as cache:
            for i in range(15):
                await put(cache, f"{i}.jpg", content(i, 10 * PAGE))
            (disk / "foreign").write_bytes(bytes(100 * PAGE))
            await cache.shrink()
            assert shutil.disk_usage(disk).free >= floor
            assert len(cache) > 0


async def test_opening_with_a_lower_limit_evicts_the_least_recently_used(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        for i in range(9):
            await put(cache, f"{i}.jpg", content(i, 100_000))

    async with opened(tmp_path / "cache", limit_bytes=350_000) as cache:
        assert names_of(cache) == ["6.jpg", "7.jpg", "8.jpg"]
        assert len(list(cache.directory.objects.rglob("*.jpg"))) == 3
        assert await cache.check() == []


# Damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")


def strip_stamp(file: Path) -> None:
    os.removexattr(file, "user.gcs.object")


def link_elsewhere(file: Path) -> None:
    elsewhere = file.parents[3] / "elsewhere"
    shutil.copy2(file, elsewhere)  # with its stamp
    file.unlink()
    file.symlink_to(elsewhere)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE = [flip, truncate, zero, grow, strip_stamp, link_elsewhere, pipe, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_file_is_evicted_and_counted(cache: Cache, damage: Callable[[Path], None]) -> None:
    path = await put(cache, "a.jpg", content(1, 5000))
    damage(file_of(cache, path))

    assert not await cache.verify(path)

    assert cache.damaged == 1
    assert cache.stamp(path) is None
    file = file_of(cache, path)
    assert not file.exists()
    assert not file.is_symlink()


async def test_a_damaged_file_that_was_linked_elsewhere_leaves_the_other_file_alone(cache: Cache) -> None:
    path = await put(cache, "a.jpg", content(1, 5000))
    link_elsewhere(file_of(cache, path))
    elsewhere = file_of(cache, path).readlink()

    await cache.verify(path)

    assert elsewhere.read_bytes() == content(1, 5000)


async def test_verifying_an_absent_object_fails_and_counts_no_damage(cache: Cache) -> None:
    assert not await cache.verify(path_of("absent.jpg"))
    assert cache.damaged == 0


# The rescan


async def test_a_rescan_adopts_a_stamped_file_that_the_index_lacks(cache: Cache) -> None:
    await put(cache, "used.jpg", b"used")
    data = content(1, 5000)
    write_stamped(file_of(cache, path_of("new.jpg")), data, stamp_of(data))

    assert await cache.rescan() == (1, 0)

    assert cache.stamp(path_of("new.jpg")) == stamp_of(data)
    assert names_of(cache) == ["new.jpg", "used.jpg"]
    assert await cache.check() == []


async def test_a_rescan_adopts_a_file_of_another_generation_than_its_entry(cache: Cache) -> None:
    path = await put(cache, "a.jpg", content(1, 5000), generation=1)
    newer = content(2, 5000)
    file_of(cache, path).unlink()
    write_stamped(file_of(cache, path), newer, stamp_of(newer, 2))

    assert await cache.rescan() == (1, 0)

    assert cache.stamp(path) == stamp_of(newer, 2)
    assert await cache.check() == []


async def test_a_rescan_forgets_files_that_are_gone(cache: Cache) -> None:
    path = await put(cache, "a.jpg", b"a")
    await put(cache, "b.jpg", b"b")
    file_of(cache, path).unlink()

    assert await cache.rescan() == (0, 1)

    assert names_of(cache) == ["b.jpg"]
    assert observer_of(cache).losses == [path]
    assert cache.bytes == 1


@pytest.mark.parametrize("known", [True, False])
async def test_a_rescan_removes_a_stamped_file_of_the_wrong_length(cache: Cache, known: bool) -> None:
    path = await put(cache, "a.jpg", content(1, 5000))
    file = file_of(cache, path)
    truncate(file)
    if not known:
        cache.paths.forget(path)

    await cache.rescan()

    assert cache.stamp(path) is None
    assert not file.exists()


async def test_a_rescan_leaves_foreign_files_alone(cache: Cache) -> None:
    foreign = cache.directory.objects / "notes.txt"
    foreign.write_text("mine")
    no_text = cache.directory.objects / os.fsdecode(b"caf\xe9.jpg")  # Latin-1, and even with a stamp
    write_stamped(no_text, b"x", stamp_of(b"x"))

    assert await cache.rescan() == (0, 0)

    assert foreign.read_text() == "mine"
    assert no_text.exists()
    assert len(cache) == 0


async def test_a_rescan_follows_no_link(cache: Cache, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_stamped(outside / "a.jpg", b"a", stamp_of(b"a"))
    (cache.directory.objects / "folder").symlink_to(outside)
    (cache.directory.objects / "file.jpg").symlink_to(outside / "a.jpg")

    assert await cache.rescan() == (0, 0)

    assert (outside / "a.jpg").exists()


async def test_a_rescan_ignores_files_that_change_meanwhile(cache: Cache) -> None:
    lost = observer_of(cache).losses

    async def churn() -> None:
        for i in range(60):
            await put(cache, f"{i % 30}.jpg", content(i, 50_000), generation=i + 1)

    churning = asyncio.create_task(churn())
    scans = []
    while not churning.done():
        before = cache.evictions
        lost.clear()
        scans.append(await cache.rescan())
        assert len(lost) == cache.evictions - before  # nothing else was lost

    assert set(scans) == {(0, 0)}
    assert await cache.check() == []


async def test_rescans_may_overlap(cache: Cache) -> None:
    paths = [await put(cache, f"{i}.jpg", b"x") for i in range(20)]
    file_of(cache, paths[0]).unlink()
    first = asyncio.create_task(cache.rescan())
    second = asyncio.create_task(cache.rescan())
    await put(cache, "late.jpg", b"late")

    assert sorted([await first, await second]) == [(0, 0), (0, 1)]
    assert len(cache) == 20


# Restarts


async def test_a_restart_keeps_everything_and_the_order_of_use(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        for i in range(50):
            await put(cache, f"{i}.jpg", content(i, 1000))
        order = random.Random(1).sample(range(50), 50)
        for i in order:  # many within one tick of any clock
            cache.touch(path_of(f"{i}.jpg"))

    async with opened(tmp_path / "cache") as cache:
        assert names_of(cache) == [f"{i}.jpg" for i in order]
        assert cache.bytes == 50_000
        assert await cache.check() == []


async def test_a_use_after_a_restart_is_the_latest_even_if_the_clock_went_back(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        for name in ("a.jpg", "b.jpg"):
            await put(cache, name, b"x")
    with rows(tmp_path / "cache") as index:  # used a year ahead of the clock that the restart finds
        index.execute("UPDATE Cache SET value = substr(value, 1, 13) || '4000000000.' || rowid WHERE key LIKE '%/%'")
    async with opened(tmp_path / "cache") as cache:
        assert names_of(cache) == ["a.jpg", "b.jpg"]
        cache.touch(path_of("a.jpg"))

    async with opened(tmp_path / "cache") as cache:
        assert names_of(cache) == ["b.jpg", "a.jpg"]


async def test_objects_cached_under_a_hash_keep_their_names(cache: Cache) -> None:
    long_name = "folder/" + "x" * 300 + ".jpg"
    await put(cache, long_name, b"long")
    await put(cache, "short.jpg", b"short")

    assert names_of(cache) == [long_name, "short.jpg"]


async def test_an_adopted_file_is_still_the_oldest_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        await put(cache, "used.jpg", b"x")
        for name in ("new1.jpg", "new2.jpg", "new3.jpg"):
            write_stamped(file_of(cache, path_of(name)), b"y", stamp_of(b"y"))
        await cache.rescan()
        before = names_of(cache)

    async with opened(tmp_path / "cache") as cache:
        assert names_of(cache) == before
        assert before[-1] == "used.jpg"


PUBLISHER = """
import asyncio, itertools, os, sys
from pathlib import Path
from support.caches import content, opened, put

async def main(directory, first):
    async with opened(Path(directory), 10**9) as cache:
        async def publish(number):
            # Few names and one size: most publications replace an old generation.
            await put(cache, f"images/{number % 32}.jpg", content(number, 20_000), generation=number)
            os.write(1, f"{number}\\n".encode())
        for number in itertools.count(int(first), 4):
            await asyncio.gather(*(publish(number + i) for i in range(4)))

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_crash_loses_nothing_that_was_published_and_leaves_only_complete_files(tmp_path: Path) -> None:
    directory, chance = tmp_path / "cache", random.Random()
    newest: dict[str, int] = {}
    first = 1
    for _ in range(10):
        finished = await asyncio.to_thread(publish_until_killed, directory, first, chance.randrange(1, 200))
        for number in finished:
            path = path_of(f"images/{number % 32}.jpg")
            newest[path] = max(number, newest.get(path, 0))
        first = max(finished) + 64

        for file in (directory / "objects").rglob("*.jpg"):
            where = file.relative_to(directory / "objects").as_posix()
            stamp = read_stamp(file, where)
            assert stamp is not None
            assert read_checked(directory / "objects", where) == content(stamp.generation, 20_000)
        async with opened(directory, 10**9) as cache:
            for path, number in newest.items():
                stamp = cache.stamp(path)
                assert stamp is not None
                assert stamp.generation >= number
            assert await cache.check() == []
            assert cache.evictions == 0


def publish_until_killed(directory: Path, first: int, publications: int) -> list[int]:
    """Run a process that publishes, kill it after about `publications`, and return the numbers of all that it finished."""
    command = [sys.executable, "-c", PUBLISHER, str(directory), str(first)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE) as publisher:
        assert publisher.stdout is not None
        lines = [publisher.stdout.readline() for _ in range(publications)]
        publisher.send_signal(signal.SIGKILL)
        lines += publisher.stdout.readlines()
    assert publisher.returncode == -signal.SIGKILL
    return [int(line) for line in lines if line.endswith(b"\n")]


async def test_after_a_crash_files_missing_from_the_index_count_from_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        await put(cache, "indexed.jpg", content(1, 400_000))
    with rows(tmp_path / "cache") as index:
        index.execute("DELETE FROM Cache WHERE key = 'complete'")  # a crash does not write it
    unindexed = content(2, 500_000)
    write_stamped(tmp_path / "cache/objects" / path_of("unindexed.jpg"), unindexed, stamp_of(unindexed))

    async with opened(tmp_path / "cache") as cache:
        assert cache.bytes == 900_000
        await put(cache, "next.jpg", content(3, 200_000))
        assert await cache.check() == []


async def test_a_clean_restart_trusts_its_index(tmp_path: Path) -> None:
    """Its time does not grow with the files: indexed objects are served before any comparison."""
    async with opened(tmp_path / "cache") as cache:
        path = await put(cache, "a.jpg", b"a")
    file_of(cache, path).unlink()

    async with opened(tmp_path / "cache") as cache:
        assert cache.stamp(path) is not None
        assert await cache.rescan() == (0, 1)


# A broken index


def delete_index(directory: Path) -> None:
    shutil.rmtree(directory / "index")


def delete_database(directory: Path) -> None:
    (directory / "index/cache.db").unlink()


def garbage(directory: Path) -> None:
    (directory / "index/cache.db").write_bytes(content(1, 40_000))


def garbage_inside(directory: Path) -> None:
    database = directory / "index/cache.db"
    data = bytearray(database.read_bytes())
    data[4096:] = content(1, len(data) - 4096)
    database.write_bytes(data)


def empty(directory: Path) -> None:
    (directory / "index/cache.db").write_bytes(b"")


def other_tables(directory: Path) -> None:
    with rows(directory) as index:
        index.executescript("DROP TABLE Cache; CREATE TABLE Cache (a, b)")


def settings_without_names(directory: Path) -> None:
    with rows(directory) as index:
        index.executescript("DROP TABLE Settings; CREATE TABLE Settings (key, value); INSERT INTO Settings VALUES (NULL, 1)")


DAMAGES = [delete_index, delete_database, garbage, garbage_inside, empty, other_tables, settings_without_names]


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_lost_index_is_rebuilt_from_the_files(damage: Callable[[Path], None], tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        for i in range(100):
            await put(cache, f"{i}.jpg", content(i, 1000))
    damage(tmp_path / "cache")

    for _ in range(2):
        async with opened(tmp_path / "cache") as cache:
            assert (len(cache), cache.bytes) == (100, 100_000)
            assert await cache.check() == []


async def test_an_index_locked_by_another_process_at_the_start_is_rebuilt(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        await put(cache, "a.jpg", b"a")

    with rows(tmp_path / "cache") as index:
        index.execute("BEGIN EXCLUSIVE")
        async with asyncio.timeout(20), opened(tmp_path / "cache") as cache:
            assert names_of(cache) == ["a.jpg"]
            assert await cache.check() == []


async def test_an_index_locked_by_another_process_stops_nothing_and_catches_up(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    kept = await put(cache, "kept.jpg", content(1, 400_000))
    assert await cache.check() == []
    with rows(cache.directory.path) as index:
        index.execute("BEGIN EXCLUSIVE")
        for i in range(10):
            await put(cache, f"{i}.jpg", content(i, 100_000), choose_victims=keeping(cache, kept))
        problems = await cache.check()
    assert len(cache) == 7
    assert "pictures/9.jpg: not in the index" in problems
    assert "changes not written" in caplog.text
    assert await cache.check() == []


async def test_an_index_that_was_not_written_at_the_stop_is_not_trusted_at_the_next_start(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        index: sqlite3.Connection
        async with opened(tmp_path / "cache") as cache:
            await put(cache, "a.jpg", b"a")
            index = stack.enter_context(rows(tmp_path / "cache"))
            index.execute("BEGIN EXCLUSIVE")
        index.execute("ROLLBACK")

    async with opened(tmp_path / "cache") as cache:
        assert names_of(cache) == ["a.jpg"]
        assert await cache.check() == []


async def test_the_index_is_written_soon_after_a_change_without_a_flush(cache: Cache) -> None:
    path = await put(cache, "a.jpg", b"a")
    async with asyncio.timeout(10):
        while path not in await asyncio.to_thread(keys, cache.directory):
            pass


def keys(directory: CacheDirectory) -> list[str]:
    with rows(directory.path) as index:
        return [key for (key,) in index.execute("SELECT key FROM Cache")]
