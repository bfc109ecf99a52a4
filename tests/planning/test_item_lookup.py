"""Which part of an item is stored at a path, and which parts are remembered."""

import pytest

from gcs_prefetchd.planning.catalog import Catalog
from gcs_prefetchd.planning.item_lookup import MAX_REMEMBERED, ItemLookup
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, build_manifest
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path
from support.plans import manifest_of_many

ROOT = DataRoot.parse("gs://pictures/train")


def listed(*ids: str) -> Manifest:
    names = [f"train/{part}" for item in ids for part in (f"images/{item}.jpg", f"labels/{item}.png")]
    return build_manifest(ROOT, ItemPatterns(), (ObjectVersion(ObjectName("pictures", name), 1, 10, 7) for name in names))


def path_of(name: str) -> str:
    return cache_path("pictures", f"train/{name}")


@pytest.fixture
def catalog() -> Catalog:
    catalog = Catalog()
    catalog.add_newest(catalog.assign_numbers(listed("a", "b")))
    return catalog


def test_a_path_is_found_as_a_part_of_an_item(catalog: Catalog) -> None:
    lookup = ItemLookup(catalog)
    assert lookup.locate(path_of("images/b.jpg")) == (ROOT.uri, 1, 0)
    assert lookup.locate(path_of("labels/b.png")) == (ROOT.uri, 1, 1)
    assert lookup.locate_object(ObjectName("pictures", "train/labels/a.png"), path_of("labels/a.png")) == (ROOT.uri, 0, 1)


def test_a_path_that_no_manifest_names_belongs_to_no_item(catalog: Catalog) -> None:
    lookup = ItemLookup(catalog)
    for path in (path_of("images/c.jpg"), path_of("readme%f"), cache_path("others", "train/images/a.jpg"), "nonsense%"):
        assert lookup.locate(path) is None


def test_the_paths_of_an_item_are_those_of_the_parts_in_the_bit_set(catalog: Catalog) -> None:
    lookup = ItemLookup(catalog)
    assert lookup.paths(ROOT.uri, 1) == [path_of("images/b.jpg"), path_of("labels/b.png")]
    assert lookup.paths(ROOT.uri, 1, 0b10) == [path_of("labels/b.png")]


def test_the_parts_of_an_item_whose_paths_were_requested_are_remembered_until_they_are_forgotten(catalog: Catalog) -> None:
    lookup = ItemLookup(catalog)
    image, label = lookup.paths(ROOT.uri, 1)
    assert image in lookup
    assert label in lookup
    lookup.forget(image)
    assert image not in lookup
    assert lookup.locate(image) == (ROOT.uri, 1, 0)
    lookup.clear()
    assert label not in lookup


def test_the_parts_of_an_item_whose_versions_were_requested_are_remembered(catalog: Catalog) -> None:
    lookup = ItemLookup(catalog)
    assert [version.name.name for version in lookup.versions(ROOT.uri, 0)] == ["train/images/a.jpg", "train/labels/a.png"]
    assert path_of("images/a.jpg") in lookup
    assert path_of("labels/a.png") in lookup


def test_an_item_that_the_newest_manifest_lacks_has_its_last_versions_or_none(catalog: Catalog) -> None:
    catalog.add_newest(catalog.assign_numbers(listed("a")))
    lookup = ItemLookup(catalog)
    assert len(lookup.versions(ROOT.uri, 1)) == 2
    assert lookup.versions(ROOT.uri, 1, newest_manifest_only=True) == []


def test_the_number_of_remembered_parts_is_limited() -> None:
    catalog, items = Catalog(), MAX_REMEMBERED // 2 + 2
    catalog.add_newest(catalog.assign_numbers(manifest_of_many(items)))
    lookup = ItemLookup(catalog)
    paths = [path for item in range(items) for path in lookup.paths(ROOT.uri, item)]
    assert len(paths) == MAX_REMEMBERED + 4
    assert sum(path in lookup for path in paths) < len(paths)
