"""The loader that reads the cache: hits, demands, the fallback and its single warning."""

import gzip
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from gcs_dataset import CachedLoader, ImageDataset, to_tensors
from gcs_dataset.gcs_loader import GCSLoader
from gcs_prefetchd.shared.errors import InvalidNameError, ItemError, ObjectMissingError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import build_manifest, load_manifest
from gcs_prefetchd.shared.objects import DataRoot, ObjectVersion, parse_object_uri
from gcs_prefetchd.testing import Kind, ServingGCS
from support.datasets import (
    ROOT,
    RecordingDaemon,
    cache_file,
    fill,
    gcs,
    image_bytes,
    label_bytes,
    manifest_of,
    number_of,
    read_all,
    warnings_of,
)

URI = f"{ROOT}/images/0003.jpg"
LABEL = f"{ROOT}/labels/0003.png"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingGCS]:
    with gcs(monkeypatch) as server:
        fill(server, 8)
        yield server


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[CachedLoader]:
    loader = CachedLoader(tmp_path, demand_timeout_s=2.0, fallback=GCSLoader(deadline_s=5))
    yield loader
    loader.close()


def test_a_hit_sends_no_request(server: ServingGCS, tmp_path: Path, loader: CachedLoader) -> None:
    cache_file(tmp_path, URI, image_bytes(3))
    cache_file(tmp_path, LABEL, label_bytes(3))
    with RecordingDaemon(tmp_path) as daemon:
        image, label = ImageDataset(ROOT, ["0003"], loader, label_mode="index")[0]
        assert (number_of(image), label.mode, label.getpixel((0, 0))) == (3, "P", 3)
        daemon.wait_for(lambda daemon: daemon.reads() == (2, 0, 0))
        assert daemon.fetches == []
    assert server.counts.total() == 0


def test_missing_objects_are_demanded_in_one_request(server: ServingGCS, tmp_path: Path, loader: CachedLoader) -> None:
    with RecordingDaemon(tmp_path) as daemon:
        daemon.objects = {URI: image_bytes(3), LABEL: label_bytes(3)}
        image, _ = ImageDataset(ROOT, ["0003"], loader)[0]
        assert (number_of(image), daemon.fetches) == (3, [[URI, LABEL]])
        assert number_of(loader(URI)) == 3
        daemon.wait_for(lambda daemon: daemon.reads() == (1, 2, 0))
        assert daemon.fetches == [[URI, LABEL]]
    assert server.counts.total() == 0


def become_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def become_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, 100),
        lambda path: path.write_bytes(image_bytes(4)),
        lambda path: os.removexattr(path, "user.gcs.object"),
        become_a_link,
        become_a_fifo,
        become_a_folder,
    ],
    ids=["emptied", "cut", "edited", "unstamped", "link", "fifo", "folder"],
)
def test_a_damaged_file_is_a_miss_and_never_wrong_bytes(
    server: ServingGCS, tmp_path: Path, loader: CachedLoader, damage: Callable[[Path], object]
) -> None:
    damage(cache_file(tmp_path, URI, image_bytes(3)))
    assert number_of(loader(URI)) == 3
    assert server.counts.total(Kind.MEDIA) == 1


def test_a_cached_object_that_is_not_an_image_is_read_from_gcs(
    server: ServingGCS, tmp_path: Path, loader: CachedLoader
) -> None:
    cache_file(tmp_path, URI, b"an older generation that was not an image")
    assert number_of(loader(URI)) == 3
    server.put("pictures", "set/images/0003.jpg", b"still not an image")
    with pytest.raises(ItemError, match=f"{URI}: is not an image"):
        loader(URI)


def test_a_gzipped_object_reads_the_same_from_the_cache(server: ServingGCS, tmp_path: Path, loader: CachedLoader) -> None:
    cache_file(tmp_path, URI, gzip.compress(image_bytes(3)))
    assert number_of(loader(URI)) == 3
    assert server.counts.total() == 0


def test_without_a_daemon_objects_are_read_from_gcs_with_one_warning(
    server: ServingGCS, tmp_path: Path, loader: CachedLoader, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for number in range(8):
            assert number_of(loader(f"{ROOT}/images/{number:04d}.jpg")) == number
    [warning] = warnings_of(caplog)
    assert "daemon.json" in warning
    assert "reading from GCS" in warning


def test_a_warning_is_logged_again_after_the_daemon_has_recovered(
    server: ServingGCS, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = CachedLoader(tmp_path)
    with RecordingDaemon(tmp_path) as daemon, caplog.at_level(logging.WARNING):
        for uri, is_known in [(URI, False), (URI, False), (LABEL, True), (f"{ROOT}/images/0001.jpg", False)]:
            daemon.objects = {uri: label_bytes(3)} if is_known else {}
            loader(uri)
        loader.close()
    assert ["not found" in warning for warning in warnings_of(caplog)] == [True, True]


@pytest.mark.parametrize("response", [(503, "full"), (200, "nonsense"), (200, "{}"), (200, '{"errors": [""]}'), (400, "what?")])
def test_no_read_fails_if_the_daemon_fails_or_misreports(
    server: ServingGCS, tmp_path: Path, loader: CachedLoader, response: tuple[int, str]
) -> None:
    with RecordingDaemon(tmp_path) as daemon:
        daemon.refuses["/v1/fetch"] = response
        assert number_of(loader(URI)) == 3
        daemon.wait_for(lambda daemon: daemon.reads() == (0, 0, 1))
        assert daemon.reports[0].wait_s > 0


def test_a_daemon_that_hangs_costs_one_timeout(server: ServingGCS, tmp_path: Path) -> None:
    loader = CachedLoader(tmp_path, demand_timeout_s=0.3)
    with RecordingDaemon(tmp_path) as daemon, daemon.hanging():
        for number in range(8):
            assert number_of(loader(f"{ROOT}/images/{number:04d}.jpg")) == number
        assert server.counts.total(Kind.MEDIA) == 8
    loader.close()


def test_an_object_that_the_daemon_does_not_find_is_read_from_gcs(
    server: ServingGCS, tmp_path: Path, loader: CachedLoader
) -> None:
    with RecordingDaemon(tmp_path):
        assert number_of(loader(URI)) == 3
        with pytest.raises(ObjectMissingError, match=f"{ROOT}/images/none.jpg"):
            loader(f"{ROOT}/images/none.jpg")


def test_a_custom_fallback_needs_only_one_argument(tmp_path: Path) -> None:
    loader = CachedLoader(tmp_path, fallback=lambda uri: Image.new("RGB", (1, 1), (7, 7, 7)))
    assert number_of(loader(URI)) == 7
    loader.close()


def test_an_invalid_uri_is_named(loader: CachedLoader) -> None:
    with pytest.raises(InvalidNameError, match="is not a gs:// URI"):
        loader("images/0003.jpg")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_and_report_for_themselves(server: ServingGCS, tmp_path: Path, context: str) -> None:
    """Also while the parent has its own connections and reporting thread."""
    loader = CachedLoader(tmp_path)
    with RecordingDaemon(tmp_path) as daemon:
        daemon.objects = {f"{ROOT}/images/{number:04d}.jpg": image_bytes(number) for number in range(4)}
        loader(f"{ROOT}/images/0000.jpg")
        dataset = ImageDataset(ROOT, [f"{number:04d}" for number in range(8)], loader, to_tensors)
        workers = 2 if context == "fork" else 1  # a spawned worker takes seconds to import torch
        samples = list(DataLoader(dataset, batch_size=4, num_workers=workers, multiprocessing_context=context))
        assert [image.float().mean().round().item() for batch, _ in samples for image in batch] == list(range(8))
        daemon.wait_for(lambda daemon: daemon.reads() == (1, 4, 12))
        assert {report.job for report in daemon.reports} == {loader.job}
        assert len({uri for report in daemon.reports for uri in report.objects}) == 16
    loader.close()


def test_a_copy_keeps_the_job_and_has_no_connections(server: ServingGCS, tmp_path: Path, loader: CachedLoader) -> None:
    loader(URI)
    copy = pickle.loads(pickle.dumps(CachedLoader(tmp_path)))
    assert copy.job != loader.job
    again = pickle.loads(pickle.dumps(copy))
    assert (again.job, again.cache_dir) == (copy.job, tmp_path)


def test_an_exiting_process_sends_its_last_report(server: ServingGCS, tmp_path: Path) -> None:
    """Including what it read right after a report, during the pause before the next."""
    script = f"""
from gcs_dataset import CachedLoader
loader = CachedLoader({str(tmp_path)!r})
for _ in range(20):
    loader({URI!r})
"""
    cache_file(tmp_path, URI, image_bytes(3))
    with RecordingDaemon(tmp_path) as daemon:
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
        assert daemon.reads() == (20, 0, 0)


def test_a_missing_object_reaches_the_main_process_by_name(server: ServingGCS, tmp_path: Path, loader: CachedLoader) -> None:
    dataset = ImageDataset(ROOT, ["missing"], loader, to_tensors)
    with pytest.raises(ObjectMissingError, match=f"{ROOT}/(images/missing.jpg|labels/missing.png)"):
        read_all(DataLoader(dataset, num_workers=2))


# --- With a manifest: generations


@pytest.fixture
def with_manifest(tmp_path: Path) -> Iterator[CachedLoader]:
    """A loader with a manifest of eight items, all of generation 1."""
    loader = CachedLoader(tmp_path, demand_timeout_s=2.0, fallback=GCSLoader(deadline_s=5), manifest=manifest_of(8))
    yield loader
    loader.close()


ITEMS = [f"{number:04d}" for number in range(8)]


def test_a_file_of_the_manifests_generation_is_a_hit(server: ServingGCS, tmp_path: Path, with_manifest: CachedLoader) -> None:
    cache_file(tmp_path, URI, image_bytes(3))
    cache_file(tmp_path, LABEL, label_bytes(3))
    image, _ = ImageDataset(ROOT, ITEMS, with_manifest)[3]
    image_again, _ = ImageDataset(ROOT, ITEMS, with_manifest)[-5]
    assert (number_of(image), number_of(image_again), number_of(with_manifest(URI))) == (3, 3, 3)
    assert server.counts.total() == 0


def test_a_dataset_of_some_of_the_items_finds_their_generations_too(
    server: ServingGCS, tmp_path: Path, with_manifest: CachedLoader
) -> None:
    """If an index refers to another item in the dataset than in the manifest."""
    cache_file(tmp_path, URI, image_bytes(3))
    cache_file(tmp_path, LABEL, label_bytes(3))
    image, _ = ImageDataset(ROOT, ["0003"], with_manifest)[0]
    assert number_of(image) == 3
    assert server.counts.total() == 0


def test_a_file_of_another_generation_is_a_miss(server: ServingGCS, tmp_path: Path, with_manifest: CachedLoader) -> None:
    cache_file(tmp_path, URI, image_bytes(5), generation=2)
    cache_file(tmp_path, LABEL, label_bytes(3))
    with RecordingDaemon(tmp_path) as daemon:
        daemon.objects = {URI: image_bytes(3)}
        image, _ = ImageDataset(ROOT, ITEMS, with_manifest)[3]
        assert (number_of(image), daemon.fetches) == (3, [[URI]])
        daemon.wait_for(lambda daemon: daemon.reads() == (1, 1, 0))
    assert server.counts.total() == 0


def test_all_parts_of_an_item_that_changed_in_the_bucket_are_read_as_they_are_now(
    server: ServingGCS, tmp_path: Path, with_manifest: CachedLoader, caplog: pytest.LogCaptureFixture
) -> None:
    """Including a part that is cached as it was listed: image and label of different times are never combined."""
    server.put("pictures", "set/images/0003.jpg", image_bytes(5))
    server.put("pictures", "set/labels/0003.png", label_bytes(5))
    cache_file(tmp_path, LABEL, label_bytes(3))
    with RecordingDaemon(tmp_path) as daemon, caplog.at_level(logging.WARNING):
        daemon.objects = {URI: image_bytes(5)}  # the daemon returns the live one
        image, label = ImageDataset(ROOT, ITEMS, with_manifest, label_mode="index")[3]
        assert (number_of(image), label.getpixel((0, 0))) == (5, 5)
        daemon.wait_for(lambda daemon: daemon.reads() == (0, 0, 2))
    [warning] = warnings_of(caplog)
    assert f"{URI}: has changed in the bucket since it was listed" in warning


def test_without_a_daemon_a_partly_cached_item_is_read_from_gcs_with_all_its_parts(
    server: ServingGCS, tmp_path: Path, with_manifest: CachedLoader
) -> None:
    cache_file(tmp_path, LABEL, label_bytes(3))
    server.put("pictures", "set/labels/0003.png", label_bytes(4))
    _, label = ImageDataset(ROOT, ITEMS, with_manifest, label_mode="index")[3]
    assert label.getpixel((0, 0)) == 4
    assert server.counts.total(Kind.MEDIA) == 2


def test_an_object_without_a_known_checksum_may_have_any_generation(server: ServingGCS, tmp_path: Path) -> None:
    versions = [ObjectVersion(parse_object_uri(uri), 1, 5, None) for uri in (URI, LABEL)]
    loader = CachedLoader(tmp_path, manifest=build_manifest(DataRoot.parse(ROOT), ItemPatterns(), versions))
    cache_file(tmp_path, URI, image_bytes(3), generation=7)
    cache_file(tmp_path, LABEL, label_bytes(3), generation=9)
    image, _ = ImageDataset(ROOT, ["0003"], loader)[0]
    assert number_of(image) == 3
    assert server.counts.total() == 0
    loader.close()


def test_an_object_outside_the_manifest_is_read_as_without_one(
    server: ServingGCS, tmp_path: Path, with_manifest: CachedLoader
) -> None:
    other = f"{ROOT}/images/0100.jpg"
    cache_file(tmp_path, other, image_bytes(100), generation=7)
    assert number_of(with_manifest(other)) == 100


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_copy_of_the_loader_has_the_manifest(server: ServingGCS, tmp_path: Path, is_saved: bool) -> None:
    """Mapped from the daemon's files if they exist, so that spawned workers share its memory."""
    manifest = manifest_of(1000)
    if is_saved:
        manifest = load_manifest(manifest.save(tmp_path / "manifests"))
    pickled = pickle.dumps(CachedLoader(tmp_path, manifest=manifest))
    assert (len(pickled) < 2000) == is_saved
    copy = pickle.loads(pickled)
    assert copy.manifest.digest == manifest.digest
    cache_file(tmp_path, URI, image_bytes(3))
    cache_file(tmp_path, LABEL, label_bytes(4), generation=2)
    assert number_of(copy(URI)) == 3
    assert server.counts.total() == 0
    copy(LABEL)
    assert server.counts.total(Kind.MEDIA) == 1
    copy.close()
