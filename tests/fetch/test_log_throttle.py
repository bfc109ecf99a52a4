"""Lines that would repeat: the first is said, and then how many more there are."""

import asyncio
import logging
from collections.abc import Iterator

import pytest

from gcs_prefetchd.fetch.log_throttle import Repeats

SOON_S, NEVER_S = 0.05, 3600.0


class Said(logging.Handler):
    """What is logged, as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put_nowait(record.getMessage())


@pytest.fixture
def said() -> Iterator[Said]:
    handler, log = Said(), logging.getLogger(__name__)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


def repeats(every_s: float) -> Repeats:
    return Repeats(logging.getLogger(__name__), every_s)


async def test_the_first_of_each_kind_is_said_at_once_and_the_others_are_counted(said: Said) -> None:
    said_at_once = repeats(NEVER_S)
    assert [said_at_once.warn(kind, f"{kind}{n}") for n in range(3) for kind in "ab"] == [True, True, *[False] * 4]
    assert [said.lines.get_nowait() for _ in range(said.lines.qsize())] == ["a0", "b0"]
    said_at_once.close()
    last = [said.lines.get_nowait() for _ in range(said.lines.qsize())]
    assert last == [f"{kind}2; 1 more like it since the line before" for kind in "ab"]


async def test_how_many_more_there_are_is_said_when_the_time_is_over(said: Said) -> None:
    counting = repeats(SOON_S)
    for n in range(1235):
        counting.warn("a", f"a{n}")
    assert [await said.lines.get(), await said.lines.get()] == ["a0", "a1234; 1,233 more like it since the line before"]
    assert not counting.warn("a", "a1235")  # the time begins anew with that line
    assert await said.lines.get() == "a1235"
    counting.close()


async def test_after_a_quiet_time_the_next_is_said_at_once(said: Said) -> None:
    quiet, over = repeats(SOON_S), asyncio.Event()
    assert quiet.warn("a", "a0")
    asyncio.get_running_loop().call_later(2 * SOON_S, over.set)
    await over.wait()
    assert quiet.warn("a", "a1")
    quiet.close()


async def test_closing_says_nothing_twice_and_nothing_later(said: Said) -> None:
    closed = repeats(SOON_S)
    closed.warn("a", "a0")
    closed.close()
    closed.close()
    assert said.lines.qsize() == 1
    assert closed.warn("a", "a1")
    closed.close()
