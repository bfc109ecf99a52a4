"""A reservation holds space and a path until it is committed or released, and never counts a byte twice."""

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.path_states import PathState
from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.shared.errors import CacheFullError
from gcs_prefetchd.shared.objects import ObjectName
from support.caches import BUCKET, LIMIT, content, keeping, path_of, put, stamp_of, version_of

NAME = ObjectName(BUCKET, "a.jpg")


def state_of(cache: Cache) -> PathState:
    return cache.paths.states.state(path_of("a.jpg"))


async def test_a_released_reservation_leaves_nothing(cache: Cache) -> None:
    reservation = Reservation(cache, NAME)
    await reservation.reserve(1000)
    reservation.set_written(400)
    assert (cache.capacity.reserved_bytes, cache.capacity.written_bytes) == (1000, 400)
    assert state_of(cache) is PathState.PUBLISHING
    reservation.release()
    reservation.release()
    assert (cache.capacity.reserved_bytes, cache.capacity.written_bytes) == (0, 0)
    assert state_of(cache) is PathState.ABSENT
    assert not reservation.is_committed


async def test_another_size_replaces_what_was_reserved(cache: Cache) -> None:
    reservation = Reservation(cache, NAME)
    for size_bytes in (1000, 1000, 300, LIMIT):
        await reservation.reserve(size_bytes)
        assert cache.capacity.reserved_bytes == size_bytes
    reservation.release()


async def test_a_refused_reservation_names_its_object_and_reserves_nothing(cache: Cache) -> None:
    kept = await put(cache, "kept.jpg", content(1, 600_000))
    reservation = Reservation(cache, NAME, keeping(cache, kept))
    with pytest.raises(CacheFullError, match=r"^cache gs://pictures/a\.jpg: no space for 500 KB: the cache holds 600 KB"):
        await reservation.reserve(500_000)
    assert cache.capacity.reserved_bytes == 0
    assert state_of(cache) is PathState.ABSENT


async def test_an_empty_object_needs_no_space(cache: Cache) -> None:
    kept = await put(cache, "kept.jpg", content(1, LIMIT))
    reservation = Reservation(cache, NAME, keeping(cache, kept))
    await reservation.reserve(0)
    assert state_of(cache) is PathState.PUBLISHING
    reservation.release()


async def test_another_temporary_file_is_used_after_a_process_was_lost(cache: Cache) -> None:
    reservation = Reservation(cache, NAME)
    before = reservation.temp_path
    reservation.use_new_temp_path()
    assert reservation.temp_path != before


async def test_committed_bytes_are_cached_and_no_longer_reserved(cache: Cache) -> None:
    data = content(1, 1000)
    reservation = Reservation(cache, NAME)
    async with reservation.writer() as writer:
        await writer.start(version_of("a.jpg", data))
        await writer.write(data)
        await writer.publish(version_of("a.jpg", data))
    assert reservation.is_committed
    assert (cache.bytes, cache.capacity.reserved_bytes) == (1000, 0)
    assert cache.stamp(reservation.path) == stamp_of(data)
    assert state_of(cache) is PathState.CACHED
