"""Listings are paged as GCS pages them, whatever the names and the size of a page."""

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.testing.listing import ListQuery, list_page

NAMES = st.lists(st.text("ab/é\U0001f600", min_size=1, max_size=6), max_size=40, unique=True).map(sorted)
OFFSETS = st.text("ab/é", max_size=3)


def all_pages(names: list[str], max_results: int, **query: str) -> list[tuple[list[str], list[str]]]:
    pages, token = [], ""
    while True:
        page = list_page(names, ListQuery(max_results=max_results, page_token=token, **query))  # type: ignore[arg-type]
        assert page is not None
        pages.append((list(page.names), list(page.prefixes)))
        if page.next_page_token is None:
            return pages
        token = page.next_page_token


@given(NAMES, OFFSETS, OFFSETS, OFFSETS, st.integers(1, 7))
def test_pages_of_any_size_hold_each_name_within_the_bounds_once_and_in_order(
    names: list[str], prefix: str, start: str, end: str, size: int
) -> None:
    """Prefix, inclusive start and exclusive end bound the listing; a full page that ends it has no successor."""
    pages = all_pages(names, size, prefix=prefix, start_offset=start, end_offset=end)
    wanted = [name for name in names if name.startswith(prefix) and name >= start and (not end or name < end)]
    assert [name for page, _ in pages for name in page] == wanted
    assert [len(page) for page, _ in pages[:-1]] == [size] * (len(pages) - 1)
    assert len(pages) == max(1, -(-len(wanted) // size))


@given(NAMES, st.sampled_from(["", "a", "a/", "b/a"]), st.sampled_from(["/", "b", "//"]), st.integers(1, 7))
def test_names_that_share_a_delimiter_are_one_prefix_whatever_the_pages(
    names: list[str], prefix: str, delimiter: str, size: int
) -> None:
    """Each "folder" is listed once, none is split by a page's end, and both kinds fill the page together."""
    pages = all_pages(names, size, prefix=prefix, delimiter=delimiter)
    within = [name for name in names if name.startswith(prefix)]

    def folder(name: str) -> str:
        head, found, _ = name[len(prefix) :].partition(delimiter)
        return prefix + head + found if found else ""

    plain = [name for name in within if not folder(name)]
    assert [name for page, _ in pages for name in page] == plain
    folders = [key for key, _ in groupby(folder(name) for name in within if folder(name))]
    assert [name for _, page in pages for name in page] == folders
    assert all(len(found) + len(prefixes) == size for found, prefixes in pages[:-1])


def test_a_page_never_holds_more_than_a_thousand_names() -> None:
    """As in GCS, requesting more has no effect."""
    names = [f"{number:04}" for number in range(2001)]
    assert [len(page) for page, _ in all_pages(names, 5000)] == [1000, 1000, 1]


def test_an_invalid_page_token_is_refused() -> None:
    assert list_page(["a"], ListQuery(page_token="?")) is None
    assert list_page(["a"], ListQuery(page_token="_w==")) is None


def test_a_token_is_still_valid_after_its_name_was_deleted() -> None:
    """Objects deleted between two pages do not shift the others."""
    first = list_page(["a", "b", "c"], ListQuery(max_results=2))
    assert first is not None
    rest = list_page(["a", "c"], ListQuery(max_results=2, page_token=first.next_page_token or ""))
    assert rest is not None
    assert rest.names == ("c",)


def test_a_folder_that_is_an_object_too_is_listed_with_its_trailing_delimiter_on_request() -> None:
    names = ["d/", "d/e", "f"]
    plain = list_page(names, ListQuery(delimiter="/"))
    both = list_page(names, ListQuery(delimiter="/", include_trailing_delimiter=True))
    inside = list_page(names, ListQuery(delimiter="/", prefix="d/"))
    assert plain is not None
    assert both is not None
    assert inside is not None
    assert (plain.names, plain.prefixes) == (("f",), ("d/",))
    assert (both.names, both.prefixes) == (("d/", "f"), ("d/",))
    assert (inside.names, inside.prefixes) == (("d/", "d/e"), ())
