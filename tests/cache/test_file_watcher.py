"""The cache learns what other programs do with its files as a hint; what it does itself changes nothing."""

import asyncio
import itertools
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from watchdog.events import FileOpenedEvent

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.file_watcher import BATCH_EVENTS, QUEUE_LENGTH, FileWatcher
from gcs_prefetchd.cache.observer import LeastRecentlyUsed
from support.caches import content, file_of, names_in, observer_of, open_descriptors, path_of, put, run_script

TIMEOUT_S = 20.0


class Lost(LeastRecentlyUsed):
    """The paths that a cache loses, in order."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._paths: asyncio.Queue[str] = asyncio.Queue()
        self._sentinels = itertools.count()
        observer_of(cache).target = self

    def lost(self, path: str) -> None:
        self._paths.put_nowait(path)

    async def next(self) -> str:
        """Wait for the next lost path."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self._paths.get()

    async def until_now(self) -> list[str]:
        """The paths lost up to now: events arrive in order, so once the loss of one more file is known, all before it are."""
        sentinel = await put(self._cache, f"sentinels/{next(self._sentinels)}.jpg", b"")
        file_of(self._cache, sentinel).unlink()
        return list(itertools.takewhile(lambda path: path != sentinel, [path async for path in self._through(sentinel)]))

    async def _through(self, last: str):  # type: ignore[no-untyped-def]  # an async generator of str
        while (path := await self.next()) != last:
            yield path


@pytest.fixture
async def sentinels_folder(cache: Cache) -> None:
    """Create the sentinels' folder before the watcher starts."""
    (cache.directory.objects / "pictures/sentinels").mkdir(parents=True)


def names_of(cache: Cache) -> list[str]:
    return [name.name for name in names_in(cache)]


async def put_items(cache: Cache, count: int) -> list[str]:
    return [await put(cache, f"images/{i}.jpg", content(i, 100)) for i in range(count)]


def read_by_path(cache: Cache, paths: list[str]) -> None:
    """Open and read the files as another program does, while the event loop is blocked."""
    for path in paths:
        file_of(cache, path).read_bytes()


pytestmark = pytest.mark.usefixtures("sentinels_folder")


async def test_a_file_deleted_by_hand_leaves_the_index_at_once(cache: Cache) -> None:
    lost = Lost(cache)
    paths = await put_items(cache, 2)
    async with FileWatcher(cache, opens=False):
        file_of(cache, paths[0]).unlink()
        assert await lost.next() == paths[0]
    assert names_of(cache) == ["images/1.jpg"]
    assert cache.bytes == 100


async def test_a_folder_deleted_by_hand_leaves_the_index_at_once(cache: Cache) -> None:
    lost = Lost(cache)
    paths = await put_items(cache, 50)
    async with FileWatcher(cache, opens=False):
        await asyncio.to_thread(shutil.rmtree, cache.directory.objects / "pictures/images")
        assert {await lost.next() for _ in paths} == set(paths)
    assert cache.bytes == 0


async def test_an_open_by_another_program_counts_as_a_use(cache: Cache) -> None:
    lost = Lost(cache)
    paths = await put_items(cache, 3)
    async with FileWatcher(cache, opens=True):
        read_by_path(cache, paths[:1])
        assert await lost.until_now() == []
    assert names_of(cache) == ["images/1.jpg", "images/2.jpg", "images/0.jpg"]


async def test_opens_do_not_count_unless_they_are_watched(cache: Cache) -> None:
    lost = Lost(cache)
    paths = await put_items(cache, 3)
    async with FileWatcher(cache, opens=False):
        read_by_path(cache, paths[:1])
        assert await lost.until_now() == []
    assert names_of(cache) == ["images/0.jpg", "images/1.jpg", "images/2.jpg"]


@pytest.mark.parametrize("opens", [True, False])
async def test_our_own_publications_and_evictions_change_nothing(opens: bool, cache: Cache) -> None:
    lost = Lost(cache)
    async with FileWatcher(cache, opens=opens):
        for i in range(12):
            await put(cache, f"images/{i}.jpg", content(i, 100_000))
        await put(cache, "images/11.jpg", content(99, 100_000), generation=2)
        evicted = [path_of(f"images/{i}.jpg") for i in range(3)]  # the third for the new generation
        assert await lost.until_now() == evicted  # which the cache itself reported
        assert names_of(cache) == [f"images/{i}.jpg" for i in range(3, 12)]
        assert cache.evictions == 3


async def test_a_file_that_was_published_again_after_it_was_deleted_stays(cache: Cache) -> None:
    lost = Lost(cache)
    async with FileWatcher(cache, opens=False):
        for generation in range(1, 100):
            path = await put(cache, "images/a.jpg", b"x", generation)
            file_of(cache, path).unlink()
            await put(cache, "images/a.jpg", b"x", generation)
        await lost.until_now()
        assert file_of(cache, path).exists()
    await cache.rescan()
    assert names_of(cache) == ["images/a.jpg"]


async def test_new_folders_are_watched_too(cache: Cache) -> None:
    lost = Lost(cache)
    async with FileWatcher(cache, opens=True):
        path = await put(cache, "new/deep/deeper/a.jpg", b"a")
        await put(cache, "new/b.jpg", b"b")
        assert await lost.until_now() == []

        read_by_path(cache, [path])
        assert await lost.until_now() == []
        assert names_of(cache) == ["new/b.jpg", "new/deep/deeper/a.jpg"]

        file_of(cache, path).unlink()
        assert await lost.next() == path


async def test_foreign_files_are_ignored(cache: Cache) -> None:
    lost = Lost(cache)
    await put_items(cache, 1)
    async with FileWatcher(cache, opens=True):
        for name in ("notes.txt", "pictures/images/caf\udce9.jpg", "pictures/images/%zz"):
            foreign = cache.directory.objects / name
            foreign.write_text("mine")
            foreign.unlink()
        assert await lost.until_now() == []
    assert names_of(cache) == ["images/0.jpg"]


async def test_a_burst_of_opens_does_not_block_the_event_loop(cache: Cache) -> None:
    paths = await put_items(cache, 2)
    async with FileWatcher(cache, opens=True) as watch:
        # Put straight into its queue, so that all of them are there when the loop continues.
        queue = watch._queue.sync_q
        for number in range(QUEUE_LENGTH):
            queue.put_nowait(FileOpenedEvent(str(file_of(cache, paths[number % 2]))))
        turns = 0
        while not queue.empty():
            await asyncio.sleep(0)
            turns += 1
    assert turns >= QUEUE_LENGTH // BATCH_EVENTS


async def test_every_one_of_many_opens_counts(cache: Cache) -> None:
    lost = Lost(cache)
    paths = await put_items(cache, 500)
    order = random.Random(1).sample(paths, len(paths))
    async with FileWatcher(cache, opens=True):
        for _ in range(5):
            read_by_path(cache, order)
        assert await lost.until_now() == []
    assert [path_of(name) for name in names_of(cache)] == order


async def test_more_events_than_the_queue_holds_are_no_error(cache: Cache) -> None:
    lost = Lost(cache)
    paths = await put_items(cache, 2)
    async with FileWatcher(cache, opens=True):
        read_by_path(cache, paths * 20_000)
        async with asyncio.timeout(TIMEOUT_S):
            # The event of the sentinel's own deletion may have been lost: then the next one's is not.
            while paths[0] in cache_paths(cache):
                file_of(cache, paths[0]).unlink(missing_ok=True)
                await lost.until_now()
                await put(cache, "images/0.jpg", content(0, 100))
                file_of(cache, paths[0]).unlink()
                await lost.until_now()


def cache_paths(cache: Cache) -> set[str]:
    return {path_of(name.name) for name in names_in(cache)}


async def test_a_stopped_watcher_leaves_nothing_behind(cache: Cache) -> None:
    await put_items(cache, 2)
    async with FileWatcher(cache, opens=True):
        pass  # whatever the loop opens for its first thread is open now
    tasks, descriptors, threads = asyncio.all_tasks(), open_descriptors(), own_threads()

    async with FileWatcher(cache, opens=True):
        assert open_descriptors() != descriptors

    assert asyncio.all_tasks() == tasks
    assert open_descriptors() == descriptors
    assert own_threads() == threads


def own_threads() -> set[threading.Thread]:
    """The threads, without those that the event loop keeps for later calls."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


# Runs in a user namespace, which has limits of its own.
TOO_FEW = """
import asyncio, logging, os, sys, threading
from pathlib import Path
from gcs_prefetchd.cache.observer import LeastRecentlyUsed
from support.caches import open_descriptors, opened, put
from gcs_prefetchd.cache.file_watcher import FileWatcher

async def main():
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    async with opened(Path(sys.argv[1])) as cache:
        await asyncio.to_thread(int)
        before, threads = open_descriptors(), threading.active_count()
        path = await put(cache, "a/b/c.jpg", b"c")
        Path(f"/proc/sys/user/{sys.argv[2]}").write_text(sys.argv[3])
        async with FileWatcher(cache, opens=True):
            (cache.directory.objects / path).unlink()
            assert await cache.rescan() == (0, 1)
        assert open_descriptors() == before, (open_descriptors(), before)

asyncio.run(main())
"""
UNSHARE = ("unshare", "--user", "--map-root-user")
needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs to be allowed to make a user namespace",
)


@needs_namespaces
@pytest.mark.parametrize(
    ("limit", "value", "warning"),
    [
        ("max_inotify_watches", 0, "not watched ("),
        ("max_inotify_watches", 2, "2 folders not watched; "),
        ("max_inotify_instances", 0, "not watched ("),
    ],
)
def test_with_too_few_inotify_watches_a_warning_is_logged_and_the_rescan_finds_changes(
    limit: str, value: int, warning: str, tmp_path: Path
) -> None:
    done = run_script(TOO_FEW, tmp_path / "few", limit, value, prefix=UNSHARE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/few/objects: {warning}")
    assert "a rescan finds the changes. Raise fs.inotify.max_user_watches" in done.stdout
    assert done.stdout.count("\n") == 1
