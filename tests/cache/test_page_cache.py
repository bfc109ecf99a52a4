"""Files that readers will open soon are in memory before they do."""

import asyncio
import ctypes
import gc
import mmap
import os
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from gcs_prefetchd.cache.page_cache import MAX_WAITING, ReadAhead
from gcs_prefetchd.shared.paths import cache_path
from gcs_prefetchd.testing import GCSServer
from support.daemons import DATA_ROOT, make_settings, put_items, running
from support.plans import plan_of

SIZE_BYTES = 50_000


def in_memory(file: Path) -> bool:
    """Whether the complete file is in the kernel's page cache. Unlike a read, this check does not put it there."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = (ctypes.c_ubyte * -(-SIZE_BYTES // mmap.PAGESIZE))()
        view = np.frombuffer(mapped, dtype=np.uint8)
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(SIZE_BYTES), pages) == 0
        del view  # it holds the mapping open
        return all(page & 1 for page in pages)


def write_and_forget(file: Path) -> None:
    """Write a file and evict it from the kernel's page cache."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(os.urandom(SIZE_BYTES))
    forget(file)


def forget(file: Path) -> None:
    """Evict a file from the kernel's page cache; skip the test if that is impossible."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(file):
        pytest.skip("this file system keeps its files in memory")


async def until_in_memory(files: list[Path]) -> None:
    """Wait until the files are in memory: the kernel does not report that."""
    async with asyncio.timeout(20):
        while not all(map(in_memory, files)):
            await asyncio.to_thread(os.sched_yield)


@asynccontextmanager
async def reading_ahead(objects: Path) -> AsyncIterator[ReadAhead]:
    read_ahead = ReadAhead(objects)
    running = asyncio.create_task(read_ahead.run())
    try:
        yield read_ahead
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_enqueued_files_are_read_into_memory(tmp_path: Path) -> None:
    paths = [f"pictures/{i}.jpg" for i in range(100)]
    for path in paths:
        write_and_forget(tmp_path / path)
    async with reading_ahead(tmp_path) as read_ahead:
        read_ahead.enqueue(paths)
        await until_in_memory([tmp_path / path for path in paths])


async def test_missing_files_and_non_files_do_not_delay_the_others(tmp_path: Path) -> None:
    write_and_forget(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    async with reading_ahead(tmp_path) as read_ahead:
        read_ahead.enqueue(["absent", "pipe", "link", "folder", "a.jpg/b", "a.jpg"])
        await until_in_memory([tmp_path / "a.jpg"])


async def test_files_that_are_too_far_behind_are_skipped(tmp_path: Path) -> None:
    write_and_forget(tmp_path / "first.jpg")
    write_and_forget(tmp_path / "last.jpg")
    async with reading_ahead(tmp_path) as read_ahead:
        read_ahead.enqueue(["first.jpg", *["absent"] * (MAX_WAITING - 1), "last.jpg"])
        await until_in_memory([tmp_path / "last.jpg"])
    assert not in_memory(tmp_path / "first.jpg")


@pytest.mark.parametrize("wanted", [True, False])
async def test_the_next_files_of_a_plan_are_read_ahead_if_the_setting_is_on(
    wanted: bool, gcs: GCSServer, tmp_path: Path
) -> None:
    put_items(gcs, 20, size_bytes=SIZE_BYTES)
    async with running(make_settings(tmp_path, gcs.url, window_items=5, read_ahead=wanted)) as service:
        await service.prefetcher.settled()
        manifest = service.registry.catalog.newest_manifest(DATA_ROOT)
        assert manifest is not None
        files = [
            [service.directory.objects / cache_path(one.name.bucket, one.name.name) for one in manifest.versions(item)]
            for item in range(20)
        ]
        for file in chain.from_iterable(files):
            forget(file)
        order = [13, 2, 7, 11, 5, 19, 0]
        plan, indices = plan_of(manifest, order)
        service.registry.register(service.registry.prepare(plan, indices))
        service.prefetcher.start_epoch()
        if wanted:
            await until_in_memory(list(chain.from_iterable(files[item] for item in order[:5])))
        else:
            await service.prefetcher.settled()
        later = order[5:] if wanted else order
        assert not any(map(in_memory, chain.from_iterable(files[item] for item in later)))


async def test_the_order_of_a_finished_job_is_discarded(gcs: GCSServer, tmp_path: Path) -> None:
    """Each job's streams have their own names: what is kept for each would be kept forever."""
    put_items(gcs, 20, size_bytes=100)
    async with running(make_settings(tmp_path, gcs.url)) as service:
        await service.prefetcher.settled()
        manifest = service.registry.catalog.newest_manifest(DATA_ROOT)
        assert manifest is not None
        plan, indices = plan_of(manifest, range(20), kind="shuffled")
        order = weakref.ref(service.registry.register(service.registry.prepare(plan, indices)).stream.epoch.order)
        service.prefetcher.start_epoch()
        await service.prefetcher.settled()
        service.registry.end_job(plan.job)
        service.prefetcher.start_epoch()
        await service.prefetcher.settled()
        gc.collect()
        assert order() is None
