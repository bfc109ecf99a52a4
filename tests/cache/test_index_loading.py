"""After a start the daemon serves what is here before it knows all of it, and gives no room until it does."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.shared.checksums import write_stamp
from support.caches import LIMIT, RecordingObserver, content, observer_of, opened, path_of, put, rows, stamp_of


@asynccontextmanager
async def taking_stock(path: Path) -> AsyncIterator[tuple[Cache, threading.Event]]:
    """A cache that has just been opened and reads its index as soon as the event is set."""
    directory = CacheDirectory(path)
    directory.claim()
    cache, go_on = Cache(directory, LIMIT, observer=RecordingObserver()), threading.Event()
    try:
        await cache.open()
        cache.disk._index.submit(go_on.wait)  # it has one thread, and nothing has been asked of it yet
        yield cache, go_on
    finally:
        go_on.set()
        await cache.close()
        directory.close()


def forget_the_end(path: Path) -> None:
    """As a crash leaves it."""
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


async def test_what_is_asked_for_is_found_before_all_is_known(left: Path) -> None:
    async with taking_stock(left) as (cache, go_on):
        assert not cache.is_whole
        await cache.look_for(path_of("a.jpg"))
        await cache.look_for(path_of("absent.jpg"))
        assert await cache.verify(path_of("a.jpg"))
        assert len(cache) == 1
        go_on.set()
        await cache.whole()
        assert (len(cache), cache.bytes) == (2, 600_000)
        assert await cache.check() == []


async def test_no_room_is_given_before_all_is_known(left: Path) -> None:
    forget_the_end(left)
    unindexed = content(3, 300_000)
    write_stamped(left / "objects" / path_of("c.jpg"), path_of("c.jpg"), unindexed)
    async with taking_stock(left) as (cache, go_on):
        waiting = asyncio.create_task(put(cache, "d.jpg", content(4, 200_000)))
        await cache.look_for(path_of("a.jpg"))
        assert not waiting.done()
        assert cache.reserved_bytes == 0
        go_on.set()
        await waiting
        assert cache.bytes <= LIMIT
        assert cache.evictions == 1
        assert await cache.check() == []


async def test_what_is_dropped_before_all_is_known_does_not_come_back(left: Path) -> None:
    async with taking_stock(left) as (cache, go_on):
        await cache.look_for(path_of("a.jpg"))
        await cache.drop(path_of("a.jpg"))
        go_on.set()
        await cache.whole()
        assert cache.stamp(path_of("a.jpg")) is None
        assert cache.bytes == 300_000
        assert await cache.check() == []


async def test_a_newer_file_than_the_index_tells_of_is_what_counts(left: Path) -> None:
    newer = content(5, 100_000)
    (left / "objects" / path_of("a.jpg")).unlink()
    write_stamped(left / "objects" / path_of("a.jpg"), path_of("a.jpg"), newer)
    async with taking_stock(left) as (cache, go_on):
        await cache.look_for(path_of("a.jpg"))
        go_on.set()
        await cache.whole()
        assert cache.stamp(path_of("a.jpg")) == stamp_of(newer)
        assert cache.bytes == 400_000
        assert await cache.check() == []


async def test_nobody_hears_of_what_taking_stock_brings_to_light(left: Path) -> None:
    """There may be a million of them; whoever wants to know looks at the pages when the cache is whole."""
    forget_the_end(left)
    async with taking_stock(left) as (cache, go_on):
        go_on.set()
        await cache.whole()
        assert observer_of(cache).arrivals == []
        assert [path for page in cache.pages() for path in page] == [path_of("a.jpg"), path_of("b.jpg")]


async def test_a_stop_before_all_is_known_loses_nothing(left: Path) -> None:
    async with taking_stock(left) as (cache, go_on):
        closing = asyncio.create_task(cache.close())
        go_on.set()
        await closing
        with contextlib.suppress(asyncio.CancelledError):
            await cache.whole()
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
        assert [name.name for name in cache.names()] == [f"{number}.jpg" for number in numbers]
