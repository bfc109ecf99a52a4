"""A listing is cut into ranges that bring every name once, whatever the names, the pages and the order of the answers."""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gcs_prefetchd.gcs.list_ranges import EMPTY_PAGES_IN_A_ROW, ListingRanges, PageRequest, split_point
from gcs_prefetchd.gcs.responses import UnusableResponseError

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.text("01ab/.", min_size=1, max_size=8)


class Lister:
    """GCS's side of a listing: sorted names, and pages whose tokens name the last name before."""

    def __init__(self, names: Sequence[str], page_size: int, *, empty_pages: random.Random | None = None) -> None:
        self.names = names
        self.page_size = page_size
        self.requests = 0
        self._empty_pages = empty_pages

    def page(self, ask: PageRequest) -> tuple[Sequence[str], str]:
        """The names of one page and the token of the next."""
        self.requests += 1
        low = bisect_left(self.names, ask.start)
        empty, _, after = ask.token.partition(":")
        if after:
            low = max(low, bisect_right(self.names, after))
        high = bisect_left(self.names, ask.end) if ask.end else len(self.names)
        if self._empty_pages is not None and low < high and self._empty_pages.random() < 0.3:
            return [], f"{empty}+:{after}"
        last = min(low + self.page_size, high)
        return self.names[low:last], f":{self.names[last - 1]}" if last < high else ""


def list_all(lister: Lister, at_once: int, order: random.Random, prefix: str = "") -> tuple[list[str], int]:
    """Every name that was taken, and for how many round trips the longest chain of requests waited."""
    ranges, round_trips = ListingRanges(prefix), 0
    taken: list[str] = []
    asked: list[tuple[int, PageRequest]] = []
    while True:
        asked += [(round_trips + 1, ask) for ask in ranges.asks(at_once - len(asked))]
        if not asked:
            return taken, round_trips
        # Whoever was asked first answers first, but for some.
        due, ask = asked.pop(order.randrange(min(3, len(asked))))
        round_trips = max(round_trips, due)
        names, token = lister.page(ask)
        taken += names[ranges.take(ask, names, token)]


@given(st.sets(texts, max_size=150), st.integers(1, 9), st.integers(1, 6), st.integers())
@example({"a", "a\0", "a\0\0", "b"}, 1, 4, 0)
@example({f"{i:03}" for i in range(500)}, 3, 6, 0)
@example({"\U0010ffff" * i for i in range(1, 30)}, 1, 6, 0)
def test_every_name_is_listed_exactly_once(names: set[str], page_size: int, at_once: int, seed: int) -> None:
    taken, _ = list_all(Lister(sorted(names), page_size), at_once, random.Random(seed))
    assert sorted(taken) == sorted(names)


@given(st.sets(texts, max_size=60), texts, st.integers())
@example({"a", "b"}, "\U0010ffff", 0)
@example({"a", "b"}, "\ud7ff", 0)
def test_every_name_below_a_prefix_is_listed(names: set[str], prefix: str, seed: int) -> None:
    below = sorted(prefix + name for name in names)
    taken, _ = list_all(Lister(below, 3), 4, random.Random(seed), prefix)
    assert sorted(taken) == below


@given(st.sets(texts, max_size=60), st.integers(1, 9), st.integers(1, 6), st.integers())
def test_pages_without_a_name_lose_none(names: set[str], page_size: int, at_once: int, seed: int) -> None:
    lister = Lister(sorted(names), page_size, empty_pages=random.Random(seed))
    taken, _ = list_all(lister, at_once, random.Random(seed))
    assert sorted(taken) == sorted(names)


def test_a_server_that_knows_no_bounds_brings_every_name_once_too() -> None:
    class Boundless(Lister):
        def page(self, ask: PageRequest) -> tuple[Sequence[str], str]:
            return super().page(PageRequest("", "", ask.token))

    names = [f"{i:05}" for i in range(3000)]
    taken, _ = list_all(Boundless(names, 100), 8, random.Random(0))
    assert sorted(taken) == names


def uuids(count: int) -> list[str]:
    rng = random.Random(7)
    return [f"images/{UUID(int=rng.getrandbits(128))}.jpg" for _ in range(count)]


SHAPES = {
    "padded": [f"train/images/{i:012}.jpg" for i in range(50_000)],
    "unpadded": [f"train/images/{i}.jpg" for i in range(50_000)],
    "uuids": uuids(50_000),
    "folders": [f"n{1440764 + 13000 * c:08}/n{1440764 + 13000 * c:08}_{i}.JPEG" for c in range(40) for i in range(1250)],
    "dates": [f"{m:02}/{d:02}/cam{c}/{i:06}.jpg" for m in range(1, 13) for d in range(1, 29) for c in "ab" for i in range(75)],
    "two heaps": [f"{heap}/{i:07}" for heap in "az" for i in range(25_000)],
    "capitals": [f"{letter}word_{i:05}.jpg" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for i in range(2000)],
    "other letters": [f"图片/{chr(0x4E00 + i * 7919 % 5000)}{chr(0x4E00 + i * 104729 % 4999)}.jpg" for i in range(50_000)],
}


def shared_prefix(names: Sequence[str]) -> str:
    """What all the sorted names begin with."""
    return next((names[0][:i] for i in range(len(names[0])) if names[0][i] != names[-1][i]), "")


@pytest.mark.parametrize("prefix_of", [shared_prefix, lambda _: ""])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_listing_takes_few_round_trips_and_few_requests_more(
    shape: str, prefix_of: Callable[[Sequence[str]], str]
) -> None:
    names = sorted(SHAPES[shape])
    lister = Lister(names, 100)
    taken, round_trips = list_all(lister, 16, random.Random(1), prefix_of(names))
    pages = -(-len(names) // 100)
    assert sorted(taken) == names
    assert lister.requests <= pages * 1.1 + 30
    assert round_trips <= pages * 0.2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pages", [1, 2, 3, 10])
def test_a_short_listing_costs_few_requests_more(shape: str, pages: int) -> None:
    names = sorted(SHAPES[shape])[: pages * 1000]
    lister = Lister(names, 1000)
    list_all(lister, 16, random.Random(1), shared_prefix(names))
    assert lister.requests <= (1 if pages == 1 else min(4 * pages, pages + 24))


@given(st.lists(texts, min_size=3, max_size=3, unique=True), st.sets(texts, max_size=5), st.booleans(), st.booleans())
def test_a_split_lies_between_the_last_name_and_the_end(
    three: list[str], others: set[str], is_dense: bool, is_open: bool
) -> None:
    known_from, last, end = sorted(three)
    alphabet = sorted(set("".join([*three, *others])))
    where = split_point(known_from, last, "" if is_open else end, alphabet, is_dense=is_dense)
    assert where is None or (last < where and (is_open or where < end))


@pytest.mark.parametrize(
    ("known_from", "last", "end", "is_dense", "expected"),
    [
        ("0000", "0010", "1000", True, "05"),  # half way of what is known to be full
        ("0000", "0010", "", False, "03"),  # nobody knows how far it goes
        ("0", "5", "", True, "7"),
        ("a", "b", "b0", True, None),  # no name of these characters lies between
    ],
)
def test_where_a_range_is_split(known_from: str, last: str, end: str, is_dense: bool, expected: str | None) -> None:
    assert split_point(known_from, last, end, "0123456789", is_dense=is_dense) == expected


def first_page(names: Sequence[str], token: str) -> ListingRanges:
    ranges = ListingRanges()
    (ask,) = ranges.asks(1)
    ranges.take(ask, names, token)
    return ranges


@pytest.mark.parametrize(("names", "token"), [(["a"], "next"), (["b"], "next"), (["d", "c"], ""), (["c", "c"], "")])
def test_a_page_that_does_not_go_on_is_an_error(names: list[str], token: str) -> None:
    ranges = first_page(["a", "b"], "next")
    (ask,) = ranges.asks(1)
    with pytest.raises(UnusableResponseError):
        ranges.take(ask, names, token)


def test_empty_pages_that_repeat_a_token_are_an_error() -> None:
    ranges = first_page([], "1")
    for token in ("2", "3"):
        (ask,) = ranges.asks(1)
        assert ask.token in {"1", "2"}
        ranges.take(ask, [], token)
    (ask,) = ranges.asks(1)
    with pytest.raises(UnusableResponseError):
        ranges.take(ask, [], "1")


def test_empty_pages_without_end_are_an_error() -> None:
    ranges = first_page([], "0")
    for number in range(1, EMPTY_PAGES_IN_A_ROW):
        (ask,) = ranges.asks(1)
        ranges.take(ask, [], str(number))
    (ask,) = ranges.asks(1)
    with pytest.raises(UnusableResponseError):
        ranges.take(ask, [], "one more")


def test_names_of_a_thousand_bytes_are_listed_too() -> None:
    names = [f"{'long/' * 190}{i:05}" for i in range(2000)]
    lister = Lister(names, 50)
    taken, _ = list_all(lister, 8, random.Random(0))
    assert sorted(taken) == names
    assert lister.requests <= 40 * 1.1 + 30


def test_what_follows_a_cut_goes_on_with_the_token_and_bounds_of_before() -> None:
    """GCS wants a token with the very parameters that it was given for."""
    lister = Lister(SHAPES["uuids"], 100)
    names = sorted(SHAPES["uuids"])
    lister.names = names
    ranges = ListingRanges()
    bounds_of_token: dict[str, tuple[str, str]] = {}
    asked: list[PageRequest] = []
    while asked := asked + list(ranges.asks(8 - len(asked))):
        ask = asked.pop(0)
        if ask.token:
            assert bounds_of_token[ask.token] == (ask.start, ask.end)
        page, token = lister.page(ask)
        bounds_of_token[token] = (ask.start, ask.end)
        ranges.take(ask, page, token)
