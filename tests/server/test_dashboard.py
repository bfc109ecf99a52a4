"""The page at `/`."""

from html.parser import HTMLParser
from typing import Any

import pytest

from gcs_prefetchd.server.dashboard import render_page
from gcs_prefetchd.server.wording import daemon_facts, stream_facts
from support.statistics import STREAM, snapshot

HOSTILE = "<script>alert('x')</script>&\"{0}{streams}%s\n"


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


def test_everything_in_the_summary_is_shown() -> None:
    texts = Page(render_page(snapshot())).texts
    for facts in (daemon_facts(snapshot()), stream_facts(STREAM)):
        assert {*facts, *facts.values()} <= set(texts)
    assert "0.1.0" in texts


def test_every_stream_has_a_table_of_its_own() -> None:
    page = Page(render_page(snapshot(streams=[STREAM, STREAM | {"id": "job/1", "position": 0, "epoch": 4}])))
    assert [text.strip() for text in page.texts if text.startswith("job/")] == ["job/0", "job/1"]
    assert "epoch 3 of gs://pictures/train" in page.texts
    assert "epoch 4 of gs://pictures/train" in page.texts
    assert page.tags.count("table") == 3
    assert page.tags.count("progress") == 2


def test_without_streams_and_errors_it_is_a_page_too() -> None:
    page = Page(render_page(snapshot(streams=[], origin=snapshot()["origin"] | {"errors": {}})))
    assert page.open == []
    assert {"none", "None yet."} <= set(page.texts)


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
