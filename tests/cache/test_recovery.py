"""After a start the cache serves what is on the disk before it knows all of it, and reserves no space until it does.

The comparison of the index with the files works a page at a time, and leaves alone what changes meanwhile.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.file_scan import FoundFile
from gcs_prefetchd.cache.lru_table import LRUTable
from gcs_prefetchd.cache.recovery import Comparison
from gcs_prefetchd.shared.checked_read import Stamp, write_stamp
from support.caches import LIMIT, RecordingObserver, content, names_in, observer_of, opened, path_of, put, rows, stamp_of


@asynccontextmanager
async def recovering(path: Path) -> AsyncIterator[tuple[Cache, threading.Event]]:
    """A cache that was just opened, and reads its index as soon as the event is set."""
    directory = CacheDirectory(path)
    directory.claim()
    cache, go_on = Cache(directory, LIMIT, observer=RecordingObserver()), threading.Event()
    try:
        await cache.open()
        cache.io._index.submit(go_on.wait)  # its only thread, before the first call
        yield cache, go_on
    finally:
        go_on.set()
        await cache.close()
        directory.close()


def make_incomplete(path: Path) -> None:
    """Leave the index as a crash does."""
    with rows(path) as index:
        index.execute("DELETE FROM Cache WHERE key = 'complete'")


def write_stamped(file: Path, path: str, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(data)
        write_stamp(stream.fileno(), stamp_of(data), path)


@pytest.fixture
async def left(tmp_path: Path) -> Path:
    """A cache directory that holds `a.jpg` and `b.jpg`."""
    async with opened(tmp_path / "cache") as cache:
        await put(cache, "a.jpg", content(1, 300_000))
        await put(cache, "b.jpg", content(2, 300_000))
    return tmp_path / "cache"


async def test_a_requested_file_is_found_before_the_cache_is_ready(left: Path) -> None:
    async with recovering(left) as (cache, go_on):
        assert not cache.is_ready
        await cache.find_file(path_of("a.jpg"))
        await cache.find_file(path_of("absent.jpg"))
        assert await cache.verify(path_of("a.jpg"))
        assert len(cache) == 1
        go_on.set()
        await cache.wait_until_ready()
        assert (len(cache), cache.bytes) == (2, 600_000)
        assert await cache.check() == []


async def test_no_space_is_reserved_before_the_cache_is_ready(left: Path) -> None:
    make_incomplete(left)
    unindexed = content(3, 300_000)
    write_stamped(left / "objects" / path_of("c.jpg"), path_of("c.jpg"), unindexed)
    async with recovering(left) as (cache, go_on):
        waiting = asyncio.create_task(put(cache, "d.jpg", content(4, 200_000)))
        await cache.find_file(path_of("a.jpg"))
        assert not waiting.done()
        assert cache.capacity.reserved_bytes == 0
        go_on.set()
        await waiting
        assert cache.bytes <= LIMIT
        assert cache.evictions == 1
        assert await cache.check() == []


async def test_a_file_evicted_before_the_cache_is_ready_does_not_return(left: Path) -> None:
    async with recovering(left) as (cache, go_on):
        await cache.find_file(path_of("a.jpg"))
        await cache.evict(path_of("a.jpg"))
        go_on.set()
        await cache.wait_until_ready()
        assert cache.stamp(path_of("a.jpg")) is None
        assert cache.bytes == 300_000
        assert await cache.check() == []


async def test_a_newer_file_counts_instead_of_its_record_in_the_index(left: Path) -> None:
    newer = content(5, 100_000)
    (left / "objects" / path_of("a.jpg")).unlink()
    write_stamped(left / "objects" / path_of("a.jpg"), path_of("a.jpg"), newer)
    async with recovering(left) as (cache, go_on):
        await cache.find_file(path_of("a.jpg"))
        go_on.set()
        await cache.wait_until_ready()
        assert cache.stamp(path_of("a.jpg")) == stamp_of(newer)
        assert cache.bytes == 400_000
        assert await cache.check() == []


async def test_the_observer_is_not_notified_of_what_recovery_finds(left: Path) -> None:
    """There may be a million of them; callers read the pages when the cache is ready."""
    make_incomplete(left)
    async with recovering(left) as (cache, go_on):
        go_on.set()
        await cache.wait_until_ready()
        assert observer_of(cache).arrivals == []
        assert [path for page in cache.pages() for path in page] == [path_of("a.jpg"), path_of("b.jpg")]


async def test_a_stop_before_the_cache_is_ready_loses_nothing(left: Path) -> None:
    async with recovering(left) as (cache, go_on):
        closing = asyncio.create_task(cache.close())
        go_on.set()
        await closing
        with contextlib.suppress(asyncio.CancelledError):
            await cache.wait_until_ready()
    async with opened(left) as cache:
        assert len(cache) == 2
        assert await cache.check() == []


async def test_an_index_of_many_pages_is_loaded_in_order_of_use(tmp_path: Path) -> None:
    numbers = [(number * 7919) % 2003 for number in range(2003)]
    async with opened(tmp_path / "cache") as cache:
        await asyncio.gather(*(put(cache, f"{number}.jpg", b"") for number in range(2003)))
        for number in numbers:
            cache.touch(path_of(f"{number}.jpg"))
    async with opened(tmp_path / "cache") as cache:
        assert [name.name for name in names_in(cache)] == [f"{number}.jpg" for number in numbers]


# The comparison

A, B = Stamp(1, 10, 0xA), Stamp(2, 20, 0xB)


def nothing_changes(path: str) -> bool:
    return False


def holding(*paths: str) -> LRUTable:
    entries = LRUTable()
    for path in paths:
        entries.put(path, A)
    return entries


def unseen(comparison: Comparison) -> list[str]:
    return [path for page in comparison.unseen(2) for path in page]


def test_files_that_match_their_entries_have_no_differences() -> None:
    entries = holding("a", "b", "c")
    comparison = Comparison(entries, nothing_changes)
    for page in (["c", "a"], ["b"]):
        differences = comparison.compare([FoundFile(path, 10, A) for path in page])
        assert (differences.new, differences.damaged) == ([], [])
    assert unseen(comparison) == []


def test_new_damaged_and_unseen_files_are_distinguished() -> None:
    entries = holding("same", "other", "short", "gone", "bare")
    comparison = Comparison(entries, nothing_changes)
    found = [
        FoundFile("same", 10, A),
        FoundFile("new", 20, B),
        FoundFile("other", 20, B),
        FoundFile("short", 9, A),
        FoundFile("new short", 9, A),
        FoundFile("bare", 10, None),
        FoundFile("foreign", 10, None),
    ]

    differences = comparison.compare(found)

    assert differences.new == [("new", B), ("other", B)]
    assert differences.damaged == ["short", "new short"]
    for path, stamp in differences.new:
        comparison.mark_seen(entries.put_first(path, stamp))
    entries.pop("short")  # as unlinking it does
    assert unseen(comparison) == ["gone", "bare"]
    assert comparison.gone(["gone", "bare"], [None, FoundFile("bare", 10, None)]) == ["gone", "bare"]


def test_a_file_that_a_second_look_finds_is_not_gone() -> None:
    comparison = Comparison(holding("a"), nothing_changes)
    assert comparison.gone(["a"], [FoundFile("a", 10, A)]) == []


def test_paths_that_change_meanwhile_are_left_alone() -> None:
    entries, changing = holding("evicted", "published", "publishing", "gone"), {"publishing"}
    comparison = Comparison(entries, changing.__contains__)
    entries.pop("evicted")
    entries.put("published", B)
    entries.put("late", B)
    changing.update({"evicted", "published", "late"})

    differences = comparison.compare([FoundFile("evicted", 10, A), FoundFile("published", 9, A), FoundFile("publishing", 9, A)])

    assert (differences.new, differences.damaged) == ([], [])
    assert unseen(comparison) == ["gone"]
    changing.add("gone")
    assert comparison.gone(["gone"], [None]) == []


def test_an_entry_may_be_evicted_before_its_page_is_read() -> None:
    entries = holding("a", "b", "c")
    pages = Comparison(entries, nothing_changes).unseen(1)
    assert next(pages) == ["a"]
    entries.pop("b")
    assert list(pages) == [[], ["c"]]
