"""Which items are prefetched next, over a registry without a cache."""

from collections.abc import Sequence

import pytest

from gcs_prefetchd.fetch.next_items import MAX_PLACES, ItemPrefetch, NextItem, NextItems
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.paths import cache_path
from support.plans import ROOT, manifest_of, manifest_of_many, plan_of


class Clock:
    """A clock that stops until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def registry_of(manifest: Manifest, window_items: int | None) -> Registry:
    """A registry that knows this listing."""
    registry = Registry(0, 10**9, window_items=window_items, clock=Clock())
    registry.set_manifest(registry.catalog.assign_numbers(manifest))
    return registry


def register(registry: Registry, manifest: Manifest, items: Sequence[int], stream: str = "job/0") -> Reader:
    """Register a reader that will read these items."""
    plan, indices = plan_of(manifest, items, stream=stream)
    return registry.register(registry.prepare(plan, indices))


def put(registry: Registry, manifest: Manifest, *items: int) -> None:
    """Cache every part of these items."""
    for item in items:
        for version in manifest.versions(item):
            registry.files.add(cache_path(version.name.bucket, version.name.name))


def turn(
    registry: Registry, active: dict[tuple[str, int], ItemPrefetch] | None = None, full_streams: frozenset[str] = frozenset()
) -> list[NextItem]:
    """Every item that one turn chooses."""
    items = NextItems(registry, active if active is not None else {}, full_streams)
    chosen = []
    while (next_item := items.soonest()) is not None:
        chosen.append(next_item)
    return chosen


MANIFEST = manifest_of([f"{number:03}" for number in range(20)])


def test_the_items_of_a_window_are_chosen_in_their_order() -> None:
    registry = registry_of(MANIFEST, window_items=4)
    register(registry, MANIFEST, [7, 3, 11, 5, 2, 1])
    chosen = turn(registry)
    assert [one.item for one in chosen] == [7, 3, 11, 5]
    assert [one.place for one in chosen] == [0, 1, 2, 3]
    assert all(one.is_in_window for one in chosen)


def test_a_chosen_item_is_planned_and_not_chosen_again() -> None:
    registry = registry_of(MANIFEST, window_items=4)
    register(registry, MANIFEST, range(10))
    assert len(turn(registry)) == 4
    assert turn(registry) == []


def test_cached_items_are_skipped() -> None:
    registry = registry_of(MANIFEST, window_items=4)
    register(registry, MANIFEST, range(10))
    put(registry, MANIFEST, 0, 2)
    assert [one.item for one in turn(registry)] == [1, 3]


def test_an_item_of_which_a_part_is_missing_is_chosen() -> None:
    registry = registry_of(MANIFEST, window_items=1)
    register(registry, MANIFEST, [5])
    name = MANIFEST.version(5, 0).name
    registry.files.add(cache_path(name.bucket, name.name))
    assert [one.item for one in turn(registry)] == [5]


def test_an_item_in_progress_is_not_chosen_but_marked_as_planned_again() -> None:
    registry = registry_of(MANIFEST, window_items=4)
    reader = register(registry, MANIFEST, range(10))
    prefetch = ItemPrefetch(reader, lambda short_bytes: None, 2)
    assert [one.item for one in turn(registry, {(ROOT, 1): prefetch})] == [0, 2, 3]
    assert prefetch.is_planned_again


def test_of_several_readers_the_one_that_needs_its_item_soonest_goes_first() -> None:
    registry = registry_of(MANIFEST, window_items=2)
    slow, fast = register(registry, MANIFEST, range(10)), register(registry, MANIFEST, range(10, 20), stream="job/1")
    for now_s in (1000.0, 1001.0, 1002.0):
        slow.stream.rate.add(1, now_s)
        fast.stream.rate.add(1000, now_s)
    chosen = [one.reader.stream.id for one in turn(registry)]
    assert chosen.index("job/1") < 2
    assert chosen[-1] == "job/0"
    assert sorted(chosen) == ["job/0", "job/0", "job/1", "job/1"]


def test_beyond_the_window_items_are_chosen_for_free_space_only() -> None:
    manifest = manifest_of_many(300)
    registry = registry_of(manifest, window_items=None)
    reader = register(registry, manifest, range(300))
    window = registry.window_items(reader)
    assert 0 < window < 300
    assert [one.is_in_window for one in turn(registry)] == [True] * window + [False] * (300 - window)


def test_a_full_stream_gets_nothing_beyond_its_window() -> None:
    manifest = manifest_of_many(300)
    registry = registry_of(manifest, window_items=None)
    reader = register(registry, manifest, range(300))
    chosen = turn(registry, full_streams=frozenset({"job/0"}))
    assert len(chosen) == registry.window_items(reader)


@pytest.mark.parametrize(("cached", "expected"), [(MAX_PLACES - 1, [MAX_PLACES - 1]), (MAX_PLACES, [])])
def test_a_turn_looks_at_a_bounded_number_of_places(cached: int, expected: list[int]) -> None:
    manifest = manifest_of_many(MAX_PLACES + 10)
    registry = registry_of(manifest, window_items=10 * MAX_PLACES)
    register(registry, manifest, range(MAX_PLACES + 10))
    put(registry, manifest, *range(cached))
    items = NextItems(registry, {}, set())
    first = items.soonest()
    assert ([] if first is None else [first.item]) == expected
    assert items.has_unseen_places == (first is None)


def test_the_next_turn_continues_where_the_last_one_stopped() -> None:
    manifest = manifest_of_many(MAX_PLACES + 10)
    registry = registry_of(manifest, window_items=10 * MAX_PLACES)
    register(registry, manifest, range(MAX_PLACES + 10))
    put(registry, manifest, *range(MAX_PLACES + 5))
    assert turn(registry) == []
    assert [one.item for one in turn(registry)] == list(range(MAX_PLACES + 5, MAX_PLACES + 10))
