"""The window ahead of every stream: what is fetched, in which order, and what happens when something goes wrong."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest

from gcs_prefetchd.cache import Cache
from gcs_prefetchd.errors import ProtocolError
from gcs_prefetchd.fetcher import Fetcher
from gcs_prefetchd.listing import list_manifest
from gcs_prefetchd.manifest import Layout, Manifest
from gcs_prefetchd.names import DataRoot, ObjectName
from gcs_prefetchd.order import Indices, epoch_order, order_digest
from gcs_prefetchd.origin import Access, Origin
from gcs_prefetchd.prefetch import Prefetcher
from gcs_prefetchd.protocol import Plan
from gcs_prefetchd.registry import Registry
from gcs_prefetchd.streams import path_of
from gcs_prefetchd.testing import GCSServer, Stall
from support import BUCKET, DATA_ROOT, put_items

SEED = 7


@dataclass(frozen=True, slots=True)
class Node:
    """The parts of a daemon that prefetch, at work."""

    manifest: Manifest
    registry: Registry
    cache: Cache
    fetcher: Fetcher
    prefetcher: Prefetcher

    async def read(self, item: int, job: str = "") -> None:
        """A reader reports that it has read the item; returns when the prefetcher has followed."""
        self.registry.mark_read(job, self.manifest.part_name(item, 0))
        self.prefetcher.wake()
        await self.prefetcher.settled()

    async def plan(self, plan: Plan, order: Indices) -> None:
        """A reader says what it will read; returns when the prefetcher has followed."""
        self.registry.add_plan(plan, order)
        self.prefetcher.wake()
        await self.prefetcher.settled()

    def items_on_disk(self) -> list[int]:
        """The items whose every part is in the cache."""
        stamps = {item: [self.cache.stamp(path_of(version)) for version in self.manifest.versions(item)] for item in self.all}
        return [item for item, parts in stamps.items() if None not in parts]

    @property
    def all(self) -> range:
        return range(len(self.manifest))

    def seeded(self, epoch: int = 0) -> list[int]:
        """The order in which the data root is prefetched before any reader has come."""
        return [int(i) for i in epoch_order(SEED, epoch, np.arange(len(self.manifest), dtype=np.uint32))]

    def keys(self, items: Sequence[int]) -> list[str]:
        """What the server counts the items' objects under."""
        return [f"{BUCKET}/{version.name.name}" for item in items for version in self.manifest.versions(item)]


@asynccontextmanager
async def prefetching(
    gcs: GCSServer, cache: Cache, *, window: int = 100, concurrency: int = 8, deadline_s: float = 20.0
) -> AsyncIterator[Node]:
    """A node that has listed the data root. It prefetches from its first `wake` on."""
    async with Origin(Access(gcs.url, anonymous=True), deadline_s=deadline_s) as origin:
        registry, fetcher = Registry(SEED), Fetcher(cache, origin, concurrency)
        prefetcher = Prefetcher(registry, cache, fetcher, window, try_again_s=0.05)
        manifest = await list_manifest(origin, DataRoot.parse(DATA_ROOT), Layout())
        registry.set_manifest(manifest)
        running = asyncio.create_task(prefetcher.run())
        try:
            yield Node(manifest, registry, cache, fetcher, prefetcher)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await fetcher.close()


async def follow(node: Node) -> None:
    node.prefetcher.wake()
    await node.prefetcher.settled()


def make_plan(node: Node, order: Sequence[int], **changes: object) -> tuple[Plan, Indices]:
    """A valid plan but for the changes."""
    indices = np.array(order, dtype=np.uint32)
    plan = Plan("job", "job/train", DATA_ROOT, node.manifest.digest, 0, 0, order_digest(indices))
    return replace(plan, **changes), indices  # type: ignore[arg-type]


def media_in_order(gcs: GCSServer) -> list[str]:
    return [seen.key for seen in gcs.seen if seen.kind == "media"]


# Before any reader


async def test_the_seeded_order_is_fetched_before_any_reader_has_come(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, concurrency=1) as node:
        await follow(node)
        assert media_in_order(gcs) == node.keys(node.seeded())


async def test_image_and_label_come_together(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=3) as node:
        await follow(node)
        assert sorted(media_in_order(gcs)) == sorted(node.keys(node.seeded()[:3]))
        assert len(cache) == 6


async def test_every_slot_is_used_and_no_more(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    gcs.faults.add(Stall(0))
    async with prefetching(gcs, cache, concurrency=6) as node:
        node.prefetcher.wake()
        for done in range(0, 36, 6):
            await gcs.wait_for(lambda counts, n=done: counts.total("media") == n + 6)  # type: ignore[misc]
            gcs.release()
        gcs.faults.clear()
        gcs.release()
        await node.prefetcher.settled()
    assert gcs.counts.peak_open_media == 6


# The window


async def test_never_more_than_the_window_is_fetched_ahead_of_the_reader(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=4) as node:
        await follow(node)
        order = node.seeded()
        for position, item in enumerate(order[:-1]):
            assert set(gcs.counts.media) == set(node.keys(order[: position + 4]))
            await node.read(item)
        assert set(gcs.counts.media.values()) == {1}


async def test_when_an_epoch_has_been_read_the_next_one_is_fetched(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 6)
    async with prefetching(gcs, cache, window=2) as node:
        await follow(node)
        for item in node.seeded():
            await node.read(item)
        (stream,) = node.registry
        assert (stream.epoch, stream.position) == (1, 0)
        assert stream.window() == node.seeded(epoch=1)[:2]


async def test_what_comes_into_the_window_counts_as_used(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 6)
    async with prefetching(gcs, cache) as node:
        await follow(node)
        oldest = node.seeded()[0]
        await node.plan(*make_plan(node, [oldest]))
        assert [name.name for name in cache.names()][-2:] == [version.name.name for version in node.manifest.versions(oldest)]


async def test_the_runway_ends_at_the_first_gap(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 10)
    async with prefetching(gcs, cache, window=8) as node:
        (stream,) = node.registry
        assert node.prefetcher.runway_items(stream) == 0
        gone = node.manifest.version(node.seeded()[5], 1)
        gcs.delete(BUCKET, gone.name.name)
        await follow(node)
        assert node.prefetcher.runway_items(stream) == 5
        await node.read(node.seeded()[0])
        assert node.prefetcher.runway_items(stream) == 4


# Little room


async def test_a_cache_smaller_than_the_window_fills_up_and_waits(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=20) as node:
        await follow(node)
        assert sorted(node.items_on_disk()) == sorted(node.seeded()[:10])
        for _ in range(20):  # reports of readers that read something else
            await follow(node)
        assert gcs.counts.media == dict.fromkeys(node.keys(node.seeded()[:10]), 1)
        assert cache.evictions == 0


async def test_a_cache_smaller_than_the_window_goes_on_as_the_reader_advances(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=20) as node:
        await follow(node)
        order = node.seeded()
        for position, item in enumerate(order[:-1]):
            assert item in node.items_on_disk()
            await node.read(item)
            following = order[position + 1 : position + 11]
            assert set(following) <= set(node.items_on_disk())
        assert gcs.counts.media == dict.fromkeys(node.keys(order), 1)


async def test_room_that_a_failed_download_gives_back_is_used_without_waiting_for_a_reader(
    gcs: GCSServer, cache: Cache
) -> None:
    put_items(gcs, 2, size_bytes=450_000)
    async with prefetching(gcs, cache) as node:
        first, second = node.seeded()
        for version in node.manifest.versions(first):
            gcs.delete(BUCKET, version.name.name)
        await follow(node)
        assert node.items_on_disk() == [second]


async def test_an_object_that_a_demand_pushed_out_is_not_fetched_over_and_over(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 10, size_bytes=50_000)
    async with prefetching(gcs, cache) as node:
        await follow(node)
        assert len(node.items_on_disk()) == 10
        gcs.put(BUCKET, "train/other.bin", bytes(100_000))
        await node.fetcher.demand(ObjectName(BUCKET, "train/other.bin"), None, node.registry)
        for _ in range(5):
            await follow(node)
        assert sorted(gcs.counts.media[key] for key in node.keys(node.all)) == [1] * 18 + [2] * 2
        assert len(cache) == 20


# Plans


async def test_a_readers_plan_takes_the_place_of_the_seeded_order(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=5, concurrency=1) as node:
        await follow(node)
        fetched = node.seeded()[:5]
        order = [item for item in node.all if item not in fetched]
        gcs.reset()
        await node.plan(*make_plan(node, order))
        assert [stream.id for stream in node.registry] == ["job/train"]
        assert media_in_order(gcs) == node.keys(order[:5])
        await node.read(order[0], "job")
        assert media_in_order(gcs) == node.keys(order[:6])


async def test_a_plan_goes_on_from_its_position(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=5) as node:
        await node.plan(*make_plan(node, node.all, position=12))
        assert node.items_on_disk() == [12, 13, 14, 15, 16]


async def test_an_item_that_a_plan_names_twice_is_fetched_once_and_kept_for_its_second_read(
    gcs: GCSServer, cache: Cache
) -> None:
    put_items(gcs, 5)
    async with prefetching(gcs, cache) as node:
        await node.plan(*make_plan(node, [3, 1, 3, 2]))
        await node.read(3, "job")
        assert all(path_of(version) in node.registry for version in node.manifest.versions(3))
        assert gcs.counts.media == dict.fromkeys(node.keys([1, 2, 3]), 1)


async def test_two_streams_on_the_same_data_share_their_downloads(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=10) as node:
        node.registry.add_plan(*make_plan(node, node.all))
        node.registry.add_plan(*make_plan(node, node.all, job="other", stream="other/train"))
        node.registry.add_plan(*make_plan(node, node.all[5:], job="third", stream="third/train"))
        await follow(node)
        assert gcs.counts.media == dict.fromkeys(node.keys(range(15)), 1)


@pytest.mark.parametrize(
    ("field", "changes", "order"),
    [
        ("indices", {}, [0, 10]),
        ("manifest", {"manifest": "0" * 32}, [0, 1]),
        ("manifest", {"data_root": "gs://pictures/elsewhere"}, [0, 1]),
        ("digest", {"digest": "0" * 16}, [0, 1]),
        ("position", {"position": 3}, [0, 1]),
    ],
)
async def test_a_plan_that_cannot_be_is_refused_with_the_name_of_its_field(
    gcs: GCSServer, cache: Cache, field: str, changes: dict[str, object], order: list[int]
) -> None:
    put_items(gcs, 10)
    async with prefetching(gcs, cache) as node:
        before = [stream.id for stream in node.registry]
        with pytest.raises(ProtocolError, match=f"Plan: field '{field}'"):
            node.registry.add_plan(*make_plan(node, order, **changes))
        assert [stream.id for stream in node.registry] == before


# What goes wrong


async def test_an_object_that_is_lost_within_the_window_is_fetched_again(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 10)
    async with prefetching(gcs, cache, window=5) as node:
        await follow(node)
        near, far = (path_of(node.manifest.version(item, 0)) for item in (node.seeded()[2], node.seeded()[9]))
        (cache.directory.objects / near).unlink()
        cache.forget(near)
        cache.forget(far)
        await node.prefetcher.settled()
        assert gcs.counts.media == dict.fromkeys(node.keys(node.seeded()[:5]), 1) | {near: 2}


async def test_a_part_that_is_lost_while_the_other_one_is_under_way_is_fetched_again(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 1)
    gcs.faults.add(Stall(0), "*.png")
    async with prefetching(gcs, cache) as node:
        image, label = node.keys([0])
        node.prefetcher.wake()
        await gcs.wait_for(lambda counts: counts.media[label] == 1)
        await node.fetcher.prefetch(node.manifest.version(0, 0), node.registry)
        await cache.drop(image)
        gcs.release()
        await node.prefetcher.settled()
        assert node.items_on_disk() == [0]
        assert gcs.counts.media == {image: 2, label: 1}


async def test_a_missing_object_does_not_stop_the_rest_and_is_logged_once(
    gcs: GCSServer, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    put_items(gcs, 10)
    async with prefetching(gcs, cache) as node:
        gone = node.manifest.version(node.seeded()[0], 0)
        gcs.delete(BUCKET, gone.name.name)
        with caplog.at_level(logging.WARNING):
            await follow(node)
            for item in node.seeded():
                await node.read(item)
        assert sorted(node.items_on_disk()) == sorted(node.seeded()[1:])
        assert gcs.counts.media[f"{BUCKET}/{gone.name.name}"] >= 2  # it was planned in the next epoch again
        assert [record.getMessage().count(gone.name.uri) for record in caplog.records] == [1]


async def test_after_an_outage_everything_is_planned_again_and_the_outage_is_logged_once(
    gcs: GCSServer, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    put_items(gcs, 10)
    gcs.faults.add(Stall(None))
    async with prefetching(gcs, cache, deadline_s=0.3, concurrency=20) as node:
        node.prefetcher.wake()
        await gcs.wait_for(lambda counts: len(counts.media) == 20 and min(counts.media.values()) == 2)
        assert "planned again in 0.05 s" in caplog.text
        assert len(caplog.records) == 1
        gcs.faults.clear()
        gcs.release()
        await node.prefetcher.settled()
        assert node.items_on_disk() == list(node.all)


async def test_an_outage_does_not_look_settled(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 1)
    gcs.faults.add(Stall(None))
    async with prefetching(gcs, cache, deadline_s=0.1) as node:
        node.prefetcher.wake()
        settled = asyncio.create_task(node.prefetcher.settled())
        await gcs.wait_for(lambda counts: min(counts.media.values(), default=0) == 2)
        assert not settled.done()
        gcs.faults.clear()
        gcs.release()
        await settled
        assert node.items_on_disk() == [0]


async def test_leaving_ends_every_prefetch(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 10)
    gcs.faults.add(Stall(None))
    before = asyncio.all_tasks()
    async with prefetching(gcs, cache, deadline_s=0.2, concurrency=4) as node:
        node.prefetcher.wake()
        await gcs.wait_for(lambda counts: len(counts.media) > 4)
    left = {task.get_name() for task in asyncio.all_tasks() - before}
    assert not [name for name in left if name.startswith(("prefetch", "fetch"))]
    assert list(cache.directory.tmp.iterdir()) == []
