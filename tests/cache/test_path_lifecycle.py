"""A path's state, its entry and its file stay in step, in whatever order files are published, evicted and lost."""

import asyncio

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.path_states import PathState
from support.caches import content, file_of, observer_of, path_of, put, stamp_of


async def test_a_claimed_path_is_left_alone_until_it_is_committed(cache: Cache) -> None:
    path = await put(cache, "a.jpg", content(1, 1000))
    await cache.paths.claim(path)
    assert cache.paths.states.state(path) is PathState.PUBLISHING
    assert cache.paths.evictable_bytes(path) == 0
    assert cache.paths.evict_all([path]) == 0
    cache.paths.commit(path, stamp_of(content(1, 1000)))
    assert cache.paths.states.state(path) is PathState.CACHED
    assert cache.paths.evictable_bytes(path) == 1000


async def test_an_abandoned_replacement_leaves_the_older_file(cache: Cache) -> None:
    path = await put(cache, "a.jpg", b"old")
    await cache.paths.claim(path)
    cache.paths.abandon(path)
    assert cache.paths.states.state(path) is PathState.CACHED
    assert file_of(cache, path).read_bytes() == b"old"


async def test_a_file_deleted_by_hand_during_its_replacement_is_absent_if_that_is_abandoned(cache: Cache) -> None:
    path = await put(cache, "a.jpg", b"old")
    await cache.paths.claim(path)
    await cache.evict(path)  # which has to wait for the replacement
    file_of(cache, path).unlink()
    cache.paths.forget(path)
    cache.paths.abandon(path)
    assert cache.paths.states.state(path) is PathState.ABSENT
    assert observer_of(cache).losses == [path]


async def test_a_second_claim_keeps_the_eviction_that_waits_for_the_first(cache: Cache) -> None:
    """As when the clean-up of a cancelled download is still going on as the next one starts."""
    path = await put(cache, "a.jpg", b"old")
    await cache.paths.claim(path)
    await cache.evict(path)
    await cache.paths.claim(path)
    cache.paths.abandon(path)
    await cache.paths.wait_for_unlinks()
    assert cache.paths.states.state(path) is PathState.ABSENT
    assert not file_of(cache, path).exists()


async def test_a_claim_waits_for_the_older_file_to_be_unlinked(cache: Cache) -> None:
    path = await put(cache, "a.jpg", b"old")
    evicting = asyncio.create_task(cache.evict(path))
    await asyncio.sleep(0)
    assert cache.paths.states.state(path) is PathState.UNLINKING
    await cache.paths.claim(path)
    assert not file_of(cache, path).exists()
    cache.paths.abandon(path)
    await evicting


async def test_victims_named_twice_or_not_cached_are_evicted_once(cache: Cache) -> None:
    path = await put(cache, "a.jpg", b"x")
    cache.paths.evict_all([path, path, path_of("absent.jpg")])
    await cache.paths.wait_for_unlinks()
    assert observer_of(cache).losses == [path]
    assert not file_of(cache, path).exists()
    assert not cache.paths.is_unlinking


async def test_a_file_that_cannot_be_unlinked_is_cached_again(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    path = await put(cache, "a.jpg", b"x")
    file_of(cache, path).unlink()
    file_of(cache, path).mkdir()
    await cache.evict(path)
    assert cache.paths.states.state(path) is PathState.CACHED
    assert observer_of(cache).arrivals == [path, path]
    assert "cannot be unlinked" in caplog.text
    file_of(cache, path).rmdir()
    await cache.evict(path)
    assert cache.paths.states.state(path) is PathState.ABSENT


async def test_held_work_ends_before_the_cache_closes(cache: Cache) -> None:
    ended = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0)
        ended.set()

    cache.paths.hold(work())
    await cache.paths.close()
    assert ended.is_set()
