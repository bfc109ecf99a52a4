"""What is prefetched ahead of every stream, in which order, and what happens if something fails."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.fetch.prefetch_observer import PrefetchObserver
from gcs_prefetchd.fetch.prefetcher import Prefetcher
from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.service.manifest_store import list_manifest
from gcs_prefetchd.shared.epoch_order import epoch_order
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path
from gcs_prefetchd.testing import GCSServer, Stall, Status
from support.caches import observer_of, slots_of
from support.daemons import BUCKET, DATA_ROOT, put_items
from support.plans import indices_of, plan_of

SEED = 7


def path_of(version: ObjectVersion) -> str:
    return cache_path(version.name.bucket, version.name.name)


@dataclass(frozen=True, slots=True)
class Node:
    """The running parts of a daemon that prefetch."""

    manifest: Manifest
    registry: Registry
    cache: Cache
    fetcher: Fetcher
    prefetcher: Prefetcher

    async def read(self, *items: int, job: str = "job") -> None:
        """Report that a reader has read the items; returns when the prefetcher is settled again."""
        for item in items:
            for version in self.manifest.versions(item):
                self.cache.touch(path_of(version))
        self.registry.record_reads(job, [version.name for item in items for version in self.manifest.versions(item)])
        await self.follow()

    async def demand_and_read(self, item: int, job: str = "job") -> None:
        """Read an item as a reader does, with demands for what is not cached."""
        for version in self.manifest.versions(item):
            if not self.fetcher.is_cached(version):
                await self.prefetcher.demand(version.name)
        await self.read(item, job=job)

    async def plan(self, items: Sequence[int], *, listed: Manifest | None = None, **changes: object) -> Reader:
        """Register a reader's plan; returns when the prefetcher is settled again."""
        plan, indices = plan_of(listed or self.manifest, items, **changes)  # type: ignore[arg-type]  # any field
        reader = self.registry.register(self.registry.prepare(plan, indices))
        self.prefetcher.start_epoch()
        await self.follow()
        return reader

    async def follow(self) -> None:
        """Wake the prefetcher; returns when it is settled."""
        self.prefetcher.wake()
        await self.prefetcher.settled()

    def items_on_disk(self) -> list[int]:
        """The items of which every part is cached."""
        return [item for item in self.all if all(self.cache.stamp(path_of(one)) for one in self.manifest.versions(item))]

    @property
    def all(self) -> range:
        return range(len(self.manifest))

    def seeded(self, epoch: int = 0) -> list[int]:
        """The order in which the data root is prefetched before any reader has registered."""
        return [int(i) for i in epoch_order(SEED, epoch, indices_of(self.all))]

    def keys(self, items: Sequence[int]) -> list[str]:
        """The keys under which the server counts the items' objects."""
        return [f"{BUCKET}/{version.name.name}" for item in items for version in self.manifest.versions(item)]


@asynccontextmanager
async def prefetching(
    gcs: GCSServer,
    cache: Cache,
    *,
    window: int | None = 100,
    concurrency: int = 8,
    deadline_s: float = 20.0,
    lru: bool = False,
    retry_after_s: float = 0.05,
) -> AsyncIterator[Node]:
    """A node with a listing of the data root. It prefetches after the first `wake`."""
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=deadline_s) as client:
        registry = Registry(SEED, cache.capacity.limit_bytes, window_items=window, lru=lru)
        observer_of(cache).target = observer = PrefetchObserver(registry)
        fetcher = Fetcher(cache, client, slots_of(concurrency, observer.slot_freed))
        prefetcher = Prefetcher(registry, cache, fetcher, observer, retry_after_s=retry_after_s)
        manifest = await list_manifest(client, DataRoot.parse(DATA_ROOT), ItemPatterns())
        registry.set_manifest(registry.catalog.assign_numbers(manifest))
        running = asyncio.create_task(prefetcher.run())
        try:
            yield Node(manifest, registry, cache, fetcher, prefetcher)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await fetcher.close()


def lost_paths(cache: Cache) -> list[str]:
    """The paths that are lost from now on."""
    losses = observer_of(cache).losses
    losses.clear()
    return losses


def media_in_order(gcs: GCSServer) -> list[str]:
    return [seen.key for seen in gcs.seen if seen.kind == "media"]


# Before any reader has registered


async def test_the_seeded_order_is_fetched_before_any_reader_has_registered(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, concurrency=1) as node:
        await node.follow()
        assert media_in_order(gcs) == node.keys(node.seeded())


async def test_an_image_and_its_label_are_prefetched_together(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=3) as node:
        await node.plan(node.all)
        assert gcs.counts.media == dict.fromkeys(node.keys([0, 1, 2]), 1)


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


async def test_the_seeded_order_fills_the_free_space_beyond_its_window(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=2, concurrency=1) as node:
        await node.follow()
        assert media_in_order(gcs) == node.keys(node.seeded()[:10])
        assert (cache.evictions, cache.bytes) == (0, 1_000_000)
        for _ in range(20):
            await node.follow()
        assert gcs.counts.media.total() == 20


async def test_items_beyond_the_window_are_prefetched_if_space_is_free(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 300, size_bytes=2000)
    async with prefetching(gcs, cache, window=None) as node:
        order = list(reversed(node.all))
        await node.plan(order)
        filled = len(node.items_on_disk())
        assert 240 <= filled <= 250  # a partly cached item counts as cached and as incoming
        assert sorted(node.items_on_disk()) == sorted(order[:filled])
        assert cache.evictions == 0
        for item in order[:20]:
            assert item in node.items_on_disk()
            await node.read(item)
        # Items that were read are evicted for space; items far ahead are downloaded once and stay.
        await node.read(*order[20:250])
        assert max(gcs.counts.media.values()) == 1


@pytest.mark.parametrize("how", [{"window": 5}, {"window": None, "lru": True}])
async def test_free_space_is_left_free_if_a_setting_limits_how_far_to_look_ahead(
    how: dict[str, Any], gcs: GCSServer, cache: Cache
) -> None:
    put_items(gcs, 400, size_bytes=1000)
    async with prefetching(gcs, cache, **how) as node:
        reader = await node.plan(node.all)
        assert len(node.items_on_disk()) == node.registry.window_items(reader) < 400


async def test_beyond_its_window_the_seeded_order_evicts_nothing_that_a_program_has_read(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=2) as node:
        order = node.seeded()
        for item in order[20:26]:
            for version in node.manifest.versions(item):
                await node.prefetcher.demand(version.name)
        await node.follow()
        assert sorted(node.items_on_disk()) == sorted(order[:4] + order[20:26])
        assert cache.evictions == 0


async def test_within_its_window_the_seeded_order_evicts_what_is_needed_last(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=3) as node:
        order = node.seeded()
        await node.follow()
        for position, item in enumerate(order[:20]):
            assert set(order[position : position + 3]) <= set(node.items_on_disk())
            await node.read(item, job="without a plan")
        assert cache.bytes == 1_000_000
        assert max(gcs.counts.media.values()) == 1


# The window


async def test_no_more_than_the_window_is_prefetched_ahead_of_the_reader(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=4) as node:
        order = node.seeded(epoch=5)
        await node.plan(order)
        for position, item in enumerate(order[:-1]):
            assert set(gcs.counts.media) == set(node.keys(order[: position + 4]))
            await node.read(item)
        assert set(gcs.counts.media.values()) == {1}


@pytest.mark.parametrize("kind", ["shuffled", "endless"])
async def test_the_start_of_the_next_epoch_is_prefetched_at_the_end_of_this_one(
    gcs: GCSServer, cache: Cache, kind: str
) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=4) as node:
        reader = await node.plan(node.all, kind=kind, seed=3)
        following = await asyncio.to_thread(reader.prepare_next_epoch)
        assert following is not None
        order, head = reader.stream.epoch.order.tolist(), following.order.tolist()
        for item in order[:-1]:
            assert item in node.items_on_disk()
            await node.read(item)
        assert set(head[:3]) <= set(node.items_on_disk())
        assert node.prefetcher.waits.total() == 0
        await node.read(order[-1])
        assert set(head[:4]) <= set(node.items_on_disk())
        fetched = gcs.counts.media.total()
        await node.plan(node.all, kind=kind, seed=3, epoch=1)
        assert gcs.counts.media.total() == fetched


async def test_when_the_seeded_epoch_has_been_read_the_next_one_is_prefetched(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 6)
    async with prefetching(gcs, cache, window=2) as node:
        await node.follow()
        await node.read(*node.seeded(), job="without a plan")
        (reader,) = node.registry
        assert (reader.stream.epoch.number, reader.stream.position) == (1, 0)
        assert reader.stream.planned_end == 6


async def test_the_runway_ends_at_the_first_gap(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 10)
    async with prefetching(gcs, cache, window=8) as node:
        order = node.seeded(epoch=5)
        gcs.delete(BUCKET, node.manifest.version(order[5], 1).name.name)
        reader = await node.plan(order)
        assert reader.runway_items() == 5
        await node.read(order[0])
        assert reader.runway_items() == 4


async def test_after_reads_out_of_order_the_items_that_follow_them_are_prefetched(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=4) as node:
        await node.plan(node.all)
        for item in (2, 1, 0, 5, 3):
            await node.read(item)
        assert gcs.counts.media == dict.fromkeys(node.keys(range(8)), 1)
        await node.read(4)
        assert gcs.counts.media == dict.fromkeys(node.keys(range(10)), 1)


async def test_a_lost_report_does_not_stop_prefetching(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 60)
    async with prefetching(gcs, cache, window=4) as node:
        reader = await node.plan(node.all)
        for item in range(1, 59):
            assert item in node.items_on_disk()
            await node.read(item)
        assert reader.stream.first_unread == 0
        assert gcs.counts.media == dict.fromkeys(node.keys(node.all), 1)


async def test_a_measured_window_serves_a_reader_whose_report_was_lost(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 300, size_bytes=100)
    async with prefetching(gcs, cache, window=None, concurrency=32) as node:
        await node.plan(node.all)
        for first in range(1, 300, 4):
            assert set(range(first, min(first + 4, 300))) <= set(node.items_on_disk())
            await node.read(*range(first, min(first + 4, 300)))
        assert gcs.counts.media == dict.fromkeys(node.keys(node.all), 1)


# Little space


async def test_a_cache_smaller_than_the_window_fills_up_and_waits(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=20) as node:
        await node.plan(node.all)
        assert node.items_on_disk() == list(range(10))
        for _ in range(20):  # reports by readers of other objects
            await node.follow()
        assert gcs.counts.media == dict.fromkeys(node.keys(range(10)), 1)
        assert cache.evictions == 0


async def test_a_cache_smaller_than_the_window_continues_as_the_reader_advances(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=20) as node:
        await node.plan(node.all)
        for item in node.all[:-1]:
            assert item in node.items_on_disk()
            await node.read(item)
            assert set(range(item + 1, min(item + 11, 30))) <= set(node.items_on_disk())
        assert gcs.counts.media == dict.fromkeys(node.keys(node.all), 1)


@pytest.mark.parametrize("window", [1, 3, 8, 40])
async def test_an_object_costs_one_get_for_as_long_as_it_is_cached(gcs: GCSServer, cache: Cache, window: int) -> None:
    """Three epochs with a third of the items cached: only evicted objects are downloaded again, and no read waits."""
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=window) as node:
        lost = lost_paths(cache)
        for epoch in range(3):
            reader = await node.plan(node.all, kind="shuffled", seed=3, epoch=epoch)
            for item in reader.stream.epoch.order.tolist():
                assert item in node.items_on_disk()
                await node.read(item)
                assert cache.bytes <= 1_000_000
        assert all(count == 1 + lost.count(key) for key, count in gcs.counts.media.items() if cache.stamp(key))
        assert all(count == lost.count(key) for key, count in gcs.counts.media.items() if not cache.stamp(key))
        ahead = min(window, 10)  # items prefetched in an epoch for the next one
        assert gcs.counts.media.total() // 2 <= 30 + 2 * (30 - 10 + ahead) + ahead


async def test_nothing_that_is_needed_sooner_is_evicted_for_a_prefetch(gcs: GCSServer, cache: Cache) -> None:
    """Do no harm (Cao et al., 1995)."""
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=20) as node:
        order = node.seeded(epoch=9)
        await node.plan(order)
        for position, item in enumerate(order):
            before = set(node.items_on_disk())
            await node.read(item)
            arrived = set(node.items_on_disk()) - before
            evicted = before - set(node.items_on_disk())
            left = order[position + 1 :]
            assert not evicted & set(left)
            assert arrived == set(left[9:10])


async def test_a_demand_evicts_what_is_needed_last(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=10) as node:
        order = node.seeded(epoch=9)
        await node.plan(order)
        lost = lost_paths(cache)
        (image, label) = node.manifest.versions(order[20])
        await node.prefetcher.demand(image.name)
        assert lost[:2] == node.keys([order[9]])
        await node.prefetcher.demand(label.name)
        await node.follow()
        assert sorted(node.items_on_disk()) == sorted(
            order[:10]
        )  # it is not needed soon after all: the window gets its space back


async def test_space_that_a_failed_download_releases_is_used_without_waiting_for_a_reader(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 2, size_bytes=450_000)
    async with prefetching(gcs, cache) as node:
        for version in node.manifest.versions(0):
            gcs.delete(BUCKET, version.name.name)
        await node.plan([0, 1])
        assert node.items_on_disk() == [1]


async def test_an_object_that_a_demand_evicted_is_not_downloaded_over_and_over(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 10, size_bytes=50_000)
    async with prefetching(gcs, cache) as node:
        await node.plan(node.all)
        assert len(node.items_on_disk()) == 10
        gcs.put(BUCKET, "train/other.bin", bytes(100_000))
        await node.prefetcher.demand(ObjectName(BUCKET, "train/other.bin"))
        for _ in range(5):
            await node.follow()
        # What no reader is known to read is evicted for what was evicted for it.
        assert gcs.counts.media == {
            **dict.fromkeys(node.keys(range(9)), 1),
            **dict.fromkeys(node.keys([9]), 2),
            f"{BUCKET}/train/other.bin": 1,
        }
        assert node.items_on_disk() == list(node.all)


async def test_an_item_larger_than_the_cache_stops_nothing_and_is_logged_once(
    gcs: GCSServer, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    put_items(gcs, 10, size_bytes=50_000)
    gcs.put(BUCKET, "train/images/00004.jpg", bytes(990_000))
    async with prefetching(gcs, cache, window=3) as node:
        for epoch in range(3):
            reader = await node.plan(node.all, kind="shuffled", seed=1, epoch=epoch)
            for item in reader.stream.epoch.order.tolist():
                assert (item in node.items_on_disk()) == (item != 4)
                await node.read(item)
        assert node.keys([4])[0] not in gcs.counts.media
        (line,) = caplog.messages
        assert line.startswith(f"gs://{BUCKET}/train/images/00004.jpg: with its label 1.0 MB, more than the whole cache")


async def test_with_the_policy_lru_the_least_recently_used_is_evicted_whatever_is_planned(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=1, lru=True) as node:
        await node.plan(node.all)
        for item in range(20):
            await node.read(item)
        assert node.items_on_disk() == list(range(11, 21))
        await node.plan(node.all, epoch=1)
        for item in range(20):  # LRU evicts each item just before it is read again
            await node.read(item)
        assert gcs.counts.media[node.keys([5])[0]] == 2


# Plans


async def test_a_readers_plan_replaces_the_seeded_order(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20, size_bytes=50_000)
    async with prefetching(gcs, cache, window=5, concurrency=1) as node:
        await node.follow()
        order = [item for item in node.all if item not in node.items_on_disk()]
        gcs.reset()
        await node.plan(order)
        assert [reader.stream.id for reader in node.registry] == ["job/0"]
        assert media_in_order(gcs) == node.keys(order[:5])
        await node.read(order[0])
        assert media_in_order(gcs) == node.keys(order[:6])


async def test_a_plan_continues_from_its_position(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=5) as node:
        await node.plan(node.all, position=12)
        assert node.items_on_disk() == [12, 13, 14, 15, 16]


async def test_an_item_that_a_plan_names_twice_is_downloaded_once_and_kept_for_its_second_read(
    gcs: GCSServer, cache: Cache
) -> None:
    put_items(gcs, 20, size_bytes=50_000)
    async with prefetching(gcs, cache, window=4) as node:
        order = [3, *(item for item in node.all if item != 3), 3]
        await node.plan(order)
        for item in order[:-1]:
            await node.read(item)
        assert 3 in node.items_on_disk()
        assert gcs.counts.media == dict.fromkeys(node.keys(node.all), 1)


async def test_two_streams_on_the_same_data_share_their_downloads(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache, window=10) as node:
        await asyncio.gather(
            node.plan(node.all, stream="job/0"),
            node.plan(node.all, stream="other/0"),
            node.plan(node.all[5:], stream="third/0"),
        )
        assert gcs.counts.media == dict.fromkeys(node.keys(range(15)), 1)


async def test_two_readers_in_different_orders_share_what_is_cached(gcs: GCSServer, cache: Cache) -> None:
    """Half of the items fit; under LRU either reader would need almost every item downloaded."""
    put_items(gcs, 20, size_bytes=50_000)
    async with prefetching(gcs, cache, window=3) as node:
        for epoch in range(4):
            readers = [
                await node.plan(node.all, kind="shuffled", seed=seed, epoch=epoch, stream=f"{seed}/0") for seed in (1, 2)
            ]
            if epoch == 1:
                gcs.reset()
            orders = [reader.stream.epoch.order.tolist() for reader in readers]
            for one, other in zip(*orders, strict=True):
                await node.demand_and_read(one, job="1")
                await node.demand_and_read(other, job="2")
        assert gcs.counts.media.total() / 2 < 0.6 * 3 * 40


async def test_nothing_is_prefetched_for_a_reader_that_is_gone(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=5) as node:
        await node.plan(range(15), stream="dead/0")
        await node.plan(range(15, 30), stream="alive/0")
        node.registry.end_job("dead")
        for item in range(15, 30):
            await node.read(item, job="alive")
        assert gcs.counts.media == dict.fromkeys(node.keys([*range(5), *range(15, 30)]), 1)
        assert set(range(20, 30)) <= set(node.items_on_disk())


# Why readers wait


async def test_each_wait_is_counted_by_its_reason(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=2) as node:
        reader = await node.plan(node.all[:20])
        image = [node.manifest.version(item, 0) for item in node.all]
        await node.prefetcher.demand(image[0].name)
        assert node.prefetcher.waits == {}
        await node.prefetcher.demand(image[25].name)
        await node.prefetcher.demand(ObjectName(BUCKET, image[12].name.name))
        await cache.evict(path_of(image[1]))
        await node.prefetcher.settled()
        gcs.put(BUCKET, image[15].name.name, b"changed")
        await node.fetcher.demand(image[15].name, None)
        await node.prefetcher.demand(image[15].name)
        assert node.prefetcher.waits == {"not_planned": 1, "late": 1, "changed": 1}
        assert reader.waits == {"late": 1, "changed": 1}
        assert reader.demanded_objects == 2


async def test_a_wait_while_every_slot_is_in_use_counts_as_throttled(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 10)
    gcs.faults.add(Stall(0))
    async with prefetching(gcs, cache, concurrency=4) as node:
        planning = asyncio.create_task(node.plan(node.all))
        await gcs.wait_for(lambda counts: counts.open_media == 4)
        demand = asyncio.create_task(node.prefetcher.demand(node.manifest.version(7, 0).name))
        gcs.release()
        await gcs.wait_for(lambda counts: counts.media[node.keys([7])[0]] == 1)
        gcs.faults.clear()
        gcs.release()
        await asyncio.gather(planning, demand)
        assert node.prefetcher.waits == {"throttled": 1}


async def test_a_wait_for_an_object_that_was_evicted_while_needed_counts_as_evicted(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 30, size_bytes=50_000)
    async with prefetching(gcs, cache, window=10) as node:
        reader = await node.plan(node.all)
        gcs.put(BUCKET, "train/other.bin", bytes(100_000))
        image = node.manifest.version(9, 0)
        gcs.faults.add(Stall(0), f"{BUCKET}/{image.name.name}")
        await node.prefetcher.demand(ObjectName(BUCKET, "train/other.bin"))
        demand = asyncio.create_task(node.prefetcher.demand(image.name))
        await gcs.wait_for(lambda counts: counts.media[node.keys([9])[0]] == 2)
        gcs.release()
        await demand
        assert reader.waits == {"evicted": 1}
        assert node.prefetcher.waits == {"not_planned": 1, "evicted": 1}


# Failures


async def test_an_object_that_is_lost_within_the_window_is_downloaded_again(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 10)
    async with prefetching(gcs, cache, window=5) as node:
        await node.plan(node.all)
        near, far = (path_of(node.manifest.version(item, 0)) for item in (2, 9))
        (cache.directory.objects / near).unlink()
        cache.paths.forget(near)
        cache.paths.forget(far)
        await node.prefetcher.settled()
        assert gcs.counts.media == dict.fromkeys(node.keys(range(5)), 1) | {near: 2}


async def test_a_part_that_is_lost_while_the_other_one_is_downloaded_is_downloaded_again(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 1)
    gcs.faults.add(Stall(0), "*.png")
    async with prefetching(gcs, cache) as node:
        image, label = node.keys([0])
        node.prefetcher.wake()
        await gcs.wait_for(lambda counts: counts.media[label] == 1)
        version = node.manifest.version(0, 0)
        if not node.fetcher.is_cached(version):
            await node.fetcher.prefetch(version, cache.choose_victims)  # joins the download
        await cache.evict(image)
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
            await node.follow()
            await node.read(*node.seeded(), job="without a plan")
        assert sorted(node.items_on_disk()) == sorted(node.seeded()[1:])
        assert gcs.counts.media[f"{BUCKET}/{gone.name.name}"] >= 2  # it was planned again in the next epoch
        assert [record.getMessage().count(gone.name.uri) for record in caplog.records] == [1]


async def test_after_an_outage_everything_is_planned_again_and_the_outage_is_logged_once(
    gcs: GCSServer, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    put_items(gcs, 10)
    gcs.faults.add(Stall(None))
    async with prefetching(gcs, cache, deadline_s=1.5, concurrency=20, retry_after_s=1.5) as node:
        node.prefetcher.wake()
        # Two attempts fit into the deadline; the third is that of another plan.
        await gcs.wait_for(lambda counts: len(counts.media) == 20 and min(counts.media.values()) == 3)
        assert "planned again in 1.5 s" in caplog.text
        assert len(caplog.records) == 1
        gcs.faults.clear()
        gcs.release()
        await node.prefetcher.settled()
        assert node.items_on_disk() == list(node.all)


async def test_a_bucket_that_refuses_everything_is_logged_as_one_object_and_a_number_of_others(
    gcs: GCSServer, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    put_items(gcs, 1000)
    refusal = rf"fetch gs://{BUCKET}/train/\S+: GCS returned 403 \(these credentials may not read it\); not prefetched"
    async with prefetching(gcs, cache, window=1000) as node:
        gcs.deny(BUCKET)
        await node.follow()
        assert gcs.counts.total("media") == 2000
        (line,) = caplog.messages
        assert re.fullmatch(refusal, line)
    _, last = caplog.messages  # logged by close, before the period ends
    assert re.fullmatch(rf"{refusal}; 1,998 more like it since the line before", last)


async def test_objects_that_fail_for_one_reason_do_not_hide_another_reason(
    gcs: GCSServer, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    put_items(gcs, 20)
    async with prefetching(gcs, cache) as node:
        gcs.faults.add(Status(403), "*/images/*")
        for item in node.all:
            gcs.delete(BUCKET, node.manifest.version(item, 1).name.name)
        await node.follow()
        assert sorted("GCS returned 403" in line for line in caplog.messages) == [False, True]


async def test_during_an_outage_the_prefetcher_is_not_settled(gcs: GCSServer, cache: Cache) -> None:
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


async def test_a_cancelled_run_cancels_every_prefetch(gcs: GCSServer, cache: Cache) -> None:
    put_items(gcs, 10)
    gcs.faults.add(Stall(None))
    before = asyncio.all_tasks()
    async with prefetching(gcs, cache, deadline_s=0.2, concurrency=4) as node:
        node.prefetcher.wake()
        await gcs.wait_for(lambda counts: len(counts.media) > 4)
    left = {task.get_name() for task in asyncio.all_tasks() - before}
    assert not [name for name in left if name.startswith(("prefetch", "fetch"))]
    assert cache.directory.leftover_files() == []
