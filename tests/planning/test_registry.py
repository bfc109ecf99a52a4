"""All readers of the node: how they register, read and leave, and what a manifest changes for them."""

import gc
import logging
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import STREAM_IDLE_S, Registry
from gcs_prefetchd.planning.stream import NEVER
from gcs_prefetchd.shared.objects import ObjectName
from support.plans import ROOT, manifest_of, manifest_of_many, plan_of
from support.registries import (
    LARGE_BYTES,
    MANIFEST,
    FakeClock,
    manifest_of_items,
    order_of,
    path_of,
    positions,
    put_in_force,
    readers_by_stream,
    register,
    report_reads,
)


def test_before_a_data_root_is_listed_events_change_nothing() -> None:
    empty = Registry(0, LARGE_BYTES)
    assert list(empty) == []
    assert empty.catalog.newest_manifest(ROOT) is None
    empty.record_reads("job", [MANIFEST.part_name(0, 0)])
    empty.files.add(path_of(0))
    empty.files.record_open(path_of(0))
    assert empty.files.remove(path_of(0)) is None
    empty.forget_idle()
    empty.end_job("job")
    assert empty.lookup.locate(path_of(0)) is None


def test_the_next_epochs_plan_replaces_the_last_and_keeps_the_stream(registry: Registry) -> None:
    first = register(registry, [1, 2])
    second = register(registry, [2, 1], epoch=1)
    assert list(registry) == [second]
    assert second.stream is first.stream
    assert (second.stream.epoch.number, order_of(second)) == (1, [2, 1])


def test_the_same_plan_twice_is_one_stream_at_the_last_position(registry: Registry) -> None:
    """A reader whose first attempt timed out sends it again; so does one that finds the daemon restarted."""
    register(registry, [3, 1, 2])
    report_reads(registry, "job", 3)
    register(registry, [3, 1, 2], position=2)
    assert positions(registry) == {"job/0": 2}
    report_reads(registry, "job", 2)
    assert readers_by_stream(registry)["job/0"].stream.is_finished


def test_a_stream_that_moves_to_another_data_root_leaves_the_first(registry: Registry) -> None:
    drawings = manifest_of_items(5, "gs://drawings")
    put_in_force(registry, drawings)
    register(registry, [1, 2])
    moved = register(registry, [4], listed=drawings)
    assert readers_by_stream(registry)["job/0"] is moved
    seeded = readers_by_stream(registry)[f"seeded {ROOT}"]
    assert seeded.is_seeded
    assert registry.eviction.cached[ROOT].streams == [seeded.stream]


def test_a_stream_that_another_job_continues_belongs_to_that_job(registry: Registry) -> None:
    """For a run that was killed and restarted, the end of the first process may be noticed last."""
    register(registry, [3, 1, 2], job="first")
    register(registry, [3, 1, 2], job="second", position=1)
    registry.end_job("first")
    report_reads(registry, "second", 1)
    assert positions(registry) == {"job/0": 2}


def test_a_plan_may_refer_to_an_earlier_manifest(registry: Registry) -> None:
    """An epoch that started before the data root was listed again continues unchanged; changed objects are fetched again."""
    first = manifest_of(["b", "c", "d"])
    put_in_force(registry, first)
    put_in_force(registry, manifest_of(["a", "b", "d"], generations={"d": 2}))
    reader = register(registry, [2, 0, 1], listed=first)
    assert [next((v.name.name, v.generation) for v in registry.lookup.versions(ROOT, n)) for n in order_of(reader)] == [
        ("train/images/d.jpg", 2),
        ("train/images/b.jpg", 1),
        ("train/images/c.jpg", 1),
    ]
    later = register(registry, [2, 0], listed=manifest_of(["a", "b", "d"], generations={"d": 2}), stream="later/0")
    assert order_of(later)[0] == order_of(reader)[0]


def test_an_earlier_manifest_that_is_added_late_is_known_but_not_the_newest(registry: Registry) -> None:
    """A job's manifest may be older than the daemon. Items that have numbers keep them, and the others get new ones."""
    running = register(registry, [3, 1, 2])
    earlier = manifest_of(["001", "003", "more"], generation=7)
    assert registry.catalog.find_manifest(ROOT, earlier.digest) is None
    registry.add_earlier_manifest(registry.catalog.assign_numbers(earlier))
    assert registry.catalog.find_manifest(ROOT, earlier.digest) is not None
    assert registry.catalog.newest_manifest(ROOT) is MANIFEST
    reader = register(registry, [2, 1, 0], listed=earlier, stream="resumed/0")
    assert order_of(reader) == [10, 3, 1]
    assert [registry.lookup.versions(ROOT, number)[0].generation for number in order_of(reader)] == [7, 1, 1]
    registry.files.add(path_of(2, manifest=earlier))
    report_reads(registry, "resumed", 2, manifest=earlier)
    report_reads(registry, "job", 3)
    assert positions(registry) == {"resumed/0": 1, "job/0": 1}
    assert order_of(running) == [3, 1, 2]


def test_a_manifest_that_a_readers_plan_refers_to_is_in_use(registry: Registry) -> None:
    register(registry, [3], stream="early/0")
    for items in (11, 12, 13, 14):
        put_in_force(registry, manifest_of_items(items))
    history, in_use = registry.catalog.history(ROOT), registry.manifests_in_use(ROOT)
    assert {len(one.manifest) for one in in_use} == {10}
    assert [len(one.manifest) for one in history.superseded(in_use)] == [11, 12]


def test_a_running_epoch_keeps_its_order_and_position_when_the_data_root_is_listed_again(registry: Registry) -> None:
    reader = register(registry, [3, 1, 2])
    report_reads(registry, "job", 3)
    put_in_force(registry, manifest_of([f"{i:03}" for i in range(1, 14)]))
    assert (order_of(reader), reader.stream.position) == ([3, 1, 2], 1)
    report_reads(registry, "job", 1)
    assert reader.stream.position == 2
    register(registry, [3, 1, 2], epoch=1)
    report_reads(registry, "job", 3)
    assert positions(registry) == {"job/0": 1}


def test_a_plan_prepared_before_a_larger_manifest_arrived_is_accepted(registry: Registry) -> None:
    register(registry, [5, 6])
    prepared = registry.prepare(*plan_of(MANIFEST, [3, 1], epoch=1))
    larger = manifest_of_items(500)
    put_in_force(registry, larger)
    reader = registry.register(prepared)
    assert reader.stream.next_place(499) == NEVER
    registry.files.add(path_of(499, manifest=larger))
    report_reads(registry, "job", 3)
    assert reader.stream.position == 1


def test_an_ended_job_needs_nothing_and_the_seeded_stream_returns(registry: Registry) -> None:
    register(registry, [1, 2], stream="a/0")
    register(registry, [3], stream="a/1")
    register(registry, [4], stream="b/0")
    registry.end_job("a")
    assert list(readers_by_stream(registry)) == ["b/0"]
    shelf = registry.eviction.cached[ROOT]
    assert [shelf.is_needed(item) for item in (1, 2, 3, 4)] == [False, False, False, True]
    registry.end_job("b")
    assert list(readers_by_stream(registry)) == [f"seeded {ROOT}"]


def test_the_end_of_a_job_without_plans_ends_no_stream(registry: Registry) -> None:
    """The name of the seeded stream's own job is empty."""
    registry.end_job("")
    registry.end_job("someone")
    assert list(readers_by_stream(registry)) == [f"seeded {ROOT}"]


def test_a_stream_that_ends_is_logged_with_the_reason(
    registry: Registry, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        register(registry, [1], stream="a/0")
        register(registry, [1], stream="b/0")
        registry.end_job("a")
        clock.now_s = STREAM_IDLE_S + 1
        registry.forget_idle()
    assert caplog.messages == ["stream a/0: its process has ended", "stream b/0: silent for 901 s"]


def test_a_silent_reader_is_forgotten_and_one_that_reads_is_not(registry: Registry, clock: FakeClock) -> None:
    register(registry, [1, 2], stream="dead/0")
    register(registry, [1, 2], stream="alive/0")
    clock.now_s = STREAM_IDLE_S - 1
    report_reads(registry, "alive", 1)
    registry.forget_idle()
    assert sorted(readers_by_stream(registry)) == ["alive/0", "dead/0"]
    clock.now_s = STREAM_IDLE_S + 1
    registry.forget_idle()
    assert list(readers_by_stream(registry)) == ["alive/0"]
    clock.now_s = 2 * STREAM_IDLE_S + 1
    registry.forget_idle()
    assert list(readers_by_stream(registry)) == [f"seeded {ROOT}"]


def test_a_forgotten_reader_may_register_again(registry: Registry, clock: FakeClock) -> None:
    register(registry, [1, 2])
    clock.now_s = STREAM_IDLE_S + 1
    registry.forget_idle()
    report_reads(registry, "job", 1)
    register(registry, [1, 2], epoch=1)
    registry.forget_idle()
    assert readers_by_stream(registry)["job/0"].stream.epoch.number == 1


def test_readers_may_register_and_leave_during_an_iteration(registry: Registry) -> None:
    for _ in registry:
        register(registry, [1])
    assert list(readers_by_stream(registry)) == ["job/0"]


@pytest.fixture
def no_collection() -> Iterator[None]:
    """The garbage of earlier tests is not collected during the test."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_no_change_of_streams_blocks_the_event_loop_among_a_million_items() -> None:
    """20 ms are promised for each step; orders are computed in threads. Half of the items are cached."""
    registry, manifest = Registry(5, LARGE_BYTES, window_items=100), manifest_of_many(1_000_000)
    listed, took_s = registry.catalog.assign_numbers(manifest), list[float]()

    def on_the_loop(step: Callable[[], object]) -> None:
        started_s = time.thread_time()
        step()
        took_s.append(time.thread_time() - started_s)
        while not registry.eviction.cached[ROOT].is_sorted:
            started_s = time.thread_time()
            registry.eviction.sort_more()
            took_s.append(time.thread_time() - started_s)

    def start_due_stream() -> None:
        ((data_root, number),) = registry.seeded.pop_due()
        seeded = registry.seeded.prepare(data_root, number)
        on_the_loop(lambda: registry.start_seeded(seeded))

    on_the_loop(lambda: registry.set_manifest(listed))
    start_due_stream()
    registry.eviction.cached[ROOT].parts[::2] = 3
    for kind, epoch in (("shuffled", 0), ("shuffled", 1), ("endless", 2), ("listed", 3)):
        prepared = registry.prepare(*plan_of(manifest, range(1_000_000), kind=kind, epoch=epoch))
        on_the_loop(lambda: registry.register(prepared))  # noqa: B023  # called at once
    on_the_loop(lambda: registry.end_job("job"))
    start_due_stream()
    assert max(took_s) < 0.02


@pytest.mark.parametrize("kind", ["shuffled", "endless", "listed"])
def test_a_reader_and_its_cached_items_take_at_most_40_bytes_an_item(kind: str) -> None:
    """All memory of a reader is counted, with its next epoch, whose head is known at the end of this one."""
    items = 50_000
    manifest = manifest_of([f"{i:05}" for i in range(items)])
    tracemalloc.start()
    try:
        registry = Registry(5, LARGE_BYTES, window_items=100)
        registry.set_manifest(registry.catalog.assign_numbers(manifest))
        reader = register(registry, range(items), listed=manifest, kind=kind)
        if (epoch := reader.prepare_next_epoch()) is not None:
            reader.stream.set_next_epoch(epoch)
        for item in order_of(reader)[:1000]:
            registry.eviction.add_part(ROOT, item, 0, 1.0)
            registry.eviction.mark_read(ROOT, reader.stream, item, 2.0)
            registry.eviction.extend_known(ROOT, reader.stream, 100, 2.0)
        gc.collect()
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken_bytes <= 40 * items


def test_a_read_advances_the_stream_of_its_job_and_no_other(registry: Registry) -> None:
    register(registry, [3, 1], stream="a/0")
    register(registry, [3, 1], stream="b/0")
    report_reads(registry, "a", 3)
    report_reads(registry, "c", 3)
    assert positions(registry) == {"a/0": 1, "b/0": 0}


def test_of_several_streams_of_a_job_the_one_that_has_the_item_unread_advances(registry: Registry) -> None:
    """A job has a stream for each rank, and every item is in one of them."""
    register(registry, [0, 2], stream="job/0")
    register(registry, [1, 3], stream="job/1")
    report_reads(registry, "job", 1, 0, 3, 3)
    assert positions(registry) == {"job/0": 1, "job/1": 2}


def test_an_item_read_in_two_parts_counts_once(registry: Registry) -> None:
    register(registry, [3, 3])
    registry.record_reads("job", [MANIFEST.part_name(3, 1)])
    assert positions(registry) == {"job/0": 0}
    registry.record_reads("job", [MANIFEST.part_name(3, 0)])
    assert positions(registry) == {"job/0": 1}


@pytest.mark.parametrize("name", ["train/images/999.jpg", "train/README.md", "elsewhere/images/001.jpg"])
def test_reads_of_objects_that_no_manifest_has_advance_nothing(registry: Registry, name: str) -> None:
    register(registry, [1])
    registry.record_reads("job", [ObjectName("pictures", name), ObjectName("drawings", name)])
    assert positions(registry) == {"job/0": 0}


def test_a_streams_rate_is_measured_from_its_reports(registry: Registry, clock: FakeClock) -> None:
    reader = register(registry, range(10))
    for item in range(10):
        report_reads(registry, "job", item)
        clock.now_s += 0.5
    clock.now_s -= 0.5
    assert reader.stream.rate.per_s(clock.now_s) == pytest.approx(2, rel=0.05)


def waiting_reader(registry: Registry, path: str) -> Reader | None:
    part = registry.lookup.locate(path)
    return None if part is None else registry.waiting_reader(part)


def test_the_waiting_reader_is_the_one_that_reads_the_object_next(registry: Registry) -> None:
    one = register(registry, [1, 2, 3], stream="a/0")
    other = register(registry, [3, 4], stream="b/0")
    assert waiting_reader(registry, path_of(3)) is other
    assert waiting_reader(registry, path_of(2)) is one
    assert waiting_reader(registry, path_of(7)) is None
    assert waiting_reader(registry, "pictures/train/classes.txt") is None
