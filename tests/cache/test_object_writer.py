"""A download ends as a complete file with the right name and stamp, or leaves nothing: no bytes, no reserved space."""

import asyncio
from pathlib import Path

import pytest

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.object_writer import BUFFER_BYTES
from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.credentials import Access
from gcs_prefetchd.shared.checked_read import read_checked, read_object_name, read_stamp
from gcs_prefetchd.shared.errors import CacheFullError, CacheWriteError, ObjectMissingError, OriginUnavailableError
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion, parse_object_uri
from gcs_prefetchd.testing import Cut, FlippedByte, GCSServer, Reset
from support.caches import (
    BUCKET,
    LIMIT,
    content,
    file_of,
    index_elsewhere,
    mounted,
    names_in,
    needs_mount,
    opened,
    path_of,
    put,
    run_script,
    stamp_of,
    version_of,
)


async def fetch(cache: Cache, gcs: GCSServer, name: str, version: ObjectVersion | None = None, deadline_s: float = 30.0) -> str:
    """Download an object from GCS into the cache; returns its path there."""
    wanted = ObjectName(BUCKET, name)
    access = Access(gcs.url, anonymous=True)
    async with GCSClient(access, deadline_s=deadline_s) as origin, Reservation(cache, wanted).writer() as writer:
        await writer.publish(await origin.download(wanted, version, writer))
    return path_of(name)


async def assert_nothing_left(cache: Cache) -> None:
    assert cache.directory.leftover_files() == []
    assert (cache.capacity.reserved_bytes, cache.bytes, len(cache)) == (0, 0, 0)
    assert await cache.check() == []


@pytest.mark.parametrize("size_bytes", [0, 1, 100_000, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 5 * BUFFER_BYTES + 7])
async def test_an_object_of_any_size_arrives_complete_and_stamped(size_bytes: int, gcs: GCSServer, tmp_path: Path) -> None:
    data = content(size_bytes, size_bytes)
    stored = gcs.put(BUCKET, "images/a.jpg", data)
    async with opened(tmp_path / "cache", 10 * BUFFER_BYTES) as cache:
        path = await fetch(cache, gcs, "images/a.jpg")

        assert read_checked(cache.directory.objects, path) == data
        assert read_stamp(file_of(cache, path), path) == cache.stamp(path) == stamp_of(data, stored.generation)
        assert (cache.bytes, cache.capacity.reserved_bytes) == (size_bytes, 0)
        assert await cache.check() == []


@pytest.mark.parametrize(
    "fault", [Cut(1_500_000), Reset(1_500_000), FlippedByte(10), Cut(10), Cut(BUFFER_BYTES + 5, "chunked")]
)
async def test_after_failed_attempts_the_file_is_complete(fault: Cut, gcs: GCSServer, tmp_path: Path) -> None:
    data = content(1, 3 * BUFFER_BYTES)
    gcs.put(BUCKET, "a.jpg", data)
    gcs.faults.add(fault, requests={1, 2})
    async with opened(tmp_path / "cache", 10 * BUFFER_BYTES) as cache:
        path = await fetch(cache, gcs, "a.jpg")

        assert gcs.counts.media[f"{BUCKET}/a.jpg"] == 3
        assert read_checked(cache.directory.objects, path) == data
        assert await cache.check() == []


async def test_a_shorter_second_attempt_leaves_no_tail_of_the_first(cache: Cache) -> None:
    long, short = content(1, 900_000), content(2, 300_000)
    async with Reservation(cache, ObjectName(BUCKET, "a.jpg")).writer() as writer:
        await writer.start(version_of("a.jpg", long))
        await writer.write(long)
        await writer.start(version_of("a.jpg", short))
        assert cache.capacity.reserved_bytes == 300_000
        await writer.write(short)
        await writer.publish(version_of("a.jpg", short))

    assert read_checked(cache.directory.objects, path_of("a.jpg")) == short


async def test_an_object_received_in_thousands_of_chunks_arrives_complete(cache: Cache) -> None:
    data = content(1, 250_000)
    async with Reservation(cache, ObjectName(BUCKET, "a.jpg")).writer() as writer:
        await writer.start(version_of("a.jpg", data))
        for first in range(0, len(data), 100):
            await writer.write(data[first : first + 100])
        await writer.publish(version_of("a.jpg", data))

    assert read_checked(cache.directory.objects, path_of("a.jpg")) == data


async def test_a_second_attempt_discards_what_the_first_wrote_to_disk(tmp_path: Path) -> None:
    long, short = content(1, 2 * BUFFER_BYTES), content(2, 300)
    async with opened(tmp_path / "cache", 10 * BUFFER_BYTES) as cache:
        async with Reservation(cache, ObjectName(BUCKET, "a.jpg")).writer() as writer:
            await writer.start(version_of("a.jpg", long))
            await writer.write(long)
            await writer.start(version_of("a.jpg", short))
            await writer.write(short)
            await writer.publish(version_of("a.jpg", short))
        assert read_checked(cache.directory.objects, path_of("a.jpg")) == short


async def test_nothing_has_the_final_name_before_it_is_complete(cache: Cache) -> None:
    data = content(1, 500_000)
    async with Reservation(cache, ObjectName(BUCKET, "a.jpg")).writer() as writer:
        await writer.start(version_of("a.jpg", data))
        await writer.write(data)
        assert list(cache.directory.objects.rglob("*")) == []
        await writer.publish(version_of("a.jpg", data))
    assert file_of(cache, path_of("a.jpg")).is_file()


async def test_an_object_with_a_long_name_is_cached_under_a_hash_and_carries_its_name(cache: Cache, gcs: GCSServer) -> None:
    name = "images/" + "ä" * 200 + ".jpg"
    gcs.put(BUCKET, name, b"x")
    path = await fetch(cache, gcs, name)

    assert "%h" in path
    assert read_object_name(file_of(cache, path)) == ObjectName(BUCKET, name)


async def test_objects_whose_names_would_be_file_and_folder_at_once_are_cached_together(cache: Cache, gcs: GCSServer) -> None:
    names = ["d", "d/e", "d/e/f.jpg", "d/e/f.jpg/g", "d.jpg", "d.jpg/e.jpg", "d//e", "d/./e", "d/../e", "d/e%2Ff"]
    for number, name in enumerate(names):
        gcs.put(BUCKET, name, content(number, 100))
    paths = await asyncio.gather(*(fetch(cache, gcs, name) for name in names))

    assert len(set(paths)) == len(names)
    for number, path in enumerate(paths):
        assert read_checked(cache.directory.objects, path) == content(number, 100)
    assert {name.name for name in names_in(cache)} == set(names)


async def test_an_object_that_does_not_exist_leaves_nothing(cache: Cache, gcs: GCSServer) -> None:
    gcs.create_bucket(BUCKET)
    with pytest.raises(ObjectMissingError):
        await fetch(cache, gcs, "absent.jpg")
    await assert_nothing_left(cache)


async def test_a_download_that_gives_up_leaves_nothing(gcs: GCSServer, tmp_path: Path) -> None:
    gcs.put(BUCKET, "a.jpg", content(1, 3 * BUFFER_BYTES))
    gcs.faults.add(Cut(2 * BUFFER_BYTES, "close"))
    async with opened(tmp_path / "cache", 10 * BUFFER_BYTES) as cache:
        with pytest.raises(OriginUnavailableError):
            await fetch(cache, gcs, "a.jpg", deadline_s=0.5)
        await assert_nothing_left(cache)


async def test_an_object_without_space_leaves_nothing(cache: Cache, gcs: GCSServer) -> None:
    gcs.put(BUCKET, "a.jpg", content(1, LIMIT + 1))
    with pytest.raises(CacheFullError, match=r"no space for 1\.0 MB"):
        await fetch(cache, gcs, "a.jpg")
    await assert_nothing_left(cache)


async def test_space_is_reserved_from_the_first_byte_and_released_once(cache: Cache) -> None:
    async with Reservation(cache, ObjectName(BUCKET, "a.jpg")).writer() as writer:
        await writer.start(version_of("a.jpg", content(1, 1000)))
        assert cache.capacity.reserved_bytes == 1000
        await writer.start(version_of("a.jpg", content(1, 1000)))
        assert cache.capacity.reserved_bytes == 1000
    await assert_nothing_left(cache)


async def test_a_file_in_place_of_the_objects_folder_is_an_error_that_names_the_object(tmp_path: Path) -> None:
    async with opened(tmp_path / "cache") as cache:
        (tmp_path / "cache/objects").rename(tmp_path / "elsewhere")
        (tmp_path / "cache/objects").touch()
        with pytest.raises(CacheWriteError, match=rf"^cache gs://pictures/a\.jpg: .* \({tmp_path}/cache\)$"):
            await put(cache, "a.jpg", b"x")
        assert cache.capacity.reserved_bytes == 0


async def test_a_foreign_file_in_the_way_of_a_folder_is_an_error_that_names_the_object(cache: Cache) -> None:
    (cache.directory.objects / BUCKET).write_text("mine")
    with pytest.raises(CacheWriteError, match=r"^cache gs://pictures/a\.jpg: Not a directory"):
        await put(cache, "a.jpg", b"x")
    await assert_nothing_left(cache)


@needs_mount
@pytest.mark.parametrize("size_bytes", [900_000, 3 * BUFFER_BYTES])
async def test_a_full_disk_is_an_error_that_names_the_object_and_leaves_nothing(size_bytes: int, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=500k") as disk:
        index_elsewhere(disk, tmp_path / "index")
        async with opened(disk, 10 * BUFFER_BYTES) as cache:
            with pytest.raises(CacheWriteError, match=rf"^cache gs://pictures/a\.jpg: No space left on device \({disk}\)$"):
                await put(cache, "a.jpg", content(1, size_bytes))
            await assert_nothing_left(cache)

            await put(cache, "small.jpg", content(2, 100_000))  # the next one that fits is published as usual
            assert await cache.check() == []


@needs_mount
async def test_a_failed_publication_leaves_the_older_generation(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=500k") as disk:
        index_elsewhere(disk, tmp_path / "index")
        async with opened(disk, 10 * BUFFER_BYTES) as cache:
            path = await put(cache, "a.jpg", b"old")
            with pytest.raises(CacheWriteError):
                await put(cache, "a.jpg", content(1, 900_000), generation=2)

            assert read_checked(cache.directory.objects, path) == b"old"
            assert await cache.check() == []
            await cache.evict(path)  # and it can be evicted as before
            await assert_nothing_left(cache)


LIMITED = """
import asyncio, resource, signal, sys
from pathlib import Path
from support.caches import content, opened, put
from gcs_prefetchd.shared.errors import CacheWriteError

async def main():
    async with opened(Path(sys.argv[1])) as cache:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            await put(cache, "a.jpg", content(1, 300_000))
        except CacheWriteError as exc:
            print(exc)
        print(cache.directory.leftover_files(), cache.capacity.reserved_bytes)

asyncio.run(main())
"""


def test_a_write_that_fails_half_way_is_an_error_that_names_the_object(tmp_path: Path) -> None:
    done = run_script(LIMITED, tmp_path / "cache")
    assert done.stdout == f"cache gs://pictures/a.jpg: File too large ({tmp_path}/cache)\n[] 0\n", done.stderr


async def test_objects_fetched_together_all_arrive(gcs: GCSServer, cache: Cache) -> None:
    for number in range(100):
        gcs.put(BUCKET, f"images/{number}.jpg", content(number, 5000))
    paths = await asyncio.gather(*(fetch(cache, gcs, f"images/{number}.jpg") for number in range(100)))
    for number, path in enumerate(paths):
        assert read_checked(cache.directory.objects, path) == content(number, 5000)


async def test_the_requested_generation_is_the_one_that_arrives(gcs: GCSServer, cache: Cache) -> None:
    stored = gcs.put(BUCKET, "a.jpg", b"x", generation=1234)
    name = parse_object_uri(f"gs://{BUCKET}/a.jpg")
    path = await fetch(cache, gcs, "a.jpg", ObjectVersion(name, stored.generation, 1, None))
    assert cache.stamp(path) == stamp_of(b"x", 1234)
