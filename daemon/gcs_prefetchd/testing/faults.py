"""Faults and the plan that decides which request meets which: pure, no I/O.

Two families: faults that change what is answered (`alter`), and faults in how an answer is delivered.
"""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from gcs_prefetchd.testing.counters import Kind

__all__ = [
    "AnswerFault",
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
    """Another status, such as 503 or 429, with an optional `Retry-After`, `Location` (of a redirect) and body."""

    status: int
    retry_after: str | None = None
    body: str = ""
    content_type: str = "text/plain; charset=UTF-8"
    location: str | None = None

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599:
            raise ValueError(f"status: {self.status} is no final HTTP status")


@dataclass(frozen=True, slots=True)
class FlippedByte:
    """The right length and headers, but one bit is wrong; in the middle unless `at` says which byte (or the last)."""

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
    """206 with bytes `first` to `last` of the body, whatever was asked for."""

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
    """An `x-goog-hash` header that is none."""

    value: str = "crc32c=!!!!,md5"


@dataclass(frozen=True, slots=True)
class WrongGeneration:
    """Another generation than the object's in `x-goog-generation`; by default one more."""

    generation: int | None = None


@dataclass(frozen=True, slots=True)
class HtmlPage:
    """200 with a page in HTML, as a captive portal or a proxy sends it."""

    body: str = "<!doctype html><title>Sign in</title><p>Please sign in to use this network.</p>"


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection is closed in order after `after_bytes` of the body.

    `framing` is what the headers promised: a Content-Length, chunks, or that the body ends with the connection, as all do
    of a proxy that speaks HTTP/1.0.
    """

    after_bytes: int
    framing: Literal["length", "chunked", "close", "http/1.0"] = "length"

    def __post_init__(self) -> None:
        _at_least("after_bytes", self.after_bytes, 0)


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing comes after `after_bytes` of the body (None: not even headers) until the server's `release()`."""

    after_bytes: int | None = 0

    def __post_init__(self) -> None:
        _at_least("after_bytes", self.after_bytes, 0)


@dataclass(frozen=True, slots=True)
class Drip:
    """The body comes `piece_bytes` at a time, each after `interval_s`."""

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
    """The connection is closed in order without an answer."""


AnswerFault = Status | FlippedByte | LongBody | EmptyBody | Partial | MissingHash | MalformedHash | WrongGeneration | HtmlPage
DeliveryFault = Cut | Stall | Drip | Reset | Close
Fault = AnswerFault | DeliveryFault


@dataclass(frozen=True, slots=True)
class Rule:
    """Which requests meet a fault: those of a kind, for objects that match, by their number."""

    fault: Fault
    object: str = "*"  # a shell pattern for `bucket/name`, in which * stands for slashes too
    kind: Kind = Kind.MEDIA
    requests: Container[int] | None = None  # counted from 1; None is every one
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
        """Add a rule: `fault` meets the requests for `object` (a pattern for `bucket/name`) numbered in `requests`.

        `requests` is one number, a set or a range of numbers from 1, or None for every request. With a pattern
        each object's requests are counted by themselves, or with `together` all in one row. The object of a
        listing is its bucket.
        """
        numbers = {requests} if isinstance(requests, int) else requests
        rule = Rule(fault, object, Kind(kind), numbers, together)
        self.append(rule)
        return rule

    def append(self, rule: Rule) -> None:
        """Add a rule that is already made."""
        self._rules.append((rule, Counter()))

    def clear(self) -> None:
        """Forget all rules."""
        self._rules.clear()

    def next(self, kind: Kind, key: str) -> Fault | None:
        """Return the fault that the next request of this kind for `key` (`bucket/name`) meets, and count it."""
        decided: Fault | None = None
        for rule, seen in self._rules:
            if rule.kind is not kind or not (rule.object == key or fnmatchcase(key, rule.object)):
                continue
            row = "" if rule.together else key
            seen[row] += 1
            if decided is None and (rule.requests is None or seen[row] in rule.requests):
                decided = rule.fault
        return decided
