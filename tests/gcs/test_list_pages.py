"""A page of a listing is parsed into columns, or raises an error that names the entry."""

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.gcs.list_pages import parse_page, without_folder_placeholders
from gcs_prefetchd.gcs.responses import UnusableResponseError
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion


def item(name: str = "a.jpg", **changes: Any) -> dict[str, Any]:
    return {"name": name, "generation": "17", "size": "5", "crc32c": "AAAAAA=="} | changes


numbers = st.integers(0, 2**63 - 1)
names = st.builds(ObjectName, st.just("b"), st.text(max_size=5))
versions = st.builds(ObjectVersion, names, numbers, numbers, st.none() | st.integers(0, 2**32 - 1))


@given(st.lists(versions))
def test_every_entry_is_in_the_columns(listed: list[ObjectVersion]) -> None:
    items = []
    for version in listed:
        one = item(version.name.name, generation=str(version.generation), size=str(version.size))
        del one["crc32c"]
        if version.crc32c is not None:
            one["crc32c"] = base64.b64encode(version.crc32c.to_bytes(4)).decode()
        items.append(one)
    objects, token = parse_page({"items": items, "nextPageToken": "more"})
    assert list(objects.versions("b")) == listed
    assert token == "more"


@pytest.mark.parametrize("page", [{}, {"items": []}, {"nextPageToken": None}])
def test_a_page_without_entries_is_empty_and_the_last(page: dict[str, Any]) -> None:
    objects, token = parse_page(page)
    assert (len(objects), token) == (0, "")


@pytest.mark.parametrize("page", [[], "items", None, 7, {"items": 7}, {"items": None}])
def test_a_page_that_is_not_a_listing_is_refused(page: object) -> None:
    with pytest.raises(UnusableResponseError, match="the page is not a listing"):
        parse_page(page)


INVALID: list[Any] = [
    {"name": "bad"},
    item("bad", generation="-1"),
    item("bad", size="-1"),
    item("bad", generation=str(2**63)),
    item("bad", generation="x"),
    item("bad", size=None),
    item("bad\ud800"),
    item("bad") | {"name": 7},
    "bad",
    None,
    *(
        item("bad", crc32c=crc)
        for crc in ("", "AAAAA==", "AAAAAAA==", "AAAAAAAA", "AA==AAAA", "A?AAAA==", "AAAAA===", "äAAAAA==", 7)
    ),
]


@pytest.mark.parametrize("bad", INVALID, ids=repr)
def test_an_invalid_entry_is_named(bad: object) -> None:
    with pytest.raises(UnusableResponseError, match="an entry lacks name, generation or size: ") as error:
        parse_page({"items": [item("good"), bad, item("good too")]})
    assert str(bad)[:200] in str(error.value)
    assert error.value.final is None  # a retry may return a complete page


def test_hashes_of_wrong_lengths_that_add_up_are_refused() -> None:
    with pytest.raises(UnusableResponseError):
        parse_page({"items": [item("a", crc32c="AAAAA=="), item("b", crc32c="AAAAAAA==")]})


def test_folder_placeholders_are_left_out() -> None:
    objects, _ = parse_page({"items": [item("images/"), item("images/a.jpg", size="7"), item("images/b/")]})
    (version,) = without_folder_placeholders(objects).versions("b")
    assert (version.name.name, version.size) == ("images/a.jpg", 7)
