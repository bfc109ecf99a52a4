"""How a listing is cut into ranges of names that are listed at the same time. Pure: no request is sent here.

GCS brings a listing a page after the other, and nothing tells beforehand where its names lie. So it starts as one range, and
whenever more pages could be asked for at a time, the range with the most ahead of it is cut in two, the right half for whoever
is free (work stealing, Blumofe and Leiserson, 1999). Names are compared as GCS sorts them, by the bytes of their UTF-8, which
is the order of their code points and so that of `str`.
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

# A cut costs at most one request that brings nothing: the right half is empty, or the last page of the left one runs over
# into the right. So cuts are bounded by pages: few for a small listing, never more than one for ten pages in the end.
CUTS_PER_PAGE_AT_FIRST = 2
CUTS_AT_FIRST = 24
PAGES_PER_CUT = 12
# One page is under way and two are soon asked for: less is not worth a request.
WORTH_A_CUT_PAGES = 4
DEPTH = 8  # characters after the first that tells two names apart: enough to halve what lies between them 30 times
SAMPLED = 7  # every seventh name is looked at for its characters; a divisor of no base that people number in
FIRST_SURROGATE, AFTER_SURROGATES = 0xD800, 0xE000  # what lies between is no character of a name
EMPTY_PAGES_IN_A_ROW = 1000  # GCS may send some, each with another token


@dataclass(frozen=True, slots=True)
class PageRequest:
    """One page to ask for. Every page of a range is asked for with the same bounds, as GCS wants it with a token."""

    start: str  # inclusive; "" for the listing's beginning
    end: str  # exclusive; "" for the listing's end
    token: str = ""


@dataclass(slots=True, eq=False)
class _Range:
    start: str
    asked_end: str
    end: str  # moves to the left with every cut
    known_from: str  # what comes before it is known back to here
    token: str = ""
    first: str = ""
    last: str = ""
    came_to: str = ""  # the last name of its pages, be it beyond its end or, from a server that knows no bounds, before it
    pages: int = 0
    is_dense: bool = False  # names are known to go on right up to its end
    pages_left: int = 0
    tokens: set[str] = field(default_factory=set)  # since a name came


class ListingRanges:
    """The ranges of the listing of what begins with a prefix: `asks` says what to ask for, `take` is told what came.

    `alphabet` is every character that its names were seen to use, and those that are likely beside them: only those are tried
    where a range is cut.
    """

    def __init__(self, prefix: str = "") -> None:
        self.alphabet: list[str] = []
        self._open = [_Range("", "", _after_prefix(prefix), "")]
        self._seen = set(self._open[0].end)  # bounds have a place among the names only by characters of theirs
        self._ready = list(self._open)
        self._under_way: dict[PageRequest, _Range] = {}
        self._pages = 0
        self._cuts = 0

    def asks(self, at_most: int) -> Iterator[PageRequest]:
        """The pages to ask for now, so many at most. The listing is complete when there are none and none is under way."""
        for _ in range(at_most):
            if not self._ready and (cut := self._cut()) is not None:
                self._ready.append(cut)
            if not self._ready:
                return
            chosen = self._ready.pop(0)
            ask = PageRequest(chosen.start, chosen.asked_end, chosen.token)
            self._under_way[ask] = chosen
            yield ask

    def take(self, ask: PageRequest, names: Sequence[str], token: str) -> slice:
        """Return which of the page's names are new; the others belong to another range.

        `token` is the next page's, "" after the last page. Raises UnusableResponseError if the listing makes no progress.
        """
        came = self._under_way.pop(ask)
        _check_order(came, names, token)
        kept = slice(bisect_left(names, came.start), bisect_left(names, came.end) if came.end else len(names))
        if names:
            came.came_to = names[-1]
            came.tokens.clear()
        if own := names[kept]:
            self._learn(came, own)
        came.token = token
        if not token or (names and came.end and names[-1] >= came.end):
            self._open.remove(came)
        else:
            self._ready.append(came)
            self._estimate(came)
        return kept

    def _learn(self, came: _Range, names: Sequence[str]) -> None:
        self._pages += 1
        came.pages += 1
        came.last = names[-1]
        if not self._seen.issuperset(seen := set().union(names[-1], *names[::SAMPLED])):
            self._seen |= seen
            self.alphabet = sorted(self._seen | _likely(self._seen))
        if came.pages == 1:
            came.first = names[0]
            came.known_from = came.known_from or names[0]
            self._look_left(came)

    def _look_left(self, came: _Range) -> None:
        """Where a range's names begin close to its start, those of the range before it go on up to its end."""
        start, first, last = _numbers([came.start, came.first, came.last], self.alphabet)
        for left in self._open:
            if left.end and left.end == came.start:
                left.is_dense = first - start <= last - first
                self._estimate(left)

    def _estimate(self, one: _Range) -> None:
        one.pages_left = 0
        if one.pages:
            first, last, end = _numbers([one.first, one.last, one.end or None], self.alphabet)
            one.pages_left = one.pages * (end - last) // max(1, last - first)

    def _cut(self) -> _Range | None:
        """Cut the range with the most ahead; returns the right half, or None where no cut is worth its request."""
        if self._cuts >= min(CUTS_PER_PAGE_AT_FIRST * self._pages, CUTS_AT_FIRST + self._pages // PAGES_PER_CUT):
            return None
        for widest in sorted(self._open, key=lambda one: one.pages_left, reverse=True):
            if widest.pages_left < WORTH_A_CUT_PAGES:
                return None
            where = split_point(widest.known_from, widest.last, widest.end, self.alphabet, is_dense=widest.is_dense)
            if where is not None:
                break
            widest.pages_left = 0
        else:
            return None
        right = _Range(where, widest.end, widest.end, where if widest.is_dense else widest.known_from)
        right.is_dense = widest.is_dense
        widest.end = where
        self._estimate(widest)
        self._open.append(right)
        self._cuts += 1
        return right


def _after_prefix(prefix: str) -> str:
    """The first text after all that begin with the prefix, or ""."""
    while prefix and ord(prefix[-1]) == maxunicode:
        prefix = prefix[:-1]
    if not prefix:
        return ""
    code = ord(prefix[-1]) + 1
    return prefix[:-1] + chr(AFTER_SURROGATES if code == FIRST_SURROGATE else code)


def _likely(seen: set[str]) -> set[str]:
    """Characters that a listing will come to, though only later in the order.

    Not every small letter with one of them: most names in small letters and digits are hexadecimal. Of other scripts none:
    what has them in its first places is cut only as far as they were seen.
    """
    return set().union(*(letters for letters in (digits, ascii_uppercase) if not seen.isdisjoint(letters)))


def split_point(known_from: str, last: str, end: str, alphabet: Sequence[str], *, is_dense: bool) -> str | None:
    """A text between the last name seen and the end ("" for none) of a range, or None where there is none to be had.

    Names are taken for numbers whose digits are the alphabet. Where they are known to be `is_dense`, half way to the end.
    Otherwise nobody knows how far they go on, only how far they have since `known_from`: then it is the geometric mean of
    that and of what lies ahead, which finds the magnitude among many (`000000012345.jpg`) in few steps.
    """
    since, low, high = _numbers([known_from, last, end or None], alphabet)
    ahead = max(0, high - low)
    step = ahead // 2 if is_dense else min(ahead // 2, isqrt(max(1, low - since) * ahead))
    if step < 1:
        return None
    text = _text(low + step, _depth([known_from, last, end or None]), alphabet)
    where = text[: _shared(last, text) + 1]  # the shortest that is still beyond the last name
    return where if last < where and (not end or where < end) else None


def _numbers(texts: Sequence[str | None], alphabet: Sequence[str]) -> list[int]:
    """The texts as numbers whose differences say how far apart they are; None is beyond all."""
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
    return max((_shared(one, other) for one, other in pairwise(known)), default=0) + DEPTH


def _text(number: int, depth: int, alphabet: Sequence[str]) -> str:
    characters = []
    for _ in range(depth):
        number, digit = divmod(number, len(alphabet) + 1)
        characters.append(alphabet[max(digit, 1) - 1])
    return "".join(reversed(characters))


def _shared(one: str, other: str) -> int:
    for place, (here, there) in enumerate(zip(one, other, strict=False)):
        if here != there:
            return place
    return min(len(one), len(other))


def _check_order(came: _Range, names: Sequence[str], token: str) -> None:
    """Without this a server that repeats itself is listed for ever, and one that does not sort loses names."""
    if names and names[0] <= came.came_to:
        raise UnusableResponseError("listing", f"the page after {came.came_to!r} goes back to {names[0]!r}", final=OriginError)
    if not all(map(lt, names, names[1:])):
        raise UnusableResponseError("listing", "the names on a page are not sorted", final=OriginError)
    if not names and token:
        if token in came.tokens or len(came.tokens) == EMPTY_PAGES_IN_A_ROW:
            raise UnusableResponseError("listing", "its pages continue without a name", final=OriginError)
        came.tokens.add(token)
