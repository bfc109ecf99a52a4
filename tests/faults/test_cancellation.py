"""Callers that are cancelled, wherever they wait, leave no reserved space, no file, no task and no descriptor."""

import asyncio
import itertools
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.io_threads import READ_THREADS
from gcs_prefetchd.cache.object_writer import BUFFER_BYTES
from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.credentials import Access
from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.errors import DaemonUnavailableError
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.testing import ServingGCS, Stall, serving
from support.caches import BUCKET, content, file_of, names_in, open_descriptors, opened, path_of, put, slots_of

NAME = ObjectName(BUCKET, "images/a.jpg")
TIMEOUT_S = 20.0


@pytest.fixture
def gcs() -> Iterator[ServingGCS]:
    """Run the server in a thread, so that every task of this loop is ours."""
    with serving() as server:
        yield server


@types.coroutine
def _cancelled_at(work: Coroutine[Any, Any, None], waits: set[int]) -> Generator[Any, Any, None]:
    step: Callable[[], Any] = partial(work.send, None)
    for wait in itertools.count():
        try:
            awaited = step()
        except StopIteration:
            return
        task = asyncio.current_task()
        assert task is not None
        if wait in waits:
            asyncio.get_running_loop().call_soon(task.cancel)
        try:
            yield awaited
            step = partial(work.send, None)
        except BaseException as exc:
            step = partial(work.throw, exc)


async def cancelled_at(work: Coroutine[Any, Any, None], *waits: int) -> bool:
    """Run it, and cancel it when it waits for the n-th time (from 0); returns False if it ended before that."""

    async def run() -> None:
        await _cancelled_at(work, set(waits))

    task = asyncio.create_task(run())
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.wait([task])
    if task.cancelled():
        return True
    task.result()
    return False


async def tasks_ended(before: set[asyncio.Task[Any]]) -> None:
    """Wait until all tasks that were started since have ended."""
    async with asyncio.timeout(TIMEOUT_S):
        while others := asyncio.all_tasks() - before:
            await asyncio.wait(others)


def descriptors_in(directory: Path) -> set[str]:
    return {one for one in open_descriptors() if str(directory) in one}


async def wait_for_disk_threads(cache: Cache) -> None:
    """A thread cannot be cancelled: it finishes what it was reading for a cancelled caller."""
    barrier = threading.Barrier(READ_THREADS)
    await asyncio.gather(*(cache.io.run(barrier.wait) for _ in range(READ_THREADS)))


async def assert_nothing_left(cache: Cache, descriptors: set[str]) -> None:
    await wait_for_disk_threads(cache)
    assert cache.capacity.reserved_bytes == 0
    assert cache.directory.leftover_files() == []
    assert descriptors_in(cache.directory.path) == descriptors
    assert await cache.check() == []


async def test_a_cancelled_reservation_reserves_nothing(cache: Cache) -> None:
    for wait in itertools.count():
        for i in range(10):
            await put(cache, f"{i}.jpg", content(i, 90_000))
        before = asyncio.all_tasks()
        descriptors = descriptors_in(cache.directory.path)
        cancelled = await cancelled_at(cache.reserve(500_000), wait)
        if not cancelled:
            cache.capacity.release(500_000)
        await tasks_ended(before)
        await assert_nothing_left(cache, descriptors)
        if not cancelled:
            break
    assert wait > 0


@pytest.mark.parametrize("again", [(), (1,), (1, 2), (1, 2, 3)])
@pytest.mark.parametrize("size_bytes", [0, 1000, 3 * BUFFER_BYTES])
async def test_a_download_cancelled_at_any_moment_is_published_or_leaves_nothing(
    size_bytes: int, again: tuple[int, ...], gcs: ServingGCS, tmp_path: Path
) -> None:
    """It is cancelled once, or repeatedly while it cleans up."""
    data = content(1, size_bytes)
    gcs.put(BUCKET, NAME.name, data)
    async with (
        opened(tmp_path / "cache", 4 * BUFFER_BYTES) as cache,
        GCSClient(Access(gcs.url, anonymous=True)) as origin,
    ):

        async def fetch() -> None:
            async with Reservation(cache, NAME).writer() as writer:
                await writer.publish(await origin.download(NAME, None, writer))

        await fetch()  # so that what is opened once and kept is open now
        path = path_of(NAME.name)
        for wait in itertools.count():
            await cache.evict(path)
            await put(cache, "other.jpg", content(2, BUFFER_BYTES * 7 // 2))  # so that space must be made
            assert await cache.check() == []
            before = asyncio.all_tasks()
            descriptors = descriptors_in(cache.directory.path)
            cancelled = await cancelled_at(fetch(), wait, *(wait + more for more in again))
            if not again:
                await asyncio.sleep(0)  # a finished task leaves the loop's list with its last callback
                assert {task.get_name() for task in asyncio.all_tasks() - before} <= {"unlink"}  # the cache's own
            await tasks_ended(before)
            await assert_nothing_left(cache, descriptors)
            published = cache.stamp(path) is not None
            assert published == file_of(cache, path).exists()
            if not cancelled:
                break
        assert wait > 3
        assert read_checked(cache.directory.objects, path) == data


async def test_a_download_cancelled_while_gcs_stalls_leaves_nothing(gcs: ServingGCS, tmp_path: Path) -> None:
    gcs.put(BUCKET, NAME.name, content(1, 3 * BUFFER_BYTES))
    gcs.faults.add(Stall(after_bytes=2 * BUFFER_BYTES))
    async with (
        opened(tmp_path / "cache", 4 * BUFFER_BYTES) as cache,
        GCSClient(Access(gcs.url, anonymous=True)) as origin,
        asyncio.timeout(TIMEOUT_S),
    ):
        descriptors = descriptors_in(cache.directory.path)
        before = asyncio.all_tasks()

        async def fetch() -> None:
            async with Reservation(cache, NAME).writer() as writer:
                await origin.download(NAME, None, writer)

        fetching = asyncio.create_task(fetch())
        await asyncio.to_thread(gcs.wait_for, lambda counts: counts.total_bytes >= 2 * BUFFER_BYTES)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        gcs.release()
        await tasks_ended(before)
        await assert_nothing_left(cache, descriptors)


async def test_a_cancelled_demand_wastes_no_download_and_leaves_nothing(gcs: ServingGCS, cache: Cache) -> None:
    data = content(1, 50_000)
    gcs.put(BUCKET, NAME.name, data)
    path = path_of(NAME.name)
    async with GCSClient(Access(gcs.url, anonymous=True)) as origin:
        fetcher = Fetcher(cache, origin, slots_of(4))
        await fetcher.demand(NAME, None)
        for wait in itertools.count():
            if wait % 2:
                await cache.evict(path)
            before = asyncio.all_tasks()
            descriptors = descriptors_in(cache.directory.path)
            cancelled = await cancelled_at(fetcher.demand(NAME, None), wait // 2)
            await tasks_ended(before)
            await assert_nothing_left(cache, descriptors)
            if not cancelled and wait % 2:
                break
        assert wait > 2
        assert read_checked(cache.directory.objects, path) == data
        await fetcher.close()


async def test_a_cancelled_caller_leaves_the_others_their_object(gcs: ServingGCS, cache: Cache) -> None:
    gcs.put(BUCKET, NAME.name, b"x")
    gcs.faults.add(Stall())
    async with GCSClient(Access(gcs.url, anonymous=True)) as origin, asyncio.timeout(TIMEOUT_S):
        fetcher = Fetcher(cache, origin, slots_of(4))
        askers = [asyncio.create_task(fetcher.demand(NAME, None)) for _ in range(3)]
        await asyncio.to_thread(gcs.wait_for, lambda counts: counts.open_media > 0)
        askers[0].cancel()
        gcs.release()
        await asyncio.gather(*askers[1:])
        assert askers[0].cancelled()
        assert gcs.counts.media.total() == 1
        await fetcher.close()


async def test_closing_the_fetcher_at_any_moment_of_a_demand_leaves_nothing(gcs: ServingGCS, cache: Cache) -> None:
    data = content(1, 50_000)
    gcs.put(BUCKET, NAME.name, data)
    async with GCSClient(Access(gcs.url, anonymous=True)) as origin:
        await origin.read(NAME)
        descriptors = descriptors_in(cache.directory.path)
        before = asyncio.all_tasks()
        for turns in range(60):
            await cache.evict(path_of(NAME.name))
            fetcher = Fetcher(cache, origin, slots_of(4))
            demand = asyncio.create_task(fetcher.demand(NAME, None))
            for _ in range(turns):
                await asyncio.sleep(0)
            await fetcher.close()
            (result,) = await asyncio.gather(demand, return_exceptions=True)
            assert result is None or isinstance(result, DaemonUnavailableError | asyncio.CancelledError)
            await tasks_ended(before)
            await assert_nothing_left(cache, descriptors)


async def test_a_cancelled_close_still_completes_and_loses_nothing(tmp_path: Path) -> None:
    for wait in itertools.count():
        async with opened(tmp_path / f"cache{wait}") as cache:
            for i in range(10):
                await put(cache, f"{i}.jpg", content(i, 90_000))
            before = asyncio.all_tasks()
            evicting = asyncio.create_task(cache.evict(path_of("0.jpg")))  # something is still being unlinked
            await asyncio.sleep(0)
            cancelled = await cancelled_at(cache.close(), wait)
            await tasks_ended(before - {task for task in before if task.get_name() == "index writer"})
            assert evicting.done()
            assert not [one for one in descriptors_in(cache.directory.path) if not one.endswith("/lock")]

        async with opened(tmp_path / f"cache{wait}") as cache:
            assert [name.name for name in names_in(cache)] == [f"{i}.jpg" for i in range(1, 10)]
            assert await cache.check() == []
        if not cancelled:
            break
    assert wait > 0


async def test_a_cancelled_eviction_still_unlinks(cache: Cache) -> None:
    for wait in itertools.count():
        path = await put(cache, "a.jpg", b"x")
        before = asyncio.all_tasks()
        cancelled = await cancelled_at(cache.evict(path), wait)
        await tasks_ended(before)
        assert not file_of(cache, path).exists()
        assert await cache.check() == []
        if not cancelled:
            break
    assert wait > 0


async def test_a_cancelled_rescan_leaves_the_cache_as_it_was(cache: Cache) -> None:
    for i in range(10):
        await put(cache, f"{i}.jpg", content(i, 1000))
    for wait in itertools.count():
        before = asyncio.all_tasks()
        cancelled = await cancelled_at(rescan(cache), wait)
        await tasks_ended(before)
        assert await cache.check() == []
        assert len(cache) == 10
        if not cancelled:
            break
    assert wait > 0


async def rescan(cache: Cache) -> None:
    await cache.rescan()
