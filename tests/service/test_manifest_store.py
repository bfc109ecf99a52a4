"""A data root is listed completely, page by page, and the last listing is kept for a start without GCS."""

import asyncio
import logging
import os
import resource
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.credentials import Access
from gcs_prefetchd.service.manifest_store import KEPT_PER_DATA_ROOT, list_manifest, load_newest_manifest, remove_old_manifests
from gcs_prefetchd.shared.checked_read import crc32c_of
from gcs_prefetchd.shared.errors import ItemError, ManifestError, ObjectMissingError, OriginUnavailableError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, build_manifest, load_manifest
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion
from gcs_prefetchd.testing import GCSServer, Kind, Stall, Status

BUCKET = "pictures"
ROOT = DataRoot(BUCKET, "train")


@pytest.fixture
async def gcs_client(gcs: GCSServer) -> AsyncIterator[GCSClient]:
    gcs.create_bucket(BUCKET)
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=5.0) as opened:
        yield opened


def put(gcs: GCSServer, *names: str) -> None:
    for name in names:
        gcs.put(BUCKET, name, name.encode())


def put_pairs(gcs: GCSServer, count: int) -> None:
    put(gcs, *(f"train/images/{i}.jpg" for i in range(count)), *(f"train/labels/{i}.png" for i in range(count)))


async def test_every_page_of_every_folder_is_listed(gcs: GCSServer, gcs_client: GCSClient) -> None:
    put_pairs(gcs, 2345)
    manifest = await list_manifest(gcs_client, ROOT, ItemPatterns())

    assert 6 <= gcs.counts.list[BUCKET] <= 3 * 6
    assert list(manifest.ids) == sorted(str(i) for i in range(2345))
    assert manifest.incomplete == ()


async def test_each_part_has_its_generation_size_and_crc32c(gcs: GCSServer, gcs_client: GCSClient) -> None:
    put_pairs(gcs, 3)
    manifest = await list_manifest(gcs_client, ROOT, ItemPatterns())

    name = ObjectName(BUCKET, "train/labels/1.png")
    stored = gcs.get(BUCKET, name.name)
    assert stored is not None
    data = name.name.encode()
    assert manifest.version(1, 1) == ObjectVersion(name, stored.generation, len(data), crc32c_of(data))


async def test_a_data_root_may_be_an_entire_bucket(gcs: GCSServer, gcs_client: GCSClient) -> None:
    put(gcs, "images/a.jpg", "labels/a.png", "train/images/b.jpg", "train/labels/b.png")
    assert list((await list_manifest(gcs_client, DataRoot(BUCKET, ""), ItemPatterns())).ids) == ["a"]


async def test_folders_with_a_common_prefix_do_not_mix(gcs: GCSServer, gcs_client: GCSClient) -> None:
    put(gcs, "train/images/a.jpg", "train/labels/a.png", "train2/images/b.jpg", "train2/labels/b.png", "train/images2/c.jpg")
    manifest = await list_manifest(gcs_client, ROOT, ItemPatterns())
    assert list(manifest.ids) == ["a"]
    assert manifest.incomplete == ()


async def test_folder_placeholders_and_foreign_objects_are_ignored(gcs: GCSServer, gcs_client: GCSClient) -> None:
    put(gcs, "train/images/", "train/images/notes.txt", "train/labels/", "train/images/a.jpg", "train/labels/a.png")
    assert list((await list_manifest(gcs_client, ROOT, ItemPatterns())).ids) == ["a"]


async def test_other_patterns_list_other_folders(gcs: GCSServer, gcs_client: GCSClient) -> None:
    put(gcs, "train/a/x.jpg", "train/a.mask.png", "train/b/x.jpg")
    manifest = await list_manifest(gcs_client, ROOT, ItemPatterns(("{id}/x.jpg", "{id}.mask.png")))
    assert list(manifest.ids) == ["a"]
    assert manifest.incomplete == ("gs://pictures/train/b.mask.png",)
    assert gcs.counts.list[BUCKET] == 1


async def test_one_warning_names_what_incomplete_items_lack(
    gcs: GCSServer, gcs_client: GCSClient, caplog: pytest.LogCaptureFixture
) -> None:
    put_pairs(gcs, 2)
    put(gcs, "train/images/alone.jpg", "train/labels/lonely.png")
    with caplog.at_level(logging.WARNING):
        manifest = await list_manifest(gcs_client, ROOT, ItemPatterns())

    assert list(manifest.ids) == ["0", "1"]
    (warning,) = caplog.messages
    assert warning.startswith("gs://pictures/train: ")
    assert "gs://pictures/train/labels/alone.png, gs://pictures/train/images/lonely.jpg" in warning
    assert "..." not in warning


async def test_a_few_of_many_missing_objects_are_named_and_all_are_counted(
    gcs: GCSServer, gcs_client: GCSClient, caplog: pytest.LogCaptureFixture
) -> None:
    put_pairs(gcs, 1)
    put(gcs, *(f"train/images/x{i:03}.jpg" for i in range(500)))
    await list_manifest(gcs_client, ROOT, ItemPatterns())

    (warning,) = caplog.messages
    assert "500 objects" in warning
    assert "x004.png, ..." in warning
    assert len(warning) < 500


@pytest.mark.parametrize("names", [(), ("train/images/a.jpg",), ("train/images/a.jpg", "train/labels/b.png"), ("other.jpg",)])
async def test_a_data_root_without_a_complete_item_is_an_error_that_names_it_and_the_patterns(
    names: tuple[str, ...], gcs: GCSServer, gcs_client: GCSClient
) -> None:
    put(gcs, *names)
    with pytest.raises(ItemError) as error:
        await list_manifest(gcs_client, ROOT, ItemPatterns())
    text = str(error.value)
    assert text.startswith("gs://pictures/train: no item has all of images/{id}.jpg, labels/{id}.png")
    assert "is the prefix right" in text
    assert "\n" not in text


async def test_a_bucket_that_does_not_exist_is_named(gcs_client: GCSClient) -> None:
    with pytest.raises(ObjectMissingError, match="gs://absent-bucket/train/"):
        await list_manifest(gcs_client, DataRoot("absent-bucket", "train"), ItemPatterns())


async def test_a_small_listing_is_one_request_for_each_folder(gcs: GCSServer, gcs_client: GCSClient) -> None:
    put_pairs(gcs, 1000)
    assert len(await list_manifest(gcs_client, ROOT, ItemPatterns())) == 1000
    assert gcs.counts.list[BUCKET] == 2


async def test_a_page_that_fails_is_retried_and_nothing_is_listed_twice(gcs: GCSServer, gcs_client: GCSClient) -> None:
    put_pairs(gcs, 4500)
    gcs.faults.add(Status(503), BUCKET, kind=Kind.LIST, requests={2, 4, 7})
    manifest = await list_manifest(gcs_client, ROOT, ItemPatterns())
    assert len(manifest) == 4500
    assert manifest.incomplete == ()


async def test_a_listing_that_cannot_finish_is_an_error_and_not_half_a_manifest(gcs: GCSServer) -> None:
    put_pairs(gcs, 1500)
    gcs.faults.add(Status(503), BUCKET, kind=Kind.LIST, requests=range(3, 1000))
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=0.5) as gcs_client:
        with pytest.raises(OriginUnavailableError, match="gs://pictures/train/"):
            await list_manifest(gcs_client, ROOT, ItemPatterns())


async def test_when_one_folder_fails_no_more_requests_are_sent_for_the_other(gcs: GCSServer, gcs_client: GCSClient) -> None:
    put_pairs(gcs, 1500)
    before = asyncio.all_tasks()
    gcs.faults.add(Stall(), BUCKET, kind=Kind.LIST, requests=1)
    gcs.faults.add(Status(404), BUCKET, kind=Kind.LIST, requests=2)
    with pytest.raises(ObjectMissingError):
        await list_manifest(gcs_client, ROOT, ItemPatterns())

    for task in asyncio.all_tasks() - before:
        assert "collect" not in repr(task.get_coro())
        assert "_fetch_page" not in repr(task.get_coro())
    gcs.release()
    assert gcs.counts.list[BUCKET] == 2


# Manifests on disk


def saved(manifests: Path, number: int, root: DataRoot = ROOT, item_patterns: ItemPatterns | None = None) -> Manifest:
    """A manifest whose only image has this generation, saved this many seconds after 1970."""
    item_patterns = item_patterns or ItemPatterns()
    objects = [
        ObjectVersion(ObjectName(root.bucket, f"{root.folder}{item_patterns.part_name('a', part)}"), number, 1, 1)
        for part in (0, 1)
    ]
    manifest = build_manifest(root, item_patterns, objects)
    folder = manifest.save(manifests)
    os.utime(folder, (number, number))
    return manifest


def test_the_newest_manifest_is_the_one_saved_last(tmp_path: Path) -> None:
    for number in (1, 3, 2):
        saved(tmp_path, number)
    newest = load_newest_manifest(tmp_path, ROOT, ItemPatterns())
    assert newest is not None
    assert newest.version(0, 0).generation == 3


def test_manifests_of_other_data_roots_and_patterns_are_ignored(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    saved(tmp_path, 2, DataRoot(BUCKET, "validation"))
    saved(tmp_path, 3, item_patterns=ItemPatterns(("{id}.jpg", "{id}.png")))
    newest = load_newest_manifest(tmp_path, ROOT, ItemPatterns())
    assert newest is not None
    assert newest.version(0, 0).generation == 1
    assert load_newest_manifest(tmp_path, DataRoot(BUCKET, "test"), ItemPatterns()) is None


def test_without_a_manifest_there_is_no_newest_one(tmp_path: Path) -> None:
    assert load_newest_manifest(tmp_path, ROOT, ItemPatterns()) is None


def test_damaged_and_unfinished_manifests_are_ignored(tmp_path: Path) -> None:
    good = saved(tmp_path, 1)
    damaged = tmp_path / saved(tmp_path, 2).digest
    (damaged / "size.npy").write_bytes(b"")
    os.utime(damaged, (5, 5))
    unfinished = saved(tmp_path, 3)
    (tmp_path / unfinished.digest).rename(tmp_path / f"{unfinished.digest}.4711.tmp")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()

    newest = load_newest_manifest(tmp_path, ROOT, ItemPatterns())
    assert newest is not None
    assert newest.digest == good.digest


def test_only_the_newest_manifests_of_a_data_root_are_kept(tmp_path: Path) -> None:
    other = saved(tmp_path, 1, DataRoot(BUCKET, "validation"))
    manifests = [saved(tmp_path, number) for number in range(2, 2 + KEPT_PER_DATA_ROOT + 3)]
    (tmp_path / "foreign").mkdir()

    remove_old_manifests(tmp_path, ROOT)

    kept = {folder.name for folder in tmp_path.iterdir()}
    assert kept == {manifest.digest for manifest in manifests[3:]} | {other.digest, "foreign"}


def test_a_listing_that_is_saved_again_is_the_newest(tmp_path: Path) -> None:
    """An object that was replaced and put back: after the listings A, B, A the start uses A."""
    first = saved(tmp_path, 1)
    saved(tmp_path, 2)
    first.save(tmp_path)
    newest = load_newest_manifest(tmp_path, ROOT, ItemPatterns())
    assert newest is not None
    assert newest.digest == first.digest


def test_only_what_a_power_cut_and_a_crash_left_is_removed(tmp_path: Path) -> None:
    good = saved(tmp_path, 1)
    damaged = tmp_path / saved(tmp_path, 2).digest
    (damaged / "size.npy").write_bytes(b"")
    gone = subprocess.Popen(["true"])
    gone.wait()
    digest = "0123456789abcdef" * 2
    (tmp_path / f"{digest}.{gone.pid}.0badcafe.tmp").mkdir()
    (tmp_path / f"{digest}.{os.getpid()}.0badcafe.tmp").mkdir()  # in a container every daemon may have pid 1
    kept = [f"{digest}.{os.getppid()}.0badcafe.tmp", "notes.tmp", "foreign"]
    for name in kept:
        (tmp_path / name).mkdir()

    remove_old_manifests(tmp_path, ROOT)

    assert {path.name for path in tmp_path.iterdir()} == {good.digest, *kept}


def test_a_manifest_that_cannot_be_read_now_is_kept(tmp_path: Path) -> None:
    """Too many open files prove no damage."""
    folder = tmp_path / saved(tmp_path, 1).digest
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open() as lowest_free:
        only_one = lowest_free.fileno() + 1  # enough to read the folder; mapping a file needs two
    resource.setrlimit(resource.RLIMIT_NOFILE, (only_one, hard))
    try:
        remove_old_manifests(tmp_path, ROOT)
        with pytest.raises(ManifestError, match="Too many open files"):
            load_manifest(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert folder.is_dir()
