"""All readers of the node: who comes and goes, what they read, what is here for them, and why one of them waits."""

import gc
import logging
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence

import pytest

from gcs_prefetchd.planning.item_refs import ItemRef
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import STREAM_IDLE_S, Registry
from gcs_prefetchd.planning.stream import NEVER
from gcs_prefetchd.planning.wait_reasons import WAIT_REASONS, wait_reason
from gcs_prefetchd.planning.window import MAX_SPARE_ITEMS, MAX_WINDOW_ITEMS
from gcs_prefetchd.shared.epoch_order import epoch_order, plan_order
from gcs_prefetchd.shared.errors import ProtocolError
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.moving_average import MovingDuration
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.shared.paths import cache_path
from support.plans import ROOT, indices_of, listing_of, listing_of_many, plan_of


def listing(items: int, root: str = ROOT, generation: int = 1) -> Manifest:
    return listing_of([f"{i:03}" for i in range(items)], root, generation)


MANIFEST = listing(10)
LARGE = 10**12


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> Registry:
    made = Registry(5, LARGE, window_items=4, clock=clock)
    put_in_force(made, MANIFEST)
    return made


def put_in_force(registry: Registry, manifest: Manifest) -> None:
    registry.set_manifest(registry.catalog.assign_numbers(manifest))
    registry.finish_adoption()
    work_out(registry)


def work_out(registry: Registry) -> None:
    """As the prefetcher does in threads."""
    for data_root, number in registry.seeded.pop_due():
        registry.start_seeded(registry.seeded.prepare(data_root, number))


def send(registry: Registry, items: Sequence[int], listed: Manifest = MANIFEST, **changes: object) -> Reader:
    return registry.register(registry.prepare(*plan_of(listed, items, **changes)))  # type: ignore[arg-type]  # any field


def readers(registry: Registry) -> dict[str, Reader]:
    """By the names of their streams, with those that are due."""
    work_out(registry)
    return {reader.stream.id: reader for reader in registry}


def positions(registry: Registry) -> dict[str, int]:
    return {reader.stream.id: reader.stream.position for reader in registry}


def order_of(reader: Reader) -> list[int]:
    return [int(item) for item in reader.stream.epoch.order]


def read(registry: Registry, job: str, *items: int, manifest: Manifest = MANIFEST) -> None:
    registry.note_reads(job, [manifest.part_name(item, part) for item in items for part in (0, 1)])


def path(item: int, part: int = 0, manifest: Manifest = MANIFEST) -> str:
    name = manifest.part_name(item, part)
    return cache_path(name.bucket, name.name)


def bring(registry: Registry, *items: int) -> None:
    """Both parts of the items are here."""
    for item in items:
        for part in (0, 1):
            registry.files.add(path(item, part))


# The seeded order


def test_before_a_listing_there_is_nothing() -> None:
    empty = Registry(0, LARGE)
    assert list(empty) == []
    assert empty.catalog.newest_manifest(ROOT) is None
    empty.note_reads("job", [MANIFEST.part_name(0, 0)])
    empty.files.add(path(0))
    empty.files.note_open(path(0))
    assert empty.files.remove(path(0)) is None
    empty.forget_idle()
    empty.end_job("job")
    assert empty.lookup.locate(path(0)) is None


def test_a_listed_data_root_has_the_seeded_order_as_its_stream(registry: Registry) -> None:
    (seeded,) = registry
    assert order_of(seeded) == epoch_order(5, 0, indices_of(range(10))).tolist()
    assert (seeded.stream.epoch.number, seeded.stream.position, seeded.stream.job, seeded.is_seeded) == (0, 0, "", True)
    assert registry.stream_ids == []
    assert registry.catalog.newest_manifest(ROOT) is MANIFEST


def test_a_job_without_a_plan_moves_the_seeded_stream_from_epoch_to_epoch(registry: Registry) -> None:
    (first,) = registry
    read(registry, "someone", *order_of(first)[:3])
    assert list(positions(registry).values()) == [3]
    read(registry, "someone else", *order_of(first)[3:])
    (second,) = readers(registry).values()
    assert (second.stream.epoch.number, second.stream.position) == (1, 0)
    assert order_of(second) == epoch_order(5, 1, indices_of(range(10))).tolist()


def test_a_seeded_epoch_whose_next_one_is_known_goes_on_with_it_at_once(registry: Registry) -> None:
    """Its window has reached into the next one's head, and its reader may be there already."""
    (first,) = registry
    following = first.prepare_next_epoch()
    assert following is not None
    first.stream.set_next_epoch(following)
    last = order_of(first)[9]
    read(registry, "someone", *order_of(first)[:9])
    ahead = next(item for item in following.order[:3].tolist() if item != last)
    read(registry, "someone", last, ahead)
    (second,) = registry
    assert (second.stream.epoch.number, second.stream.position, second.plan.epoch) == (1, 1, 1)
    assert order_of(second) == epoch_order(5, 1, indices_of(range(10))).tolist()
    assert second.stream.next_place(ahead) == NEVER
    assert registry.seeded.pop_due() == []


def test_the_seeded_streams_next_epoch_is_told_as_a_plans_is(registry: Registry) -> None:
    (seeded,) = registry
    following = seeded.prepare_next_epoch()
    assert following is not None
    assert (following.number, following.order.tolist()) == (1, epoch_order(5, 1, indices_of(range(10))).tolist())


def test_a_seeded_order_that_was_worked_out_while_a_reader_came_is_given_up(registry: Registry) -> None:
    send(registry, [1], stream="a/0")
    registry.end_job("a")
    ((data_root, number),) = registry.seeded.pop_due()
    prepared = registry.seeded.prepare(data_root, number)
    send(registry, [1], stream="b/0")
    registry.start_seeded(prepared)
    assert list(readers(registry)) == ["b/0"]


def test_a_seeded_order_that_was_worked_out_while_the_data_root_was_listed_again_is_given_up(registry: Registry) -> None:
    send(registry, [1], stream="a/0")
    registry.end_job("a")
    ((data_root, number),) = registry.seeded.pop_due()
    prepared = registry.seeded.prepare(data_root, number)
    registry.set_manifest(registry.catalog.assign_numbers(listing(12)))
    registry.start_seeded(prepared)
    assert list(registry) == []
    (seeded,) = readers(registry).values()
    assert len(seeded.stream) == 12


def test_a_new_listing_starts_the_seeded_stream_anew_in_its_epoch(registry: Registry) -> None:
    read(registry, "someone", *range(10))
    work_out(registry)
    put_in_force(registry, listing(12))
    (seeded,) = registry
    assert (seeded.stream.epoch.number, len(seeded.stream)) == (1, 12)


def test_the_seeded_stream_waits_for_its_next_reader_however_long(registry: Registry, clock: Clock) -> None:
    """A job without a plan that pauses, to validate or to save, finds its prefetching as it left it."""
    (seeded,) = registry
    read(registry, "someone", order_of(seeded)[0])
    clock.now_s = 100 * STREAM_IDLE_S
    registry.forget_idle()
    assert list(registry) == [seeded]
    assert seeded.stream.position == 1


# Plans


def test_a_readers_plan_takes_the_seeded_streams_place(registry: Registry) -> None:
    send(registry, [3, 1, 2])
    assert registry.stream_ids == list(readers(registry)) == ["job/0"]
    assert order_of(readers(registry)["job/0"]) == [3, 1, 2]
    put_in_force(registry, listing(11))
    assert list(readers(registry)) == ["job/0"]


def test_a_plan_takes_the_place_of_its_own_data_roots_stream_alone(registry: Registry) -> None:
    put_in_force(registry, listing(5, "gs://drawings"))
    send(registry, [0])
    assert sorted(readers(registry)) == ["job/0", "seeded gs://drawings"]


def test_the_next_epochs_plan_takes_the_place_of_the_last_and_keeps_the_streams_pace(registry: Registry) -> None:
    first = send(registry, [1, 2])
    second = send(registry, [2, 1], epoch=1)
    assert list(registry) == [second]
    assert second.stream is first.stream
    assert (second.stream.epoch.number, order_of(second)) == (1, [2, 1])


def test_the_same_plan_twice_is_one_stream_that_starts_at_the_position_told_last(registry: Registry) -> None:
    """A reader whose first try timed out sends it again; so does one that found the daemon restarted."""
    send(registry, [3, 1, 2])
    read(registry, "job", 3)
    send(registry, [3, 1, 2], position=2)
    assert positions(registry) == {"job/0": 2}
    read(registry, "job", 2)
    assert readers(registry)["job/0"].stream.is_finished


def test_a_stream_that_goes_to_another_data_root_leaves_the_first(registry: Registry) -> None:
    drawings = listing(5, "gs://drawings")
    put_in_force(registry, drawings)
    send(registry, [1, 2])
    moved = send(registry, [4], listed=drawings)
    assert readers(registry)["job/0"] is moved
    seeded = readers(registry)[f"seeded {ROOT}"]
    assert seeded.is_seeded
    assert registry.eviction.cached[ROOT].streams == [seeded.stream]


def test_a_stream_that_another_job_goes_on_with_is_that_jobs(registry: Registry) -> None:
    """A run that was killed and started again: the end of the first process may be noticed last."""
    send(registry, [3, 1, 2], job="first")
    send(registry, [3, 1, 2], job="second", position=1)
    registry.end_job("first")
    read(registry, "second", 1)
    assert positions(registry) == {"job/0": 2}


@pytest.mark.parametrize("kind", ["shuffled", "endless"])
def test_a_seeded_plan_becomes_its_ranks_share_of_the_order(registry: Registry, kind: str) -> None:
    reader = send(registry, range(10), kind=kind, seed=3, epoch=2, rank=1, world=2)
    assert order_of(reader) == plan_order(kind, 3, 2, indices_of(range(10)), rank=1, world=2).tolist()
    assert reader.stream.is_endless == (kind == "endless")


@pytest.mark.parametrize("kind", ["shuffled", "endless"])
def test_the_next_epoch_of_a_seeded_plan_is_known(registry: Registry, kind: str) -> None:
    reader = send(registry, range(10), kind=kind, seed=3, epoch=2, rank=1, world=2, start=4)
    following = reader.prepare_next_epoch()
    assert following is not None
    assert following.number == 3
    assert following.order.tolist() == plan_order(kind, 3, 3, indices_of(range(10)), rank=1, world=2).tolist()


def test_what_follows_a_list_is_not_known(registry: Registry) -> None:
    assert send(registry, [1, 2]).prepare_next_epoch() is None


@pytest.mark.parametrize(
    ("items", "changes", "message"),
    [
        (
            [3, 1],
            {"manifest": "feed"},
            "field 'manifest': 'feed' is not a known manifest of 'gs://pictures/train'; request it again",
        ),
        ([3, 1], {"data_root": "gs://pictures/valid"}, "field 'manifest': .* is not a known manifest of 'gs://pictures/valid'"),
        ([3, 10], {}, "field 'indices': index 10 is beyond the 10 items of the manifest"),
        ([3, 0xFFFF_FFFF], {}, "field 'indices': index 4294967295 is beyond"),
        ([], {}, "field 'indices' is empty"),
        ([], {"kind": "shuffled"}, "field 'indices' is empty"),
        ([], {"kind": "endless", "digest": ""}, "field 'indices' is empty"),
        ([3, 1], {"position": 3}, "field 'position': 3 is beyond the plan's 2 items"),
        ([3, 1, 2], {"rank": 1, "world": 2, "drop_last": 1, "position": 2}, "field 'position': 2 is beyond the plan's 1 items"),
        ([3, 1], {"digest": "0" * 16}, "field 'digest' does not match the order"),
        ([3, 1], {"digest": ""}, "field 'digest'"),
        (range(10), {"kind": "shuffled", "seed": 1, "digest": plan_of(MANIFEST, range(10))[0].digest}, "field 'digest'"),
    ],
)
def test_a_plan_that_cannot_be_names_its_field_and_changes_nothing(
    registry: Registry, items: Sequence[int], changes: dict[str, object], message: str
) -> None:
    before = list(registry)
    with pytest.raises(ProtocolError, match=f"^Plan: {message}"):
        send(registry, items, **changes)  # type: ignore[arg-type]  # none of them is a parameter
    assert list(registry) == before


@pytest.mark.parametrize("start", [3, 1000])
def test_a_plan_that_starts_at_or_beyond_its_end_is_read_already(registry: Registry, start: int) -> None:
    assert send(registry, [3, 1, 2], start=start).stream.is_finished


@pytest.mark.parametrize(("items", "position"), [([1, 2], 2), ([9, 0], 1), ([1, 1, 1], 0)])
def test_a_plan_may_be_read_already_or_repeat_itself(registry: Registry, items: list[int], position: int) -> None:
    send(registry, items, position=position)
    assert positions(registry) == {"job/0": position}


def test_a_plan_may_refer_to_an_earlier_listing(registry: Registry) -> None:
    """An epoch that began before the data root was listed again goes on as it was; what has changed since is fetched anew."""
    first = listing_of(["b", "c", "d"])
    put_in_force(registry, first)
    put_in_force(registry, listing_of(["a", "b", "d"], generations={"d": 2}))
    reader = send(registry, [2, 0, 1], listed=first)
    assert [next((v.name.name, v.generation) for v in registry.lookup.versions(ROOT, n)) for n in order_of(reader)] == [
        ("train/images/d.jpg", 2),
        ("train/images/b.jpg", 1),
        ("train/images/c.jpg", 1),
    ]
    later = send(registry, [2, 0], listed=listing_of(["a", "b", "d"], generations={"d": 2}), stream="later/0")
    assert order_of(later)[0] == order_of(reader)[0]


def test_an_earlier_listing_that_comes_late_is_known_and_not_the_newest(registry: Registry) -> None:
    """A job's, from before this daemon's time. Its items keep the numbers that they have, and the others get new ones."""
    running = send(registry, [3, 1, 2])
    earlier = listing_of(["001", "003", "more"], generation=7)
    assert registry.catalog.find_manifest(ROOT, earlier.digest) is None
    registry.add_earlier_manifest(registry.catalog.assign_numbers(earlier))
    assert registry.catalog.find_manifest(ROOT, earlier.digest) is not None
    assert registry.catalog.newest_manifest(ROOT) is MANIFEST
    reader = send(registry, [2, 1, 0], listed=earlier, stream="resumed/0")
    assert order_of(reader) == [10, 3, 1]
    assert [registry.lookup.versions(ROOT, number)[0].generation for number in order_of(reader)] == [7, 1, 1]
    registry.files.add(path(2, manifest=earlier))
    read(registry, "resumed", 2, manifest=earlier)
    read(registry, "job", 3)
    assert positions(registry) == {"resumed/0": 1, "job/0": 1}
    assert order_of(running) == [3, 1, 2]


def test_a_listing_that_a_readers_plan_refers_to_is_in_use(registry: Registry) -> None:
    send(registry, [3], stream="early/0")
    for items in (11, 12, 13, 14):
        put_in_force(registry, listing(items))
    history, in_use = registry.catalog.history(ROOT), registry.manifests_in_use(ROOT)
    assert {len(one.manifest) for one in in_use} == {10}
    assert [len(one.manifest) for one in history.superseded(in_use)] == [11, 12]


def test_before_its_order_has_been_worked_out_anew_the_seeded_stream_asks_for_what_is_listed_now(registry: Registry) -> None:
    (seeded,) = registry
    registry.set_manifest(registry.catalog.assign_numbers(listing(9, generation=2)))
    assert list(registry) == [seeded]
    assert [version.generation for version in registry.lookup.versions(ROOT, newest_manifest_only=True, item=3)] == [2, 2]
    assert registry.lookup.versions(ROOT, newest_manifest_only=True, item=9) == []


def test_a_running_epoch_keeps_its_order_and_place_through_a_relisting(registry: Registry) -> None:
    reader = send(registry, [3, 1, 2])
    read(registry, "job", 3)
    put_in_force(registry, listing_of([f"{i:03}" for i in range(1, 14)]))
    assert (order_of(reader), reader.stream.position) == ([3, 1, 2], 1)
    read(registry, "job", 1)
    assert reader.stream.position == 2
    send(registry, [3, 1, 2], epoch=1)
    read(registry, "job", 3)
    assert positions(registry) == {"job/0": 1}


def test_a_plan_worked_out_while_a_larger_listing_came_is_taken(registry: Registry) -> None:
    send(registry, [5, 6])
    prepared = registry.prepare(*plan_of(MANIFEST, [3, 1], epoch=1))
    larger = listing(500)
    put_in_force(registry, larger)
    reader = registry.register(prepared)
    assert reader.stream.next_place(499) == NEVER
    registry.files.add(path(499, manifest=larger))
    read(registry, "job", 3)
    assert reader.stream.position == 1


# Ends


def test_a_job_that_ended_counts_for_nothing_and_the_seeded_stream_comes_back(registry: Registry) -> None:
    send(registry, [1, 2], stream="a/0")
    send(registry, [3], stream="a/1")
    send(registry, [4], stream="b/0")
    registry.end_job("a")
    assert list(readers(registry)) == ["b/0"]
    shelf = registry.eviction.cached[ROOT]
    assert [shelf.is_needed(item) for item in (1, 2, 3, 4)] == [False, False, False, True]
    registry.end_job("b")
    assert list(readers(registry)) == [f"seeded {ROOT}"]


def test_the_end_of_a_job_without_plans_ends_nothing(registry: Registry) -> None:
    """The seeded stream's own job has the empty name."""
    registry.end_job("")
    registry.end_job("someone")
    assert list(readers(registry)) == [f"seeded {ROOT}"]


def test_a_stream_that_ends_is_logged_with_the_reason(
    registry: Registry, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        send(registry, [1], stream="a/0")
        send(registry, [1], stream="b/0")
        registry.end_job("a")
        clock.now_s = STREAM_IDLE_S + 1
        registry.forget_idle()
    assert caplog.messages == ["stream a/0: its process has ended", "stream b/0: silent for 901 s"]


def test_a_reader_that_is_silent_is_forgotten_and_one_that_reads_is_not(registry: Registry, clock: Clock) -> None:
    send(registry, [1, 2], stream="dead/0")
    send(registry, [1, 2], stream="alive/0")
    clock.now_s = STREAM_IDLE_S - 1
    read(registry, "alive", 1)
    registry.forget_idle()
    assert sorted(readers(registry)) == ["alive/0", "dead/0"]
    clock.now_s = STREAM_IDLE_S + 1
    registry.forget_idle()
    assert list(readers(registry)) == ["alive/0"]
    clock.now_s = 2 * STREAM_IDLE_S + 1
    registry.forget_idle()
    assert list(readers(registry)) == [f"seeded {ROOT}"]


def test_a_forgotten_reader_that_comes_back_is_welcome(registry: Registry, clock: Clock) -> None:
    send(registry, [1, 2])
    clock.now_s = STREAM_IDLE_S + 1
    registry.forget_idle()
    read(registry, "job", 1)
    send(registry, [1, 2], epoch=1)
    registry.forget_idle()
    assert readers(registry)["job/0"].stream.epoch.number == 1


def test_streams_may_come_and_go_while_somebody_looks_through_them(registry: Registry) -> None:
    for _ in registry:
        send(registry, [1])
    assert list(readers(registry)) == ["job/0"]


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What the tests before have left is not looked through for garbage meanwhile."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_whatever_becomes_of_streams_of_a_million_items_the_event_loop_goes_on() -> None:
    """20 ms are promised for each step; orders are worked out in threads. Half of the items are here."""
    registry, manifest = Registry(5, LARGE, window_items=100), listing_of_many(1_000_000)
    listed, took_s = registry.catalog.assign_numbers(manifest), list[float]()

    def on_the_loop(step: Callable[[], object]) -> None:
        began_s = time.thread_time()
        step()
        took_s.append(time.thread_time() - began_s)
        while not registry.eviction.cached[ROOT].is_sorted:
            began_s = time.thread_time()
            registry.eviction.sort_more()
            took_s.append(time.thread_time() - began_s)

    def begin_what_is_due() -> None:
        ((data_root, number),) = registry.seeded.pop_due()
        seeded = registry.seeded.prepare(data_root, number)
        on_the_loop(lambda: registry.start_seeded(seeded))

    on_the_loop(lambda: registry.set_manifest(listed))
    begin_what_is_due()
    registry.eviction.cached[ROOT].parts[::2] = 3
    for kind, epoch in (("shuffled", 0), ("shuffled", 1), ("endless", 2), ("listed", 3)):
        prepared = registry.prepare(*plan_of(manifest, range(1_000_000), kind=kind, epoch=epoch))
        on_the_loop(lambda: registry.register(prepared))  # noqa: B023  # called at once
    on_the_loop(lambda: registry.end_job("job"))
    begin_what_is_due()
    assert max(took_s) < 0.02


@pytest.mark.parametrize("kind", ["shuffled", "endless", "listed"])
def test_a_reader_and_what_is_here_for_it_take_at_most_40_bytes_an_item(kind: str) -> None:
    """All that is kept of a reader, with its next epoch, of which the end of this one knows the head."""
    items = 50_000
    manifest = listing_of([f"{i:05}" for i in range(items)])
    tracemalloc.start()
    try:
        registry = Registry(5, LARGE, window_items=100)
        registry.set_manifest(registry.catalog.assign_numbers(manifest))
        reader = send(registry, range(items), listed=manifest, kind=kind)
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


# Reads


def test_a_read_moves_the_stream_of_its_job_and_no_other(registry: Registry) -> None:
    send(registry, [3, 1], stream="a/0")
    send(registry, [3, 1], stream="b/0")
    read(registry, "a", 3)
    read(registry, "c", 3)
    assert positions(registry) == {"a/0": 1, "b/0": 0}


def test_of_several_streams_of_a_job_the_one_that_awaits_the_item_moves(registry: Registry) -> None:
    """One for each rank: every item is in one of them."""
    send(registry, [0, 2], stream="job/0")
    send(registry, [1, 3], stream="job/1")
    read(registry, "job", 1, 0, 3, 3)
    assert positions(registry) == {"job/0": 1, "job/1": 2}


def test_an_item_read_in_two_parts_counts_once(registry: Registry) -> None:
    send(registry, [3, 3])
    registry.note_reads("job", [MANIFEST.part_name(3, 1)])
    assert positions(registry) == {"job/0": 0}
    registry.note_reads("job", [MANIFEST.part_name(3, 0)])
    assert positions(registry) == {"job/0": 1}


@pytest.mark.parametrize("name", ["train/images/999.jpg", "train/README.md", "elsewhere/images/001.jpg"])
def test_reads_of_what_is_in_no_listing_move_nothing(registry: Registry, name: str) -> None:
    send(registry, [1])
    registry.note_reads("job", [ObjectName("pictures", name), ObjectName("drawings", name)])
    assert positions(registry) == {"job/0": 0}


def test_how_fast_a_stream_reads_is_measured_by_its_reports(registry: Registry, clock: Clock) -> None:
    reader = send(registry, range(10))
    for item in range(10):
        read(registry, "job", item)
        clock.now_s += 0.5
    clock.now_s -= 0.5
    assert reader.stream.rate.per_s(clock.now_s) == pytest.approx(2, rel=0.05)


# The window


def test_a_window_that_is_set_is_as_long_as_it_is_set(registry: Registry) -> None:
    assert registry.window_items(send(registry, [1, 2])) == 4


def test_a_window_that_is_measured_is_as_long_as_downloads_take_at_the_readers_pace(clock: Clock) -> None:
    took = MovingDuration(0.05)
    for _ in range(2000):
        took.add(0.05)
    registry = Registry(5, LARGE, download_s=took, clock=clock)
    manifest = listing(5000)
    put_in_force(registry, manifest)
    reader = send(registry, range(5000), listed=manifest)
    for start in range(0, 4000, 10):
        clock.now_s += 0.01
        read(registry, "job", *range(start, start + 10), manifest=manifest)
    assert registry.window_items(reader) == pytest.approx(1000 * (0.05 + 0.01) + MAX_SPARE_ITEMS, rel=0.1)
    read(registry, "job", 4900, manifest=manifest)  # a worker that is far ahead
    assert registry.window_items(reader) > 900


def test_a_report_that_got_lost_does_not_make_the_window_longer_and_longer(clock: Clock) -> None:
    registry, manifest = Registry(5, LARGE, clock=clock), listing(5000)
    put_in_force(registry, manifest)
    reader = send(registry, range(5000), listed=manifest)
    for start in range(1, 4000, 10):  # all but the first item
        clock.now_s += 0.01
        read(registry, "job", *range(start, start + 10), manifest=manifest)
        if start == 1001:
            early = registry.window_items(reader)
    assert (reader.stream.first_unread, reader.stream.front) == (0, 4001)
    assert registry.window_items(reader) == pytest.approx(early, rel=0.2)


def test_a_small_cache_spares_fewer_items(clock: Clock) -> None:
    manifest = listing(5000)
    item_bytes = int(manifest.size.sum()) / len(manifest)
    windows = []
    for items in (10, 200, 800, 5000):
        registry = Registry(5, int(items * item_bytes), download_s=MovingDuration(0.0), clock=clock)
        put_in_force(registry, manifest)
        windows.append(registry.window_items(send(registry, range(5000), listed=manifest)))
    assert [window - windows[0] for window in windows] == [0, 1, 7, 15]


@pytest.mark.parametrize(
    ("took_s", "shortest", "longest"), [(0.0, MAX_SPARE_ITEMS, 100), (1e9, MAX_WINDOW_ITEMS, MAX_WINDOW_ITEMS)]
)
def test_a_window_is_never_shorter_or_longer_than_reason(clock: Clock, took_s: float, shortest: int, longest: int) -> None:
    registry = Registry(5, LARGE, download_s=MovingDuration(took_s), clock=clock)
    put_in_force(registry, MANIFEST)
    assert shortest <= registry.window_items(send(registry, range(10))) <= longest


# What is here


def test_an_item_is_here_when_all_of_its_parts_are(registry: Registry) -> None:
    reader = send(registry, [3, 1])
    registry.files.add(path(3, 0))
    assert not reader.is_item_ready(3)
    registry.files.add(path(3, 1))
    assert reader.is_item_ready(3)
    assert registry.files.remove(path(3, 0)) == (ROOT, 3, 0)
    assert not reader.is_item_ready(3)


def test_what_is_not_here_when_an_epoch_begins_is_its_bound(registry: Registry) -> None:
    bring(registry, 0, 1, 2)
    assert send(registry, [0, 1, 5, 6, 7]).missing_at_epoch_start == 3
    assert send(registry, [5, 0, 6], position=1, epoch=1).missing_at_epoch_start == 1


def test_what_is_not_needed_soon_goes_first_the_least_recently_used_before_the_others(registry: Registry, clock: Clock) -> None:
    send(registry, [0, 1, 2, 3])
    for item in (5, 6, 0, 1, 2, 7):
        clock.now_s += 1
        bring(registry, item)
    clock.now_s += 1
    registry.files.note_open(path(5))
    clock.now_s += 1
    registry.files.add("pictures/train/classes.txt")
    chosen = registry.files.choose_victims(11, None, lambda path: 1)
    ordered = [path(6), path(7), path(5), "pictures/train/classes.txt", path(2), path(1)]
    assert chosen is not None
    assert [one for one in chosen if "/labels/" not in one] == ordered
    assert [path(item, 1) for item in (6, 7, 5, 2, 1)] == [one for one in chosen if "/labels/" in one]


def test_nothing_is_dropped_for_what_is_needed_later(registry: Registry, clock: Clock) -> None:
    send(registry, [0, 1, 2, 3])
    bring(registry, 0, 1, 2)
    assert registry.files.choose_victims(1, ItemRef(ROOT, 3), lambda path: 1) is None
    assert registry.files.choose_victims(1, ItemRef(ROOT, 1), lambda path: 1) == [path(2, 0), path(2, 1)]


def test_a_reader_that_pauses_loses_nothing_of_what_it_needs_next(registry: Registry, clock: Clock) -> None:
    """Else what waits for a slot meanwhile would count as overdue, and push out what is read before it."""
    send(registry, range(10))
    for item in range(4):
        clock.now_s += 0.01
        read(registry, "job", item)
    bring(registry, 4, 5, 6, 8)
    for pause_s in (0.0, 0.01, 1.0, 1000.0):
        clock.now_s += pause_s
        assert registry.files.choose_victims(1, ItemRef(ROOT, 9), lambda path: 1) is None
    assert registry.files.choose_victims(1, ItemRef(ROOT, 7), lambda path: 1) == [path(8, 0), path(8, 1)]


def test_what_was_here_before_its_data_root_was_listed_is_found_in_its_order_of_use(clock: Clock) -> None:
    registry = Registry(5, LARGE, clock=clock)
    paths = [path(item, part) for item in (4, 2, 7) for part in (0, 1)] + ["pictures/train/classes.txt"]
    registry.set_manifest(registry.catalog.assign_numbers(MANIFEST))
    for one, place in registry.files.locate_all(paths):
        registry.files.adopt(one, place)
    registry.finish_adoption()
    reader = send(registry, [2, 4])
    assert [reader.is_item_ready(item) for item in (4, 2, 7, 1)] == [True, True, True, False]
    assert reader.missing_at_epoch_start == 0
    victims = registry.files.choose_victims(7, None, lambda path: 1)
    assert victims is not None
    assert sorted(victims[:3]) == sorted(["pictures/train/classes.txt", path(7, 0), path(7, 1)])
    assert victims[3:] == [path(4, 0), path(4, 1), path(2, 0), path(2, 1)]


def test_an_object_of_no_item_that_becomes_one_is_found_as_that(registry: Registry) -> None:
    larger = listing(11)
    new = path(10, 0, larger)
    registry.files.add(new)
    assert list(registry.eviction.itemless) == [new]
    put_in_force(registry, larger)
    for one, place in registry.files.locate_all(list(registry.eviction.itemless)):
        registry.files.adopt(one, place)
    registry.finish_adoption()
    assert list(registry.eviction.itemless) == []
    assert registry.eviction.cached[ROOT].parts_of(10) == 1


def test_an_object_of_no_item_that_is_used_goes_later_and_one_that_is_gone_never(registry: Registry) -> None:
    for name in "abc":
        registry.files.add(f"pictures/train/{name}.txt")
    registry.files.note_open("pictures/train/a.txt")
    registry.note_reads("someone", [ObjectName("pictures", "train/b.txt")])
    registry.files.remove("pictures/train/c.txt")
    assert registry.files.choose_victims(2, None, lambda path: 1) == ["pictures/train/a.txt", "pictures/train/b.txt"]


# Why a reader waits


def why(registry: Registry, item: int, *, blocked: bool = False, other_generation: bool = False) -> str:
    part, cached = registry.lookup.locate(path(item)), registry.eviction.cached
    return wait_reason(part, cached, is_blocked=blocked, is_other_generation=other_generation)


def test_a_reader_waits_for_what_nobody_planned(registry: Registry) -> None:
    send(registry, [1, 2])
    assert why(registry, 5) == "not_planned"
    assert why(registry, 1) != "not_planned"
    read(registry, "job", 1)
    assert why(registry, 1) == "not_planned"


def test_a_reader_waits_for_what_is_late_or_throttled_or_changed(registry: Registry) -> None:
    send(registry, [1, 2])
    assert why(registry, 1) == "late"
    assert why(registry, 1, blocked=True) == "throttled"
    assert why(registry, 1, blocked=True, other_generation=True) == "changed"


def test_a_reader_waits_for_what_was_dropped_although_it_was_needed(registry: Registry) -> None:
    send(registry, [1, 2])
    bring(registry, 1)
    for part in (0, 1):
        registry.files.remove(path(1, part))
    assert why(registry, 1, blocked=True) == "evicted"
    bring(registry, 1)
    registry.files.remove(path(1, 0))
    assert why(registry, 1) == "late"


def test_what_was_dropped_when_nobody_needed_it_was_not_evicted(registry: Registry) -> None:
    send(registry, [1, 2])
    bring(registry, 5)
    for part in (0, 1):
        registry.files.remove(path(5, part))
    send(registry, [5], epoch=1)
    assert why(registry, 5) == "late"


def test_every_reason_is_one_of_those_that_the_statistics_name(registry: Registry) -> None:
    send(registry, [1, 2])
    reasons = {
        why(registry, item, blocked=b, other_generation=o) for item in (1, 5) for b in (False, True) for o in (False, True)
    }
    assert reasons <= set(WAIT_REASONS)


def waiting_reader(registry: Registry, path: str) -> Reader | None:
    part = registry.lookup.locate(path)
    return None if part is None else registry.waiting_reader(part)


def test_the_reader_who_waits_is_the_one_that_is_to_read_the_object_next(registry: Registry) -> None:
    one = send(registry, [1, 2, 3], stream="a/0")
    other = send(registry, [3, 4], stream="b/0")
    assert waiting_reader(registry, path(3)) is other
    assert waiting_reader(registry, path(2)) is one
    assert waiting_reader(registry, path(7)) is None
    assert waiting_reader(registry, "pictures/train/classes.txt") is None
