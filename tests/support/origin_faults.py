"""The faults of GCS that pass: another attempt downloads the object's bytes."""

from gcs_prefetchd.testing import (
    Close,
    Cut,
    Drip,
    EmptyBody,
    Fault,
    FlippedByte,
    HtmlPage,
    LongBody,
    Partial,
    Reset,
    Stall,
    Status,
)

DATA = bytes(range(256)) * 400
FIRST = 65_536  # bytes sent before the fault
HUGE = "x" * 30_000_000

RETRIED = (408, 429, 500, 502, 503, 504)
PASSING: list[Fault] = [
    FlippedByte(),
    FlippedByte(0),
    Cut(FIRST),
    Cut(FIRST, "chunked"),
    Cut(FIRST, "close"),
    Cut(FIRST, "http/1.0"),
    Cut(0),
    LongBody(),
    LongBody(len(HUGE)),
    Partial(0, FIRST - 1),
    Partial(0, len(DATA) - 1),
    *map(Status, (204, 206, 301, 302, 303, 304, 307, 308)),
    EmptyBody(),
    HtmlPage(),
    HtmlPage("<" * len(DATA)),
    Reset(),
    Reset(FIRST),
    Close(),
    Stall(None),
    Stall(FIRST),
    Drip(1, 0.1),
    *map(Status, RETRIED),
]
