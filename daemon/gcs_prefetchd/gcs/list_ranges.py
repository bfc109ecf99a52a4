"""Splits a listing into ranges of names that are listed in parallel. Pure: it sends no requests.

GCS returns a listing one page after another, and the distribution of its names is unknown. So the listing starts as one range.
Whenever more pages could be requested in parallel, the range with the most pages left is split in two, and an idle requester
gets the right half (work stealing, Blumofe and Leiserson, 1999). Names are compared as GCS sorts them, by their UTF-8 bytes,
which is the order of their code points and so that of `str`.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isqrt
from operator import lt
from string import ascii_uppercase, digits
from sys import maxunicode

from gcs_prefetchd.gcs.responses import UnusableResponseError
from gcs_prefetchd.shared.errors import OriginError

__all__ = ["ListingRanges", "PageRequest", "split_point"]

# A split wastes at most one request: the right half is empty, or the last page of the left half overlaps the right one. So the
# pages bound the splits: few for a small listing, and at most one for about ten pages of a large one.
SPLITS_PER_PAGE_AT_FIRST = 2
SPLITS_AT_FIRST = 24
PAGES_PER_SPLIT = 12
# One page is in flight and two will soon be requested: a shorter range is not worth another request.
MIN_PAGES_TO_SPLIT = 4
DEPTH = 8  # characters after the first in which two names differ: enough to halve the range between them 30 times
SAMPLE_EVERY = 7  # names; their characters form the alphabet. 7 divides no base that people count in
FIRST_SURROGATE, AFTER_SURROGATES = 0xD800, 0xE000  # the code points between are not characters
MAX_EMPTY_PAGES_IN_A_ROW = 1000  # GCS may send some, each with another token


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A request for one page. All pages of a range have the same bounds, as GCS demands with a page token."""

    start: str  # inclusive; "" for the start of the listing
    end: str  # exclusive; "" for the end of the listing
    token: str = ""


@dataclass(slots=True, eq=False)
class _Range:
    start: str
    requested_end: str
    end: str  # moves to the left with every split
    known_from: str  # the names are known from here up to its start
    token: str = ""
    first: str = ""
    last: str = ""
    reached: str = ""  # the last name on its pages: it may be beyond `end`, or before `start` if the server ignores bounds
    pages: int = 0
    is_dense: bool = False  # names are known to continue right up to `end`
    pages_left: int = 0
    tokens: set[str] = field(default_factory=set)  # of the pages since the last name


class ListingRanges:
    """The ranges of a prefix's listing: `next_requests` returns the pages to request, `add_page` adds a page received.

    `alphabet` holds the characters seen in names and those likely to appear with them. Split points use only these.
    """

    def __init__(self, prefix: str = "") -> None:
        self.alphabet: list[str] = []
        self._open = [_Range("", "", _after_prefix(prefix), "")]
        self._seen = set(self._open[0].end)  # bounds can be ordered among the names only by characters of the alphabet
        self._ready = list(self._open)
        self._in_flight: dict[PageRequest, _Range] = {}
        self._pages = 0
        self._splits = 0

    def next_requests(self, max_requests: int) -> Iterator[PageRequest]:
        """The pages to request now. The listing is complete when there are none and none is in flight."""
        for _ in range(max_requests):
            if not self._ready and (right := self._split()) is not None:
                self._ready.append(right)
            if not self._ready:
                return
            chosen = self._ready.pop(0)
            request = PageRequest(chosen.start, chosen.requested_end, chosen.token)
            self._in_flight[request] = chosen
            yield request

    def add_page(self, request: PageRequest, names: Sequence[str], token: str) -> slice:
        """Return which of the page's names are new; the others belong to another range.

        `token` is the next page's, "" after the last page. Raises UnusableResponseError if the listing makes no progress.
        """
        listed = self._in_flight.pop(request)
        _check_order(listed, names, token)
        kept = slice(bisect_left(names, listed.start), bisect_left(names, listed.end) if listed.end else len(names))
        if names:
            listed.reached = names[-1]
            listed.tokens.clear()
        if own := names[kept]:
            self._learn(listed, own)
        listed.token = token
        if not token or (names and listed.end and names[-1] >= listed.end):
            self._open.remove(listed)
        else:
            self._ready.append(listed)
            self._estimate(listed)
        return kept

    def _learn(self, listed: _Range, names: Sequence[str]) -> None:
        self._pages += 1
        listed.pages += 1
        listed.last = names[-1]
        if not self._seen.issuperset(seen := set().union(names[-1], *names[::SAMPLE_EVERY])):
            self._seen |= seen
            self.alphabet = sorted(self._seen | _likely(self._seen))
        if listed.pages == 1:
            listed.first = names[0]
            listed.known_from = listed.known_from or names[0]
            self._update_left_neighbour(listed)

    def _update_left_neighbour(self, listed: _Range) -> None:
        """If the names of a range start close to its start, those of the range before it continue up to their common bound."""
        start, first, last = _numbers([listed.start, listed.first, listed.last], self.alphabet)
        for left in self._open:
            if left.end and left.end == listed.start:
                left.is_dense = first - start <= last - first
                self._estimate(left)

    def _estimate(self, one: _Range) -> None:
        one.pages_left = 0
        if one.pages:
            first, last, end = _numbers([one.first, one.last, one.end or None], self.alphabet)
            one.pages_left = one.pages * (end - last) // max(1, last - first)

    def _split(self) -> _Range | None:
        """Split the range with the most pages left. Returns the right half, or None if no split is worth its request."""
        if self._splits >= min(SPLITS_PER_PAGE_AT_FIRST * self._pages, SPLITS_AT_FIRST + self._pages // PAGES_PER_SPLIT):
            return None
        for widest in sorted(self._open, key=lambda one: one.pages_left, reverse=True):
            if widest.pages_left < MIN_PAGES_TO_SPLIT:
                return None
            point = split_point(widest.known_from, widest.last, widest.end, self.alphabet, is_dense=widest.is_dense)
            if point is not None:
                break
            widest.pages_left = 0
        else:
            return None
        right = _Range(point, widest.end, widest.end, point if widest.is_dense else widest.known_from)
        right.is_dense = widest.is_dense
        widest.end = point
        self._estimate(widest)
        self._open.append(right)
        self._splits += 1
        return right


def _after_prefix(prefix: str) -> str:
    """The first text that sorts after every text with the prefix; "" if there is none."""
    while prefix and ord(prefix[-1]) == maxunicode:
        prefix = prefix[:-1]
    if not prefix:
        return ""
    code = ord(prefix[-1]) + 1
    return prefix[:-1] + chr(AFTER_SURROGATES if code == FIRST_SURROGATE else code)


def _likely(seen: set[str]) -> set[str]:
    """Characters that later names of the listing are likely to use.

    One lowercase letter does not make all others likely: most names of lowercase letters and digits are hexadecimal. Nothing
    is inferred for other scripts: names that start with them are split only at characters already seen.
    """
    return set().union(*(letters for letters in (digits, ascii_uppercase) if not seen.isdisjoint(letters)))


def split_point(known_from: str, last: str, end: str, alphabet: Sequence[str], *, is_dense: bool) -> str | None:
    """A text between the last name seen and the end ("" for none) of a range; None if there is none.

    Names are treated as numbers whose digits are the alphabet. In a range that `is_dense` the point is half way to the end.
    Otherwise it is unknown how far the names continue, and known only how far they extend from `known_from` to `last`. Then the
    step is the geometric mean of that distance and of the distance to the end, which finds the magnitude of numbers
    (`000000012345.jpg`) in few steps.
    """
    earliest, low, high = _numbers([known_from, last, end or None], alphabet)
    ahead = max(0, high - low)
    step = ahead // 2 if is_dense else min(ahead // 2, isqrt(max(1, low - earliest) * ahead))
    if step < 1:
        return None
    text = _text(low + step, _depth([known_from, last, end or None]), alphabet)
    point = text[: _common_length(last, text) + 1]  # the shortest that still sorts after the last name
    return point if last < point and (not end or point < end) else None


def _numbers(texts: Sequence[str | None], alphabet: Sequence[str]) -> list[int]:
    """The texts as numbers whose differences are their distances; None is greater than every text."""
    depth, base = _depth(texts), len(alphabet) + 1
    digit_of = {character: digit for digit, character in enumerate(alphabet, 1)}
    numbers = []
    for text in texts:
        number = 0
        for character in (text or "")[:depth]:
            number = number * base + (digit_of.get(character) or bisect_left(alphabet, character))
        numbers.append(base**depth if text is None else number * base ** (depth - len(text[:depth])))
    return numbers


def _depth(texts: Sequence[str | None]) -> int:
    known = [text for text in texts if text]
    return max((_common_length(one, other) for one, other in pairwise(known)), default=0) + DEPTH


def _text(number: int, depth: int, alphabet: Sequence[str]) -> str:
    characters = []
    for _ in range(depth):
        number, digit = divmod(number, len(alphabet) + 1)
        characters.append(alphabet[max(digit, 1) - 1])
    return "".join(reversed(characters))


def _common_length(one: str, other: str) -> int:
    for index, (here, there) in enumerate(zip(one, other, strict=False)):
        if here != there:
            return index
    return min(len(one), len(other))


def _check_order(listed: _Range, names: Sequence[str], token: str) -> None:
    """Without this check a server that repeats pages would be listed forever, and one that does not sort would lose names."""
    if names and names[0] <= listed.reached:
        raise UnusableResponseError(
            "listing", f"the page after {listed.reached!r} goes back to {names[0]!r}", final=OriginError
        )
    if not all(map(lt, names, names[1:])):
        raise UnusableResponseError("listing", "the names on a page are not sorted", final=OriginError)
    if not names and token:
        if token in listed.tokens or len(listed.tokens) == MAX_EMPTY_PAGES_IN_A_ROW:
            raise UnusableResponseError("listing", "its pages continue without a name", final=OriginError)
        listed.tokens.add(token)
