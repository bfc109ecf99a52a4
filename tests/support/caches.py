"""Helpers for tests of the cache: objects put into a cache as the fetcher does, and small file systems."""

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from pathlib import Path

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.observer import CacheObserver, ChooseVictims, EvictableFiles, LeastRecentlyUsed
from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.fetch.adaptive_concurrency import AdaptiveConcurrency
from gcs_prefetchd.fetch.download_slots import DownloadSlots
from gcs_prefetchd.fetch.rate_limit import RateLimit
from gcs_prefetchd.shared.checked_read import ATTRIBUTE, Stamp, crc32c_of
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path

TESTS = Path(__file__).parents[1]
BUCKET = "pictures"
LIMIT = 1_000_000


def _may_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    trial = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


def _in_memory() -> str | None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        try:
            os.setxattr(folder, ATTRIBUTE, b"")
        except OSError:
            return None
    return "/dev/shm"


# For tests that create many cache directories: each gets 256 folders, which takes half a second on some disks.
IN_MEMORY = _in_memory() if Path("/dev/shm").is_dir() else None

needs_mount = pytest.mark.skipif(not _may_mount(), reason="needs to be root and to be allowed to mount")


def content(seed: int, size_bytes: int) -> bytes:
    """Random bytes, different for each seed."""
    return random.Random(seed).randbytes(size_bytes)


def version_of(name: str, data: bytes, generation: int = 1) -> ObjectVersion:
    """The version of an object with these bytes."""
    return ObjectVersion(ObjectName(BUCKET, name), generation, len(data), crc32c_of(data))


def stamp_of(data: bytes, generation: int = 1) -> Stamp:
    """The stamp of an object with these bytes."""
    return Stamp(generation, len(data), crc32c_of(data))


def path_of(name: str) -> str:
    """The object's path in the cache."""
    return cache_path(BUCKET, name)


async def put(cache: Cache, name: str, data: bytes, generation: int = 1, choose_victims: ChooseVictims | None = None) -> str:
    """Publish an object without downloading it; returns its path in the cache."""
    version = version_of(name, data, generation)
    async with Reservation(cache, version.name, choose_victims).writer() as writer:
        await writer.start(version)
        for start in range(0, len(data), 65_536):
            await writer.write(data[start : start + 65_536])
        await writer.publish(version)
    return path_of(name)


def slots_of(count: int, on_free: Callable[[], None] = lambda: None) -> DownloadSlots:
    """A fixed number of slots."""
    return DownloadSlots(AdaptiveConcurrency(count, count), RateLimit(), on_free=on_free)


def keeping(cache: Cache, *kept: str) -> ChooseVictims:
    """Choose everything but these paths, least recently used first."""

    def choose_victims(short_bytes: int) -> list[str] | None:
        victims = []
        for path in chain.from_iterable(cache.pages()):
            if short_bytes > 0 and path not in kept:
                victims.append(path)
                short_bytes -= cache.evictable_bytes(path)
        return victims if short_bytes <= 0 else None

    return choose_victims


class RecordingObserver:
    """Records what a cache reports, in order, and passes it on to `target`."""

    def __init__(self) -> None:
        self.target: CacheObserver = LeastRecentlyUsed()
        self.arrivals: list[str] = []
        self.losses: list[str] = []

    def arrived(self, path: str, stamp: Stamp) -> None:
        self.arrivals.append(path)
        self.target.arrived(path, stamp)

    def used(self, path: str) -> None:
        self.target.used(path)

    def lost(self, path: str) -> None:
        self.losses.append(path)
        self.target.lost(path)

    def choose_victims(self, short_bytes: int, files: EvictableFiles) -> list[str] | None:
        return self.target.choose_victims(short_bytes, files)


def observer_of(cache: Cache) -> RecordingObserver:
    """The observer of a cache that a test opened."""
    assert isinstance(cache.observer, RecordingObserver)
    return cache.observer


def names_in(cache: Cache) -> list[ObjectName]:
    """The objects in the cache, least recently used first."""
    found = map(cache.directory.object_name, chain.from_iterable(cache.pages()))
    return [name for name in found if name is not None]


def file_of(cache: Cache, path: str) -> Path:
    """The file at a path of the cache."""
    return cache.directory.objects / path


@asynccontextmanager
async def opened(
    path: Path, limit_bytes: int = LIMIT, min_free_bytes: int = 0, observer: CacheObserver | None = None
) -> AsyncIterator[Cache]:
    """An open cache in this directory, which is not checked at the end."""
    directory = CacheDirectory(path)
    directory.claim()
    try:
        cache = Cache(directory, limit_bytes, min_free_bytes, observer or RecordingObserver())
        await cache.open()
        try:
            await cache.wait_until_ready()
            yield cache
        finally:
            await cache.close()
    finally:
        directory.close()


@contextmanager
def rows(directory: Path) -> Iterator[sqlite3.Connection]:
    """The index's database, as another program may open it."""
    with contextlib.closing(sqlite3.connect(directory / "index/cache.db", isolation_level=None)) as connection:
        yield connection


@contextmanager
def mounted(point: Path, kind: str, options: str) -> Iterator[Path]:
    """Mount a file system at `point`."""
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, "none", point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", point], check=True)


def index_elsewhere(directory: Path, folder: Path) -> None:
    """Put the index of a new cache directory into another folder, so that it takes no space on the directory's disk."""
    folder.mkdir()
    directory.mkdir(exist_ok=True)
    (directory / "CACHEDIR.TAG").touch()
    (directory / "index").symlink_to(folder)


def run_script(script: str, *arguments: object, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a few lines of Python in another process."""
    return subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def open_descriptors() -> set[str]:
    """The descriptors that this process has open: each number with its target."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{entry.name} {entry.readlink()}")
    return {one for one in found if not one.endswith("/fd")}
