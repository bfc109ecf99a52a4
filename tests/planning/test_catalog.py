"""The manifests of all data roots, and the objects that they name."""

import pytest

from gcs_prefetchd.planning.catalog import Catalog
from gcs_prefetchd.planning.item_refs import ItemRef, PartRef
from gcs_prefetchd.shared.objects import ObjectName
from support.plans import ROOT, manifest_of

DRAWINGS = "gs://drawings"
FIRST, SECOND = manifest_of("ab"), manifest_of("bc", generation=2)


@pytest.fixture
def catalog() -> Catalog:
    catalog = Catalog()
    for manifest in (FIRST, SECOND, manifest_of("a", DRAWINGS)):
        catalog.add_newest(catalog.assign_numbers(manifest))
    return catalog


def test_the_newest_manifest_of_a_data_root_is_the_one_that_was_added_last(catalog: Catalog) -> None:
    assert catalog.newest_manifest(ROOT) is SECOND
    assert catalog.newest_manifest("gs://never/listed") is None


def test_a_manifest_is_found_by_its_data_root_and_digest(catalog: Catalog) -> None:
    found = catalog.find_manifest(ROOT, FIRST.digest)
    assert found is not None
    assert found.manifest is FIRST
    assert catalog.find_manifest(DRAWINGS, FIRST.digest) is None
    assert catalog.find_manifest("gs://never/listed", FIRST.digest) is None


def test_an_object_is_found_as_the_part_of_an_item_of_its_data_root(catalog: Catalog) -> None:
    found = [
        catalog.find_part(ObjectName("pictures", "train/labels/c.png")),
        catalog.find_part(ObjectName("pictures", "train/images/a.jpg")),
        catalog.find_part(ObjectName("drawings", "images/a.jpg")),
        catalog.find_part(ObjectName("drawings", "images/b.jpg")),
    ]
    assert found == [PartRef(ROOT, 2, 1), PartRef(ROOT, 0, 0), PartRef(DRAWINGS, 0, 0), None]
    assert found[0] is not None
    assert found[0].item_ref == ItemRef(ROOT, 2)


def test_the_newest_version_of_an_object_is_that_of_the_newest_manifest(catalog: Catalog) -> None:
    b = catalog.newest_version(ObjectName("pictures", "train/images/b.jpg"))
    assert b is not None
    assert b.generation == 2
    assert catalog.newest_version(ObjectName("pictures", "train/images/a.jpg")) is None
    assert catalog.newest_version(ObjectName("elsewhere", "train/images/b.jpg")) is None


def test_an_earlier_manifest_is_found_and_does_not_become_the_newest(catalog: Catalog) -> None:
    earlier = manifest_of("xyz")
    history = catalog.add_earlier(catalog.assign_numbers(earlier))
    assert history is catalog.history(ROOT)
    assert catalog.newest_manifest(ROOT) is SECOND
    assert catalog.find_manifest(ROOT, earlier.digest) is not None
    assert history.end == 6
