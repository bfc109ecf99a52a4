"""The page at `/`."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from gcs_prefetchd.server.dashboard import render_page
from gcs_prefetchd.server.statistics import Statistics
from gcs_prefetchd.server.statistics_summary import summarize, summarize_stream
from support.statistics import STATISTICS, STREAM

HOSTILE = "<script>alert('x')</script>&\"{0}{streams}%s\n"


class Page(HTMLParser):
    """The page as a browser parses it: its texts, and the elements that are still open."""

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


def test_every_element_is_closed_in_the_right_order() -> None:
    page = Page(render_page(STATISTICS))
    assert page.open == []
    assert page.tags.count("html") == page.tags.count("body") == page.tags.count("h1") == 1
    assert render_page(STATISTICS).startswith("<!doctype html>")


def test_the_page_shows_the_complete_summary() -> None:
    texts = Page(render_page(STATISTICS)).texts
    for summary in (summarize(STATISTICS), summarize_stream(STREAM)):
        assert {*summary, *summary.values()} <= set(texts)
    assert "0.1.0" in texts


def test_every_stream_has_a_table_of_its_own() -> None:
    page = Page(render_page(replace(STATISTICS, streams=(STREAM, replace(STREAM, id="job/1", position=0, epoch=4)))))
    assert [text.strip() for text in page.texts if text.startswith("job/")] == ["job/0", "job/1"]
    assert "epoch 3 of gs://pictures/train" in page.texts
    assert "epoch 4 of gs://pictures/train" in page.texts
    assert page.tags.count("table") == 3
    assert page.tags.count("progress") == 2


def test_a_daemon_without_streams_and_errors_has_a_page() -> None:
    page = Page(render_page(replace(STATISTICS, streams=(), origin=replace(STATISTICS.origin, errors={}))))
    assert page.open == []
    assert {"none", "None yet."} <= set(page.texts)


@pytest.mark.parametrize(
    "statistics",
    [
        replace(STATISTICS, version=HOSTILE),
        replace(STATISTICS, streams=(replace(STREAM, id=HOSTILE),)),
        replace(STATISTICS, streams=(replace(STREAM, data_root=HOSTILE),)),
        replace(STATISTICS, origin=replace(STATISTICS.origin, errors={HOSTILE: 1})),
    ],
    ids=["version", "stream", "data root", "error"],
)
def test_text_from_outside_is_escaped(statistics: Statistics) -> None:
    page = Page(render_page(statistics))
    assert page.tags == Page(render_page(STATISTICS)).tags
    assert page.open == []
    assert HOSTILE.strip() in "".join(page.texts)


def test_the_page_loads_nothing_from_other_hosts() -> None:
    """Nodes may have no internet access, and a page of numbers needs no script."""
    text = render_page(STATISTICS)
    assert "<script" not in text
    assert "http://" not in text
    assert "https://" not in text
