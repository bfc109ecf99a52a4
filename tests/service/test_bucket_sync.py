"""The cache and the plans follow the bucket: what changed there is evicted, and a start uses the last listing."""

import asyncio
import shutil
from pathlib import Path

from gcs_prefetchd.service.manifest_store import list_manifest
from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, parse_object_uri
from gcs_prefetchd.shared.paths import cache_path, cache_path_of_uri
from gcs_prefetchd.testing import GCSServer, Kind, Stall
from support.daemons import BUCKET, DATA_ROOT, make_settings, put_items, running

ROOT = DataRoot.parse(DATA_ROOT)
CHANGED = ObjectName(BUCKET, "train/images/00001.jpg")


async def test_a_start_lists_a_data_root_only_without_a_saved_listing(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 3)
    settings = make_settings(tmp_path / "cache", gcs.url)
    async with running(settings) as daemon:
        before = gcs.counts.total(Kind.LIST)
        assert await daemon.bucket_sync.load_or_list(ROOT) == 0.0
        assert gcs.counts.total(Kind.LIST) == before
        for folder in daemon.directory.manifests.iterdir():
            shutil.rmtree(folder)
        assert await daemon.bucket_sync.load_or_list(ROOT) == settings.relist_s
        assert gcs.counts.total(Kind.LIST) == before + 2  # one request for each folder


async def test_an_object_that_changed_in_the_bucket_is_evicted_at_the_next_listing(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 3)
    settings = make_settings(tmp_path / "cache", gcs.url)
    async with running(settings) as daemon:
        await daemon.prefetcher.settled()
    gcs.put(BUCKET, "train/images/00001.jpg", b"relabelled")
    changed = f"{BUCKET}/train/images/00001.jpg"
    before = gcs.counts.media[changed]
    async with running(settings) as daemon:
        await gcs.wait_for(lambda counts: counts.media[changed] > before)
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, changed) == b"relabelled"


async def test_an_object_that_was_missing_from_one_listing_is_evicted_when_it_is_back(gcs: GCSServer, tmp_path: Path) -> None:
    put_items(gcs, 3)
    async with running(make_settings(tmp_path / "cache", gcs.url)) as daemon:
        await daemon.prefetcher.settled()
        gcs.delete(BUCKET, CHANGED.name)
        await daemon.bucket_sync.relist(ROOT)
        gcs.put(BUCKET, CHANGED.name, b"back")
        await daemon.bucket_sync.relist(ROOT)
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, cache_path(CHANGED.bucket, CHANGED.name)) == b"back"


async def test_the_next_daemon_evicts_what_a_killed_one_had_not_evicted_yet(gcs: GCSServer, tmp_path: Path) -> None:
    """Killed after it had saved a listing, or before it had listed a data root whose objects were cached."""
    put_items(gcs, 3)
    settings = make_settings(tmp_path / "cache", gcs.url)
    async with running(settings) as daemon:
        await daemon.prefetcher.settled()
        gcs.put(BUCKET, CHANGED.name, b"relabelled")
        (await list_manifest(daemon.gcs_client, ROOT, settings.item_patterns)).save(daemon.directory.manifests)
    async with running(settings) as daemon:
        await daemon.bucket_sync.relist(ROOT)
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, cache_path(CHANGED.bucket, CHANGED.name)) == b"relabelled"
    gcs.put(BUCKET, CHANGED.name, b"again")
    shutil.rmtree(tmp_path / "cache/manifests")
    async with running(settings) as daemon:
        await gcs.wait_for(lambda counts: counts.media[f"{BUCKET}/{CHANGED.name}"] == 3)
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, cache_path(CHANGED.bucket, CHANGED.name)) == b"again"


async def test_a_download_that_runs_during_a_listing_is_evicted_if_the_object_has_changed(
    gcs: GCSServer, tmp_path: Path
) -> None:
    objects = put_items(gcs, 3, size_bytes=1000)
    async with running(make_settings(tmp_path / "cache", gcs.url, window_items=1, cache_size=3500)) as daemon:
        await daemon.prefetcher.settled()  # one item is cached, and there is space for half of another
        name = next(name for name in map(parse_object_uri, objects) if daemon.cache.stamp(cache_path_of_uri(name.uri)) is None)
        gcs.faults.add(Stall(after_bytes=10), f"{BUCKET}/{name.name}")
        demanded = asyncio.create_task(daemon.prefetcher.demand(name))
        await gcs.wait_for(lambda counts: counts.open_media > 0)
        gcs.put(BUCKET, name.name, b"r" * 2000)  # no space for it beside its label
        relisting = asyncio.create_task(daemon.bucket_sync.relist(ROOT))
        await asyncio.wait([relisting], timeout=0.5)  # without the wait for the download it would have finished
        gcs.release()
        await demanded
        await relisting
        await daemon.prefetcher.settled()
        assert read_checked(daemon.directory.objects, cache_path_of_uri(name.uri)) != objects[name.uri]
