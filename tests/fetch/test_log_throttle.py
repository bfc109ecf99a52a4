"""Log lines that would repeat: the first is logged, and then how many more there were."""

import asyncio
import logging
from collections.abc import Iterator

import pytest

from gcs_prefetchd.fetch.log_throttle import LogThrottle

SOON_S, NEVER_S = 0.05, 3600.0


class Logged(logging.Handler):
    """The lines that were logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put_nowait(record.getMessage())


@pytest.fixture
def logged() -> Iterator[Logged]:
    handler, log = Logged(), logging.getLogger(__name__)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


def throttle(period_s: float) -> LogThrottle:
    return LogThrottle(logging.getLogger(__name__), period_s)


async def test_the_first_of_each_kind_is_logged_at_once_and_the_others_are_counted(logged: Logged) -> None:
    counting = throttle(NEVER_S)
    assert [counting.warn(kind, f"{kind}{n}") for n in range(3) for kind in "ab"] == [True, True, *[False] * 4]
    assert [logged.lines.get_nowait() for _ in range(logged.lines.qsize())] == ["a0", "b0"]
    counting.close()
    last = [logged.lines.get_nowait() for _ in range(logged.lines.qsize())]
    assert last == [f"{kind}2; 1 more like it since the line before" for kind in "ab"]


async def test_the_number_of_withheld_lines_is_logged_when_the_period_ends(logged: Logged) -> None:
    counting = throttle(SOON_S)
    for n in range(1235):
        counting.warn("a", f"a{n}")
    assert [await logged.lines.get(), await logged.lines.get()] == ["a0", "a1234; 1,233 more like it since the line before"]
    assert not counting.warn("a", "a1235")  # that line starts the next period
    assert await logged.lines.get() == "a1235"
    counting.close()


async def test_after_a_quiet_period_the_next_line_is_logged_at_once(logged: Logged) -> None:
    quiet, over = throttle(SOON_S), asyncio.Event()
    assert quiet.warn("a", "a0")
    asyncio.get_running_loop().call_later(2 * SOON_S, over.set)
    await over.wait()
    assert quiet.warn("a", "a1")
    quiet.close()


async def test_close_logs_nothing_twice_and_nothing_later(logged: Logged) -> None:
    closed = throttle(SOON_S)
    closed.warn("a", "a0")
    closed.close()
    closed.close()
    assert logged.lines.qsize() == 1
    assert closed.warn("a", "a1")
    closed.close()
