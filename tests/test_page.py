"""The page at `/`."""

from html.parser import HTMLParser
from typing import Any

import pytest

from gcs_prefetchd.page import render_page

STREAM = {
    "id": "job/0",
    "data_root": "gs://pictures/train",
    "epoch": 3,
    "position": 12345,
    "length": 50000,
    "runway_items": 512,
}
HOSTILE = "<script>alert('x')</script>&\"{0}{streams}%s\n"


def snapshot(**changes: Any) -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "uptime_s": 86400.5,
        "cache": {"bytes": 1_500_000_000, "limit_bytes": 200 * 10**9, "objects": 1234567, "evictions": 42},
        "reads": {"hits": 9000, "misses": 800, "fallbacks": 200, "hit_ratio": 0.9, "wait_s": 12.34},
        "origin": {"requests": 10000, "bytes": 10**9, "errors": {"503": 7, "timeout": 1200}, "in_flight": 128},
        "prefetch": {"fetched": 5000, "demand_fetched": 800, "runway_items": 512},
        "streams": [STREAM],
    } | changes


class Page(HTMLParser):
    """What a browser sees: the texts, and whether every element was closed where it should be."""

    VOID = ("meta", "br", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_every_element_is_closed_where_it_should_be() -> None:
    page = Page(render_page(snapshot()))
    assert page.open == []
    assert page.tags.count("html") == page.tags.count("body") == page.tags.count("h1") == 1
    assert render_page(snapshot()).startswith("<!doctype html>")


def test_numbers_are_shown_with_their_units() -> None:
    texts = Page(render_page(snapshot())).texts
    for shown in (
        "1.5 GB of 200 GB in 1,234,567 objects",
        "42 objects",
        "9,000 hits, 800 misses, 200 fallbacks",
        "90.0%",
        "12.3 s, summed over readers",
        "10,000 requests, 1.0 GB",
        "128",
        "7 503, 1,200 timeout",
        "5,000 objects; 800 while a reader waited",
        "512 items",
        "86,400 s",
        "0.1.0",
    ):
        assert shown in texts


def test_every_stream_has_its_row() -> None:
    page = Page(render_page(snapshot(streams=[STREAM, STREAM | {"id": "job/1", "position": 0}])))
    assert [text for text in page.texts if text.startswith("job/")] == ["job/0", "job/1"]
    assert "12,345 of 50,000" in page.texts
    assert "0 of 50,000" in page.texts
    assert page.texts.count("gs://pictures/train") == 2


def test_without_streams_and_errors_it_is_a_page_too() -> None:
    page = Page(render_page(snapshot(streams=[], origin=snapshot()["origin"] | {"errors": {}})))
    assert page.open == []
    assert "none" in page.texts


@pytest.mark.parametrize(
    "changes",
    [
        {"version": HOSTILE},
        {"streams": [STREAM | {"id": HOSTILE}]},
        {"streams": [STREAM | {"data_root": HOSTILE}]},
        {"origin": snapshot()["origin"] | {"errors": {HOSTILE: 1}}},
    ],
    ids=["version", "stream", "data root", "error"],
)
def test_what_comes_from_outside_is_text_and_nothing_else(changes: dict[str, Any]) -> None:
    page = Page(render_page(snapshot(**changes)))
    assert page.tags == Page(render_page(snapshot())).tags
    assert page.open == []
    assert HOSTILE.strip() in "".join(page.texts)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """Nodes have no way out, and a page of numbers needs no script."""
    text = render_page(snapshot())
    assert "<script" not in text
    assert "http://" not in text
    assert "https://" not in text
