"""Why a reader waited for an object."""

from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.planning.wait_reasons import WAIT_REASONS, wait_reason
from support.registries import add_items, path_of, register, report_reads


def reason_for(registry: Registry, item: int, *, blocked: bool = False, other_generation: bool = False) -> str:
    part, cached = registry.lookup.locate(path_of(item)), registry.eviction.cached
    return wait_reason(part, cached, is_blocked=blocked, is_other_generation=other_generation)


def test_an_object_that_no_plan_needs_was_not_planned(registry: Registry) -> None:
    register(registry, [1, 2])
    assert reason_for(registry, 5) == "not_planned"
    assert reason_for(registry, 1) != "not_planned"
    report_reads(registry, "job", 1)
    assert reason_for(registry, 1) == "not_planned"


def test_an_object_that_belongs_to_no_item_was_not_planned() -> None:
    assert wait_reason(None, {}, is_blocked=False, is_other_generation=False) == "not_planned"


def test_a_needed_object_is_late_or_throttled_or_changed(registry: Registry) -> None:
    register(registry, [1, 2])
    assert reason_for(registry, 1) == "late"
    assert reason_for(registry, 1, blocked=True) == "throttled"
    assert reason_for(registry, 1, blocked=True, other_generation=True) == "changed"


def test_an_item_that_was_removed_although_it_was_needed_was_evicted(registry: Registry) -> None:
    register(registry, [1, 2])
    add_items(registry, 1)
    for part in (0, 1):
        registry.files.remove(path_of(1, part))
    assert reason_for(registry, 1, blocked=True) == "evicted"
    add_items(registry, 1)
    registry.files.remove(path_of(1, 0))
    assert reason_for(registry, 1) == "late"


def test_an_item_that_was_removed_when_it_was_not_needed_is_late(registry: Registry) -> None:
    register(registry, [1, 2])
    add_items(registry, 5)
    for part in (0, 1):
        registry.files.remove(path_of(5, part))
    register(registry, [5], epoch=1)
    assert reason_for(registry, 5) == "late"


def test_every_reason_is_one_that_the_statistics_report(registry: Registry) -> None:
    register(registry, [1, 2])
    reasons = {
        reason_for(registry, item, blocked=b, other_generation=o)
        for item in (1, 5)
        for b in (False, True)
        for o in (False, True)
    }
    assert reasons <= set(WAIT_REASONS)
