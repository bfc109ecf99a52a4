"""What a reader will open soon is in memory before it does."""

import asyncio
import ctypes
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from gcs_prefetchd.readahead import MOST_WAITING, ReadAhead

SIZE_BYTES = 50_000


def in_memory(file: Path) -> bool:
    """Whether the whole file lies in the kernel's page cache. To look does not bring it there, as a read would."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = (ctypes.c_ubyte * -(-SIZE_BYTES // mmap.PAGESIZE))()
        view = np.frombuffer(mapped, dtype=np.uint8)
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(SIZE_BYTES), pages) == 0
        del view  # it holds the mapping open
        return all(page & 1 for page in pages)


def write_and_forget(file: Path) -> None:
    """Write a file and have the kernel drop it from memory; skips the test where it will not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(os.urandom(SIZE_BYTES))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(file):
        pytest.skip("this file system keeps its files in memory")


async def until_in_memory(files: list[Path]) -> None:
    """The kernel tells nobody when it has read."""
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


async def test_what_is_wanted_is_read_into_memory(tmp_path: Path) -> None:
    paths = [f"pictures/{i}.jpg" for i in range(100)]
    for path in paths:
        write_and_forget(tmp_path / path)
    async with reading_ahead(tmp_path) as read_ahead:
        read_ahead.want(paths)
        await until_in_memory([tmp_path / path for path in paths])


async def test_files_that_are_gone_or_are_none_hold_up_nothing(tmp_path: Path) -> None:
    write_and_forget(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    async with reading_ahead(tmp_path) as read_ahead:
        read_ahead.want(["absent", "pipe", "link", "folder", "a.jpg/b", "a.jpg"])
        await until_in_memory([tmp_path / "a.jpg"])


async def test_what_has_fallen_too_far_behind_is_left_to_its_reader(tmp_path: Path) -> None:
    write_and_forget(tmp_path / "first.jpg")
    write_and_forget(tmp_path / "last.jpg")
    async with reading_ahead(tmp_path) as read_ahead:
        read_ahead.want(["first.jpg", *["absent"] * (MOST_WAITING - 1), "last.jpg"])
        await until_in_memory([tmp_path / "last.jpg"])
    assert not in_memory(tmp_path / "first.jpg")
