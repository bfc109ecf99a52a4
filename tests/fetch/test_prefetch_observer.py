"""What the prefetcher learns from the cache and the slots."""

import asyncio

import pytest

from gcs_prefetchd.fetch.prefetch_observer import PrefetchObserver
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.objects import ObjectVersion
from gcs_prefetchd.shared.paths import cache_path
from support.plans import manifest_of, plan_of

SIZE = 100
MANIFEST = manifest_of(["a", "b", "c"], size=SIZE)


def path_of(version: ObjectVersion) -> str:
    return cache_path(version.name.bucket, version.name.name)


def stamp_of(version: ObjectVersion) -> Stamp:
    return Stamp(version.generation, version.size, 1)


@pytest.fixture
def registry() -> Registry:
    registry = Registry(0, 10**9, window_items=3)
    registry.set_manifest(registry.catalog.assign_numbers(MANIFEST))
    return registry


@pytest.fixture
def reader(registry: Registry) -> Reader:
    """A reader of all items, whose window has been planned."""
    plan, indices = plan_of(MANIFEST, [0, 1, 2])
    reader = registry.register(registry.prepare(plan, indices))
    reader.stream.planned_end = 3
    return reader


def newer(version: ObjectVersion) -> ObjectVersion:
    return ObjectVersion(version.name, version.generation + 1, version.size, version.crc32c)


async def test_wake_wakes_the_prefetcher_and_nothing_is_settled() -> None:
    observer = PrefetchObserver(Registry(0, 10**9))
    observer.settled.set()
    observer.wake()
    assert observer.woken.is_set()
    assert not observer.settled.is_set()


async def test_the_bytes_of_running_prefetches_are_incoming_until_they_arrive_or_fail(registry: Registry) -> None:
    observer = PrefetchObserver(registry)
    first, second = MANIFEST.versions(0)
    observer.prefetch_started(first)
    observer.prefetch_started(second)
    assert (observer.running_prefetches, observer.incoming_bytes) == (2, 2 * SIZE)
    observer.arrived(path_of(first), stamp_of(first))
    assert (observer.running_prefetches, observer.incoming_bytes) == (2, SIZE)
    observer.prefetch_ended(first)
    observer.prefetch_ended(second)
    assert (observer.running_prefetches, observer.incoming_bytes) == (0, 0)


async def test_a_newer_version_replaces_the_incoming_one_and_its_end_counts_once(registry: Registry) -> None:
    observer, old = PrefetchObserver(registry), MANIFEST.version(0, 0)
    observer.prefetch_started(old)
    observer.prefetch_started(newer(old))
    assert observer.incoming_bytes == SIZE
    observer.prefetch_ended(old)
    assert observer.incoming_bytes == SIZE
    observer.prefetch_ended(newer(old))
    assert (observer.running_prefetches, observer.incoming_bytes) == (0, 0)


async def test_files_that_arrive_make_their_item_ready(registry: Registry, reader: Reader) -> None:
    observer = PrefetchObserver(registry)
    for version in MANIFEST.versions(1):
        assert not reader.is_item_ready(1)
        observer.arrived(path_of(version), stamp_of(version))
    assert reader.is_item_ready(1)


async def test_an_item_that_lost_a_file_is_planned_again(registry: Registry, reader: Reader) -> None:
    observer = PrefetchObserver(registry)
    for version in MANIFEST.versions(1):
        observer.arrived(path_of(version), stamp_of(version))
    assert not observer.woken.is_set()
    observer.lost(path_of(MANIFEST.version(1, 0)))
    assert observer.woken.is_set()
    assert reader.stream.planned_end == 1
    assert not reader.is_item_ready(1)


async def test_a_lost_file_that_belongs_to_no_item_does_not_wake_the_prefetcher(registry: Registry) -> None:
    observer = PrefetchObserver(registry)
    observer.lost("pictures/other.txt")
    assert not observer.woken.is_set()


async def test_a_free_slot_wakes_the_prefetcher_only_while_prefetches_run(registry: Registry) -> None:
    observer = PrefetchObserver(registry)
    observer.slot_freed()
    assert not observer.woken.is_set()
    observer.prefetch_started(MANIFEST.version(0, 0))
    observer.slot_freed()
    assert observer.woken.is_set()
    await asyncio.wait_for(observer.woken.wait(), 1)
