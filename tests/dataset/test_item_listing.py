"""Items from names: their ids, and the parts that are missing."""

import logging

import pytest

from gcs_dataset.item_listing import Items, complete_items, ids_of_names, warn_of_incomplete
from gcs_prefetchd.shared.errors import ItemError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Ids


def test_ids_have_no_extension_and_placeholders_are_not_items() -> None:
    assert ids_of_names(["b.jpg", "a/", "a/7.jpg", "a/x.y.jpg"], "here") == ["a/7", "a/x.y", "b"]


def test_a_listing_without_items_is_named() -> None:
    with pytest.raises(ItemError, match="here: holds no items"):
        ids_of_names(["a/"], "here")


def test_two_names_with_one_id_are_both_named() -> None:
    with pytest.raises(ItemError, match=r"here: a/7\.jpg and a/7\.png have the same id 'a/7'"):
        ids_of_names(["a/7.jpg", "a/7.png"], "here")


def test_missing_parts_are_logged_once_with_the_first_names(caplog: pytest.LogCaptureFixture) -> None:
    missing = tuple(f"here/labels/{number}.png" for number in range(8))
    with caplog.at_level(logging.WARNING):
        warn_of_incomplete(Items(Ids.from_sorted(["a"]), missing), ItemPatterns(), "here")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("here: ")
    assert "here/labels/0.png" in line
    assert "and 3 more" in line


def test_without_any_item_the_error_names_the_patterns() -> None:
    with pytest.raises(ItemError, match=r"here: holds no item \(images/\{id\}\.jpg with labels/\{id\}\.png\)"):
        warn_of_incomplete(Items(Ids.from_sorted([]), ()), ItemPatterns(), "here")


def test_an_item_is_complete_with_all_its_parts() -> None:
    names = ["images/b.jpg", "labels/b.png", "images/a.jpg", "labels/c.png", "other/d.jpg", "labels/e/f.png", "images/e/f.jpg"]
    items = complete_items(names, ItemPatterns(), "here")
    assert list(items.ids) == ["b", "e/f"]
    assert items.incomplete == ("here/labels/a.png", "here/images/c.jpg")
