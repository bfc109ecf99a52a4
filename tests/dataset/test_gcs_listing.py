"""Listing GCS: ids below a folder, and the manifest of a data root without a daemon."""

from collections.abc import Iterator

import pytest

from gcs_dataset import load_items_gcs
from gcs_dataset.gcs_listing import list_manifest
from gcs_prefetchd.shared.errors import AccessDeniedError, InvalidNameError, ItemError, ObjectMissingError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.objects import DataRoot
from gcs_prefetchd.testing import Kind, ServingGCS, Status
from support.datasets import ROOT, fill, gcs


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingGCS]:
    with gcs(monkeypatch) as server:
        yield server


def test_all_pages_are_listed_in_order(server: ServingGCS) -> None:
    names = [f"{number:05d}" for number in range(2500)]
    for name in reversed(names):
        server.put("pictures", f"set/images/{name}.jpg", b"")
    assert load_items_gcs(f"{ROOT}/images") == names
    assert server.counts.total(Kind.LIST) == server.counts.total() == 3


def test_folders_stay_in_ids_and_placeholders_are_not_items(server: ServingGCS) -> None:
    for name in ["images/", "images/a/", "images/a/7.jpg", "images/7.jpg", "images2/8.jpg", "labels/9.png"]:
        server.put("pictures", name, b"")
    assert load_items_gcs("gs://pictures/images/") == ["7", "a/7"]


def test_two_objects_with_one_id_are_both_named(server: ServingGCS) -> None:
    server.put("pictures", "images/7.jpg", b"")
    server.put("pictures", "images/7.png", b"")
    with pytest.raises(ItemError, match=r"gs://pictures/images: 7.jpg and 7.png have the same id '7'"):
        load_items_gcs("gs://pictures/images")


def test_a_missing_bucket_an_empty_prefix_and_denied_access_are_named(server: ServingGCS) -> None:
    server.put("pictures", "images/7.jpg", b"")
    server.create_bucket("closed")
    server.deny("closed")
    with pytest.raises(ObjectMissingError, match="gs://nowhere/images"):
        load_items_gcs("gs://nowhere/images")
    with pytest.raises(ItemError, match="gs://pictures/nothing: holds no items"):
        load_items_gcs("gs://pictures/nothing")
    with pytest.raises(AccessDeniedError, match="gs://closed/images"):
        load_items_gcs("gs://closed/images")
    with pytest.raises(InvalidNameError, match="images"):
        load_items_gcs("images")


def test_a_page_that_fails_is_requested_again(server: ServingGCS) -> None:
    for number in range(1500):
        server.put("pictures", f"images/{number}.jpg", b"")
    server.faults.add(Status(503), kind=Kind.LIST, requests={1, 3})
    assert len(load_items_gcs("gs://pictures/images")) == 1500
    assert server.counts.total(Kind.LIST) == 4


def test_a_manifest_has_the_versions_of_every_complete_item(server: ServingGCS) -> None:
    fill(server, 3)
    server.put("pictures", "set/images/alone.jpg", b"x")
    server.put("pictures", "set/readme.txt", b"x")
    manifest = list_manifest(DataRoot.parse(ROOT), ItemPatterns())
    assert list(manifest.ids) == ["0000", "0001", "0002"]
    assert manifest.incomplete == (f"{ROOT}/labels/alone.png",)
    stored = server.get("pictures", "set/labels/0002.png")
    version = manifest.version(2, 1)
    assert stored is not None
    assert (version.generation, version.size) == (stored.generation, stored.size_bytes)
    assert version.crc32c is not None


def test_two_listings_have_the_same_digest(server: ServingGCS) -> None:
    fill(server, 3)
    first, second = (list_manifest(DataRoot.parse(ROOT), ItemPatterns()) for _ in range(2))
    assert first.digest == second.digest
