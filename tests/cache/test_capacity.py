"""The arithmetic of the size limit and the free-space floor."""

from gcs_prefetchd.cache.capacity import Capacity


def test_what_is_cached_and_reserved_counts_towards_the_limit() -> None:
    capacity = Capacity(limit_bytes=1000)
    capacity.reserve(300)
    assert capacity.short_of(200, cached_bytes=500, free_bytes=0) == 0
    assert capacity.short_of(201, cached_bytes=500, free_bytes=0) == 1
    capacity.release(300)
    assert capacity.short_of(501, cached_bytes=500, free_bytes=0) == 1


def test_without_a_floor_a_full_disk_is_no_reason_to_evict() -> None:
    capacity = Capacity(limit_bytes=1000)
    assert not capacity.has_floor
    assert capacity.short_of(100, cached_bytes=0, free_bytes=0) == -900


def test_the_floor_counts_what_is_reserved_and_not_yet_written() -> None:
    capacity = Capacity(limit_bytes=10_000, min_free_bytes=100)
    capacity.reserve(300)
    capacity.written_bytes = 200  # which the disk no longer counts as free
    assert capacity.under_floor(50, free_bytes=250) == 0
    assert capacity.under_floor(51, free_bytes=250) == 1


def test_the_stricter_of_limit_and_floor_decides() -> None:
    capacity = Capacity(limit_bytes=1000, min_free_bytes=100)
    assert capacity.short_of(100, cached_bytes=1000, free_bytes=10_000) == 100
    assert capacity.short_of(100, cached_bytes=0, free_bytes=50) == 150


def test_free_space_for_a_prefetch_ignores_reservations() -> None:
    capacity = Capacity(limit_bytes=1000)
    capacity.reserve(900)
    assert capacity.fits(400, cached_bytes=600)
    assert not capacity.fits(401, cached_bytes=600)


def test_a_refusal_names_every_number_that_matters() -> None:
    capacity = Capacity(limit_bytes=1_000_000, min_free_bytes=50_000)
    capacity.reserve(200_000)
    assert capacity.refusal(2_000_000, cached_bytes=0) == "no space for 2.0 MB: the whole cache is 1.0 MB"
    assert capacity.refusal(500_000, cached_bytes=900_000) == (
        "no space for 500 KB: the cache holds 900 KB of 1.0 MB, reserves 200 KB for downloads, keeps 50.0 KB of the disk free, "
        "and needs what it holds sooner"
    )
