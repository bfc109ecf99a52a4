"""All streams of the node."""

from collections.abc import Sequence

import numpy as np
import pytest

from gcs_prefetchd.errors import ProtocolError
from gcs_prefetchd.manifest import Layout, Manifest, ObjectVersion, build_manifest
from gcs_prefetchd.names import DataRoot, ObjectName
from gcs_prefetchd.order import Indices, epoch_order, order_digest
from gcs_prefetchd.protocol import Plan
from gcs_prefetchd.registry import MANIFESTS_KEPT, STREAM_IDLE_S, Registry
from gcs_prefetchd.streams import Stream

ROOT = "gs://pictures/train"


def listing(items: int, root: str = ROOT, generation: int = 1) -> Manifest:
    data_root = DataRoot.parse(root)
    names = [data_root.folder + Layout().part_name(f"{i:03}", part) for i in range(items) for part in (0, 1)]
    return build_manifest(
        data_root, Layout(), [ObjectVersion(ObjectName(data_root.bucket, name), generation, 1, 1) for name in names]
    )


MANIFEST = listing(10)


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
    made = Registry(5, clock)
    made.set_manifest(MANIFEST)
    return made


def order_of(items: Sequence[int]) -> Indices:
    return np.array(items, dtype=np.uint32)


def send(
    registry: Registry, items: Sequence[int], stream: str = "job/0", listed: Manifest = MANIFEST, **changes: object
) -> None:
    order = order_of(items)
    values: dict[str, object] = {
        "job": stream.partition("/")[0],
        "stream": stream,
        "data_root": listed.data_root.uri,
        "manifest": listed.digest,
        "epoch": 0,
        "position": 0,
        "digest": order_digest(order),
    }
    registry.add_plan(Plan(**(values | changes)), order)  # type: ignore[arg-type]  # as any reader may send it


def streams(registry: Registry) -> dict[str, Stream]:
    return {stream.id: stream for stream in registry}


def read(registry: Registry, job: str, item: int, manifest: Manifest = MANIFEST) -> None:
    for part in (0, 1):
        registry.mark_read(job, manifest.part_name(item, part))


def test_before_a_listing_there_is_nothing() -> None:
    empty = Registry(0)
    assert list(empty) == []
    assert empty.manifest(ROOT) is None
    empty.mark_read("job", MANIFEST.part_name(0, 0))
    empty.forget_idle()


def test_a_listed_data_root_has_the_seeded_order_as_its_stream(registry: Registry) -> None:
    (seeded,) = registry
    assert seeded.order.tolist() == epoch_order(5, 0, order_of(range(10))).tolist()
    assert (seeded.epoch, seeded.position, seeded.job) == (0, 0, "")
    assert registry.manifest(ROOT) is MANIFEST


def test_the_same_listing_again_changes_nothing(registry: Registry) -> None:
    (before,) = registry
    assert not registry.set_manifest(listing(10))
    assert list(registry) == [before]


def test_a_new_listing_starts_the_seeded_stream_anew_in_its_epoch(registry: Registry) -> None:
    for item in range(10):
        read(registry, "someone", item)
    assert registry.set_manifest(listing(12))
    (seeded,) = registry
    assert (seeded.epoch, seeded.length) == (1, 12)


def test_a_readers_plan_takes_the_seeded_streams_place(registry: Registry) -> None:
    send(registry, [3, 1, 2])
    assert list(streams(registry)) == ["job/0"]
    assert streams(registry)["job/0"].order.tolist() == [3, 1, 2]
    registry.set_manifest(listing(11))
    assert list(streams(registry)) == ["job/0"]


def test_a_plan_takes_the_place_of_its_own_data_roots_stream_alone(registry: Registry) -> None:
    other = listing(5, "gs://drawings")
    registry.set_manifest(other)
    send(registry, [0])
    assert sorted(streams(registry)) == ["job/0", "seeded gs://drawings"]


def test_the_next_epochs_plan_takes_the_place_of_the_last(registry: Registry) -> None:
    send(registry, [1, 2])
    send(registry, [2, 1], epoch=1)
    assert [(stream.id, stream.epoch) for stream in registry] == [("job/0", 1)]


def test_what_any_streams_window_holds_is_in_the_registry(registry: Registry) -> None:
    send(registry, [3, 1], "a/0")
    send(registry, [7], "b/0")
    for stream in registry:
        stream.advance()
    held = "pictures/train/images/003.jpg"
    assert held in registry
    assert "pictures/train/labels/007.png" in registry
    assert "pictures/train/images/001.jpg" not in registry
    read(registry, "a", 3)
    assert held not in registry


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"manifest": "of another listing"}, "manifest"),
        ({"data_root": "gs://pictures/valid"}, "manifest"),
        ({"position": 4}, "position"),
        ({"digest": "0" * 16}, "digest"),
        ({"digest": ""}, "digest"),
    ],
)
def test_a_plan_that_cannot_be_names_its_field_and_changes_nothing(
    registry: Registry, changes: dict[str, object], field: str
) -> None:
    before = streams(registry)
    with pytest.raises(ProtocolError, match=f"^Plan: field '{field}'"):
        send(registry, [3, 1, 2], **changes)  # type: ignore[arg-type]  # none of them is a parameter
    assert streams(registry) == before


def test_a_plan_with_an_item_that_the_listing_lacks_is_refused(registry: Registry) -> None:
    with pytest.raises(ProtocolError, match=r"^Plan: .*10 is beyond .* 10 items"):
        send(registry, [3, 10])


@pytest.mark.parametrize(("items", "position"), [([], 0), ([1, 2], 2), ([9, 0], 1), ([1, 1, 1], 0)])
def test_a_plan_may_be_empty_or_read_already_or_repeat_itself(registry: Registry, items: list[int], position: int) -> None:
    send(registry, items, position=position)
    assert streams(registry)["job/0"].position == position


def test_plans_may_refer_to_the_last_few_listings(registry: Registry) -> None:
    """A job that started before the data root was listed again goes on as it was."""
    listings = [MANIFEST] + [listing(10, generation=generation) for generation in range(2, MANIFESTS_KEPT + 2)]
    for manifest in listings[1:]:
        registry.set_manifest(manifest)
    send(registry, [1], listed=listings[1])
    assert streams(registry)["job/0"].manifest.version(1, 0).generation == 2
    with pytest.raises(ProtocolError, match="ask for it again"):
        send(registry, [1], listed=listings[0])


def test_a_read_moves_the_stream_of_its_job_and_no_other(registry: Registry) -> None:
    send(registry, [3, 1], "a/0")
    send(registry, [3, 1], "b/0")
    read(registry, "a", 3)
    assert {name: stream.position for name, stream in streams(registry).items()} == {"a/0": 1, "b/0": 0}


def test_of_several_streams_of_a_job_the_one_that_awaits_the_item_moves(registry: Registry) -> None:
    """One for each rank: every item is in one of them."""
    send(registry, [0, 2], "job/0")
    send(registry, [1, 3], "job/1")
    for item in (1, 0, 3, 3):
        read(registry, "job", item)
    assert {name: stream.position for name, stream in streams(registry).items()} == {"job/0": 1, "job/1": 2}


def test_an_item_read_in_two_parts_counts_once(registry: Registry) -> None:
    send(registry, [3, 3])
    registry.mark_read("job", MANIFEST.part_name(3, 1))
    assert streams(registry)["job/0"].position == 0
    registry.mark_read("job", MANIFEST.part_name(3, 0))
    assert streams(registry)["job/0"].position == 1


@pytest.mark.parametrize("name", ["train/images/999.jpg", "train/README.md", "elsewhere/images/001.jpg"])
def test_reads_of_what_is_in_no_listing_move_nothing(registry: Registry, name: str) -> None:
    send(registry, [1])
    registry.mark_read("job", ObjectName("pictures", name))
    registry.mark_read("job", ObjectName("drawings", name))
    assert streams(registry)["job/0"].position == 0


def test_a_job_without_a_plan_moves_the_seeded_stream_from_epoch_to_epoch(registry: Registry) -> None:
    (first,) = registry
    for item in first.order.tolist():
        read(registry, "someone", item)
    (second,) = registry
    assert (second.epoch, second.position) == (1, 0)
    assert second.order.tolist() == epoch_order(5, 1, order_of(range(10))).tolist()


def test_a_reader_that_died_is_forgotten_and_one_that_reads_is_not(registry: Registry, clock: Clock) -> None:
    send(registry, [1, 2], "dead/0")
    send(registry, [1, 2], "alive/0")
    clock.now_s = STREAM_IDLE_S - 1
    read(registry, "alive", 1)
    registry.forget_idle()
    assert sorted(streams(registry)) == ["alive/0", "dead/0"]
    clock.now_s = STREAM_IDLE_S + 1
    registry.forget_idle()
    assert list(streams(registry)) == ["alive/0"]
    clock.now_s = 2 * STREAM_IDLE_S + 1
    registry.forget_idle()
    assert streams(registry) == {}


def test_a_forgotten_reader_that_comes_back_is_welcome(registry: Registry, clock: Clock) -> None:
    send(registry, [1, 2])
    clock.now_s = STREAM_IDLE_S + 1
    registry.forget_idle()
    read(registry, "job", 1)
    send(registry, [1, 2], epoch=1)
    registry.forget_idle()
    assert streams(registry)["job/0"].epoch == 1


def test_the_seeded_stream_waits_for_its_next_reader_however_long(registry: Registry, clock: Clock) -> None:
    """A job without a plan that pauses, to validate or to save, finds its prefetching as it left it."""
    (seeded,) = registry
    read(registry, "someone", int(seeded.order[0]))
    clock.now_s = 100 * STREAM_IDLE_S
    registry.forget_idle()
    assert list(registry) == [seeded]
    assert seeded.position == 1


def test_streams_may_come_and_go_while_somebody_looks_through_them(registry: Registry) -> None:
    for _ in registry:
        send(registry, [1])
    assert list(streams(registry)) == ["job/0"]
