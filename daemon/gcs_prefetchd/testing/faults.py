"""Faults, and the plan that decides which request gets which. Pure.

Two families: faults that change the response (`alter`), and faults in how a response is delivered.
"""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from gcs_prefetchd.testing.counters import Kind

__all__ = [
    "Close",
    "Cut",
    "DeliveryFault",
    "Drip",
    "EmptyBody",
    "Fault",
    "FaultPlan",
    "FlippedByte",
    "HtmlPage",
    "LongBody",
    "MalformedHash",
    "MissingHash",
    "Partial",
    "Reset",
    "ResponseFault",
    "Rule",
    "Stall",
    "Status",
    "WrongGeneration",
]


def _at_least(field: str, value: float | None, bound: int) -> None:
    if value is not None and value < bound:
        raise ValueError(f"{field}: {value} is less than {bound}")


@dataclass(frozen=True, slots=True)
class Status:
    """A different status, such as 503 or 429, with an optional `Retry-After`, `Location` (of a redirect) and body."""

    status: int
    retry_after: str | None = None
    body: str = ""
    content_type: str = "text/plain; charset=UTF-8"
    location: str | None = None

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599:
            raise ValueError(f"status: {self.status} is not a final HTTP status")


@dataclass(frozen=True, slots=True)
class FlippedByte:
    """The right length and headers, but one bit is wrong; in the middle unless `at` names the byte (or the last one)."""

    at: int | None = None

    def __post_init__(self) -> None:
        _at_least("at", self.at, 0)


@dataclass(frozen=True, slots=True)
class LongBody:
    """The body is longer than the object, and so is its Content-Length."""

    extra_bytes: int = 1

    def __post_init__(self) -> None:
        _at_least("extra_bytes", self.extra_bytes, 1)


@dataclass(frozen=True, slots=True)
class EmptyBody:
    """200 with the object's headers and no byte of it."""


@dataclass(frozen=True, slots=True)
class Partial:
    """206 with bytes `first` to `last` of the body, whatever range was requested."""

    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        _at_least("first", self.first, 0)
        _at_least("last", self.last, self.first)


@dataclass(frozen=True, slots=True)
class MissingHash:
    """No `x-goog-hash` header."""


@dataclass(frozen=True, slots=True)
class MalformedHash:
    """An `x-goog-hash` header that cannot be parsed."""

    value: str = "crc32c=!!!!,md5"


@dataclass(frozen=True, slots=True)
class WrongGeneration:
    """A wrong generation in `x-goog-generation`; by default the object's plus one."""

    generation: int | None = None


@dataclass(frozen=True, slots=True)
class HtmlPage:
    """200 with an HTML page, as a captive portal or a proxy sends it."""

    body: str = "<!doctype html><title>Sign in</title><p>Please sign in to use this network.</p>"


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection is closed cleanly after `after_bytes` of the body.

    `framing` is what the headers promised: a Content-Length, chunks, or a body that ends with the connection, as every body of
    an HTTP/1.0 proxy does.
    """

    after_bytes: int
    framing: Literal["length", "chunked", "close", "http/1.0"] = "length"

    def __post_init__(self) -> None:
        _at_least("after_bytes", self.after_bytes, 0)


@dataclass(frozen=True, slots=True)
class Stall:
    """The server sends nothing after `after_bytes` of the body (None: not even headers) until its `release()`."""

    after_bytes: int | None = 0

    def __post_init__(self) -> None:
        _at_least("after_bytes", self.after_bytes, 0)


@dataclass(frozen=True, slots=True)
class Drip:
    """The body arrives `piece_bytes` at a time, each piece after `interval_s`."""

    piece_bytes: int = 1
    interval_s: float = 0.1

    def __post_init__(self) -> None:
        _at_least("piece_bytes", self.piece_bytes, 1)
        _at_least("interval_s", self.interval_s, 0)


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection is reset (RST) after `after_bytes` of the body (None: before the headers)."""

    after_bytes: int | None = None

    def __post_init__(self) -> None:
        _at_least("after_bytes", self.after_bytes, 0)


@dataclass(frozen=True, slots=True)
class Close:
    """The connection is closed cleanly without a response."""


ResponseFault = Status | FlippedByte | LongBody | EmptyBody | Partial | MissingHash | MalformedHash | WrongGeneration | HtmlPage
DeliveryFault = Cut | Stall | Drip | Reset | Close
Fault = ResponseFault | DeliveryFault


@dataclass(frozen=True, slots=True)
class Rule:
    """Which requests get a fault: those of a kind, for matching objects, by their number."""

    fault: Fault
    object: str = "*"  # a shell pattern for `bucket/name`, in which * matches slashes too
    kind: Kind = Kind.MEDIA
    requests: Container[int] | None = None  # counted from 1; None selects every request
    together: bool = False  # count all matching requests together, not those of each object


class FaultPlan:
    """Rules in the order they were added; the first that applies to a request decides.

    Each rule counts the matching requests since it was added, so `requests={1}` is always the next one.
    """

    def __init__(self) -> None:
        self._rules: list[tuple[Rule, Counter[str]]] = []

    def add(
        self,
        fault: Fault,
        object: str = "*",  # noqa: A002 - the field's word
        *,
        kind: Kind | str = Kind.MEDIA,
        requests: Container[int] | int | None = None,
        together: bool = False,
    ) -> Rule:
        """Add a rule: `fault` hits the requests for `object` (a pattern for `bucket/name`) numbered in `requests`.

        `requests` is one number, a set or a range of numbers from 1, or None for every request. With a pattern
        each object's requests are counted separately, or with `together` all in one sequence. The object of a
        listing is its bucket.
        """
        numbers = {requests} if isinstance(requests, int) else requests
        rule = Rule(fault, object, Kind(kind), numbers, together)
        self.append(rule)
        return rule

    def append(self, rule: Rule) -> None:
        """Add an existing rule."""
        self._rules.append((rule, Counter()))

    def clear(self) -> None:
        """Remove all rules."""
        self._rules.clear()

    def next(self, kind: Kind, key: str) -> Fault | None:
        """Return the fault that the next request of this kind for `key` (`bucket/name`) gets, and count the request."""
        decided: Fault | None = None
        for rule, seen in self._rules:
            if rule.kind is not kind or not (rule.object == key or fnmatchcase(key, rule.object)):
                continue
            row = "" if rule.together else key
            seen[row] += 1
            if decided is None and (rule.requests is None or seen[row] in rule.requests):
                decided = rule.fault
        return decided
