"""Files as parts of items: what is ready, what is adopted, and which files are evicted."""

from gcs_prefetchd.planning.item_refs import ItemRef
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.shared.objects import ObjectName
from support.plans import ROOT
from support.registries import (
    LARGE_BYTES,
    MANIFEST,
    FakeClock,
    add_items,
    manifest_of_items,
    path_of,
    put_in_force,
    register,
    report_reads,
)


def test_an_item_is_ready_when_all_of_its_parts_are_cached(registry: Registry) -> None:
    reader = register(registry, [3, 1])
    registry.files.add(path_of(3, 0))
    assert not reader.is_item_ready(3)
    registry.files.add(path_of(3, 1))
    assert reader.is_item_ready(3)
    assert registry.files.remove(path_of(3, 0)) == (ROOT, 3, 0)
    assert not reader.is_item_ready(3)


def test_files_not_needed_soon_are_evicted_first_least_recently_used_first(registry: Registry, clock: FakeClock) -> None:
    register(registry, [0, 1, 2, 3])
    for item in (5, 6, 0, 1, 2, 7):
        clock.now_s += 1
        add_items(registry, item)
    clock.now_s += 1
    registry.files.record_open(path_of(5))
    clock.now_s += 1
    registry.files.add("pictures/train/classes.txt")
    chosen = registry.files.choose_victims(11, None, lambda path: 1)
    ordered = [path_of(6), path_of(7), path_of(5), "pictures/train/classes.txt", path_of(2), path_of(1)]
    assert chosen is not None
    assert [one for one in chosen if "/labels/" not in one] == ordered
    assert [path_of(item, 1) for item in (6, 7, 5, 2, 1)] == [one for one in chosen if "/labels/" in one]


def test_no_file_is_evicted_for_an_item_that_is_needed_later(registry: Registry, clock: FakeClock) -> None:
    register(registry, [0, 1, 2, 3])
    add_items(registry, 0, 1, 2)
    assert registry.files.choose_victims(1, ItemRef(ROOT, 3), lambda path: 1) is None
    assert registry.files.choose_victims(1, ItemRef(ROOT, 1), lambda path: 1) == [path_of(2, 0), path_of(2, 1)]


def test_a_reader_that_pauses_loses_no_file_that_it_needs_next(registry: Registry, clock: FakeClock) -> None:
    """Otherwise an item that waits for a slot would become overdue, and evict items that are read before it."""
    register(registry, range(10))
    for item in range(4):
        clock.now_s += 0.01
        report_reads(registry, "job", item)
    add_items(registry, 4, 5, 6, 8)
    for pause_s in (0.0, 0.01, 1.0, 1000.0):
        clock.now_s += pause_s
        assert registry.files.choose_victims(1, ItemRef(ROOT, 9), lambda path: 1) is None
    assert registry.files.choose_victims(1, ItemRef(ROOT, 7), lambda path: 1) == [path_of(8, 0), path_of(8, 1)]


def test_files_cached_before_the_data_root_was_listed_are_adopted_in_their_order_of_use(clock: FakeClock) -> None:
    registry = Registry(5, LARGE_BYTES, clock=clock)
    paths = [path_of(item, part) for item in (4, 2, 7) for part in (0, 1)] + ["pictures/train/classes.txt"]
    registry.set_manifest(registry.catalog.assign_numbers(MANIFEST))
    for one, place in registry.files.locate_all(paths):
        registry.files.adopt(one, place)
    registry.finish_adoption()
    reader = register(registry, [2, 4])
    assert [reader.is_item_ready(item) for item in (4, 2, 7, 1)] == [True, True, True, False]
    assert reader.missing_at_epoch_start == 0
    victims = registry.files.choose_victims(7, None, lambda path: 1)
    assert victims is not None
    assert sorted(victims[:3]) == sorted(["pictures/train/classes.txt", path_of(7, 0), path_of(7, 1)])
    assert victims[3:] == [path_of(4, 0), path_of(4, 1), path_of(2, 0), path_of(2, 1)]


def test_an_itemless_object_that_becomes_part_of_an_item_is_adopted(registry: Registry) -> None:
    larger = manifest_of_items(11)
    new = path_of(10, 0, larger)
    registry.files.add(new)
    assert list(registry.eviction.itemless) == [new]
    put_in_force(registry, larger)
    for one, place in registry.files.locate_all(list(registry.eviction.itemless)):
        registry.files.adopt(one, place)
    registry.finish_adoption()
    assert list(registry.eviction.itemless) == []
    assert registry.eviction.cached[ROOT].parts_of(10) == 1


def test_an_itemless_object_that_was_used_is_evicted_later_and_one_that_is_gone_never(registry: Registry) -> None:
    for name in "abc":
        registry.files.add(f"pictures/train/{name}.txt")
    registry.files.record_open("pictures/train/a.txt")
    registry.record_reads("someone", [ObjectName("pictures", "train/b.txt")])
    registry.files.remove("pictures/train/c.txt")
    assert registry.files.choose_victims(2, None, lambda path: 1) == ["pictures/train/a.txt", "pictures/train/b.txt"]
