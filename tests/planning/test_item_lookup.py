"""Which item lies at a path, as the listings say, and which paths are about to come up."""

import pytest

from gcs_prefetchd.planning.item_lookup import REMEMBERED, Places
from gcs_prefetchd.planning.item_numbers import Catalog
from gcs_prefetchd.shared.item_patterns import Layout
from gcs_prefetchd.shared.manifest import Manifest, build_manifest
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path
from support.caches import content, version_of

ROOT = DataRoot.parse("gs://pictures/train")


def listed(*ids: str) -> Manifest:
    names = [f"train/{part}" for item in ids for part in (f"images/{item}.jpg", f"labels/{item}.png")]
    return build_manifest(ROOT, Layout(), (ObjectVersion(ObjectName("pictures", name), 1, 10, 7) for name in names))


def path_of(name: str) -> str:
    return cache_path("pictures", f"train/{name}")


@pytest.fixture
def catalogs() -> dict[str, Catalog]:
    catalog = Catalog()
    catalog.take(catalog.number(listed("a", "b")))
    return {ROOT.uri: catalog}


def test_a_path_is_that_of_a_part_of_an_item(catalogs: dict[str, Catalog]) -> None:
    places = Places(catalogs)
    assert places.locate(path_of("images/b.jpg")) == (ROOT.uri, 1, 0)
    assert places.locate(path_of("labels/b.png")) == (ROOT.uri, 1, 1)
    assert places.of(ObjectName("pictures", "train/labels/a.png"), path_of("labels/a.png")) == (ROOT.uri, 0, 1)


def test_what_no_listing_names_is_no_item(catalogs: dict[str, Catalog]) -> None:
    places = Places(catalogs)
    for path in (path_of("images/c.jpg"), path_of("readme%f"), cache_path("others", "train/images/a.jpg"), "nonsense%"):
        assert places.locate(path) is None


def test_where_an_item_lies_is_told_for_the_parts_that_are_asked_for(catalogs: dict[str, Catalog]) -> None:
    places, versions = Places(catalogs), catalogs[ROOT.uri].versions(1)
    assert places.paths(ROOT.uri, 1, versions) == [path_of("images/b.jpg"), path_of("labels/b.png")]
    assert places.paths(ROOT.uri, 1, versions, 0b10) == [path_of("labels/b.png")]


def test_what_was_asked_for_comes_up_soon_until_it_is_forgotten(catalogs: dict[str, Catalog]) -> None:
    places = Places(catalogs)
    image, label = places.paths(ROOT.uri, 1, catalogs[ROOT.uri].versions(1))
    assert image in places
    assert label in places
    places.forget(image)
    assert image not in places
    assert places.locate(image) == (ROOT.uri, 1, 0)
    places.clear()
    assert label not in places


def test_no_more_is_remembered_than_what_fits(catalogs: dict[str, Catalog]) -> None:
    places, data = Places(catalogs), content(1, 10)
    versions = [version_of(f"{number}.jpg", data) for number in range(REMEMBERED + 2)]
    for number, version in enumerate(versions):
        places.paths(ROOT.uri, number, [version])
    assert sum(cache_path(one.name.bucket, one.name.name) in places for one in versions) < len(versions)
