"""The seeded stream of a data root: before a reader registers, without a plan, and after the last reader has left."""

from gcs_prefetchd.planning.registry import STREAM_IDLE_S, Registry
from gcs_prefetchd.planning.stream import NEVER
from gcs_prefetchd.shared.epoch_order import epoch_order
from support.plans import ROOT, indices_of
from support.registries import (
    MANIFEST,
    FakeClock,
    manifest_of_items,
    order_of,
    positions,
    put_in_force,
    readers_by_stream,
    register,
    report_reads,
    start_due_streams,
)


def test_a_listed_data_root_has_a_stream_of_the_seeded_order(registry: Registry) -> None:
    (seeded,) = registry
    assert order_of(seeded) == epoch_order(5, 0, indices_of(range(10))).tolist()
    assert (seeded.stream.epoch.number, seeded.stream.position, seeded.stream.job, seeded.is_seeded) == (0, 0, "", True)
    assert registry.stream_ids == []
    assert registry.catalog.newest_manifest(ROOT) is MANIFEST


def test_reads_of_jobs_without_a_plan_advance_the_seeded_stream_from_epoch_to_epoch(registry: Registry) -> None:
    (first,) = registry
    report_reads(registry, "someone", *order_of(first)[:3])
    assert list(positions(registry).values()) == [3]
    report_reads(registry, "someone else", *order_of(first)[3:])
    (second,) = readers_by_stream(registry).values()
    assert (second.stream.epoch.number, second.stream.position) == (1, 0)
    assert order_of(second) == epoch_order(5, 1, indices_of(range(10))).tolist()


def test_a_seeded_stream_starts_its_next_epoch_at_once_if_it_is_known(registry: Registry) -> None:
    """The window has reached the next epoch's head, and the reader may already be there."""
    (first,) = registry
    following = first.prepare_next_epoch()
    assert following is not None
    first.stream.set_next_epoch(following)
    last = order_of(first)[9]
    report_reads(registry, "someone", *order_of(first)[:9])
    ahead = next(item for item in following.order[:3].tolist() if item != last)
    report_reads(registry, "someone", last, ahead)
    (second,) = registry
    assert (second.stream.epoch.number, second.stream.position, second.plan.epoch) == (1, 1, 1)
    assert order_of(second) == epoch_order(5, 1, indices_of(range(10))).tolist()
    assert second.stream.next_place(ahead) == NEVER
    assert registry.seeded.pop_due() == []


def test_the_next_epoch_of_a_seeded_stream_is_known(registry: Registry) -> None:
    (seeded,) = registry
    following = seeded.prepare_next_epoch()
    assert following is not None
    assert (following.number, following.order.tolist()) == (1, epoch_order(5, 1, indices_of(range(10))).tolist())


def test_a_seeded_order_is_discarded_if_a_reader_registered_while_it_was_computed(registry: Registry) -> None:
    register(registry, [1], stream="a/0")
    registry.end_job("a")
    ((data_root, number),) = registry.seeded.pop_due()
    prepared = registry.seeded.prepare(data_root, number)
    register(registry, [1], stream="b/0")
    registry.start_seeded(prepared)
    assert list(readers_by_stream(registry)) == ["b/0"]


def test_a_seeded_order_is_discarded_if_the_data_root_was_listed_again_while_it_was_computed(registry: Registry) -> None:
    register(registry, [1], stream="a/0")
    registry.end_job("a")
    ((data_root, number),) = registry.seeded.pop_due()
    prepared = registry.seeded.prepare(data_root, number)
    registry.set_manifest(registry.catalog.assign_numbers(manifest_of_items(12)))
    registry.start_seeded(prepared)
    assert list(registry) == []
    (seeded,) = readers_by_stream(registry).values()
    assert len(seeded.stream) == 12


def test_a_new_manifest_restarts_the_seeded_stream_in_the_same_epoch(registry: Registry) -> None:
    report_reads(registry, "someone", *range(10))
    start_due_streams(registry)
    put_in_force(registry, manifest_of_items(12))
    (seeded,) = registry
    assert (seeded.stream.epoch.number, len(seeded.stream)) == (1, 12)


def test_a_seeded_stream_never_becomes_idle(registry: Registry, clock: FakeClock) -> None:
    """A job without a plan may pause to validate or to save; its prefetching continues where it was."""
    (seeded,) = registry
    report_reads(registry, "someone", order_of(seeded)[0])
    clock.now_s = 100 * STREAM_IDLE_S
    registry.forget_idle()
    assert list(registry) == [seeded]
    assert seeded.stream.position == 1


def test_a_readers_plan_replaces_the_seeded_stream(registry: Registry) -> None:
    register(registry, [3, 1, 2])
    assert registry.stream_ids == list(readers_by_stream(registry)) == ["job/0"]
    assert order_of(readers_by_stream(registry)["job/0"]) == [3, 1, 2]
    put_in_force(registry, manifest_of_items(11))
    assert list(readers_by_stream(registry)) == ["job/0"]


def test_a_plan_replaces_only_the_seeded_stream_of_its_own_data_root(registry: Registry) -> None:
    put_in_force(registry, manifest_of_items(5, "gs://drawings"))
    register(registry, [0])
    assert sorted(readers_by_stream(registry)) == ["job/0", "seeded gs://drawings"]


def test_until_its_new_order_is_computed_the_seeded_stream_uses_the_versions_of_the_newest_manifest(registry: Registry) -> None:
    (seeded,) = registry
    registry.set_manifest(registry.catalog.assign_numbers(manifest_of_items(9, generation=2)))
    assert list(registry) == [seeded]
    assert [version.generation for version in registry.lookup.versions(ROOT, newest_manifest_only=True, item=3)] == [2, 2]
    assert registry.lookup.versions(ROOT, newest_manifest_only=True, item=9) == []
