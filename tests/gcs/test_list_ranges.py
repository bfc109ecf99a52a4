"""A listing is split into ranges that return every name once, whatever the names, pages and order of responses."""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gcs_prefetchd.gcs.list_ranges import MAX_EMPTY_PAGES_IN_A_ROW, ListingRanges, PageRequest, split_point
from gcs_prefetchd.gcs.responses import UnusableResponseError

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.text("01ab/.", min_size=1, max_size=8)


class Lister:
    """A simulated GCS listing: sorted names, and pages whose tokens hold the last name of the page before."""

    def __init__(self, names: Sequence[str], page_size: int, *, empty_pages: random.Random | None = None) -> None:
        self.names = names
        self.page_size = page_size
        self.requests = 0
        self._empty_pages = empty_pages

    def page(self, request: PageRequest) -> tuple[Sequence[str], str]:
        """The names of one page and the token of the next."""
        self.requests += 1
        low = bisect_left(self.names, request.start)
        empty, _, after = request.token.partition(":")
        if after:
            low = max(low, bisect_right(self.names, after))
        high = bisect_left(self.names, request.end) if request.end else len(self.names)
        if self._empty_pages is not None and low < high and self._empty_pages.random() < 0.3:
            return [], f"{empty}+:{after}"
        last = min(low + self.page_size, high)
        return self.names[low:last], f":{self.names[last - 1]}" if last < high else ""


def list_all(lister: Lister, at_once: int, order: random.Random, prefix: str = "") -> tuple[list[str], int]:
    """All names that were listed, and the number of round trips in the longest chain of requests."""
    ranges, round_trips = ListingRanges(prefix), 0
    names: list[str] = []
    sent: list[tuple[int, PageRequest]] = []
    while True:
        sent += [(round_trips + 1, request) for request in ranges.next_requests(at_once - len(sent))]
        if not sent:
            return names, round_trips
        # Responses arrive almost in the order of the requests.
        due, request = sent.pop(order.randrange(min(3, len(sent))))
        round_trips = max(round_trips, due)
        page, token = lister.page(request)
        names += page[ranges.add_page(request, page, token)]


@given(st.sets(texts, max_size=150), st.integers(1, 9), st.integers(1, 6), st.integers())
@example({"a", "a\0", "a\0\0", "b"}, 1, 4, 0)
@example({f"{i:03}" for i in range(500)}, 3, 6, 0)
@example({"\U0010ffff" * i for i in range(1, 30)}, 1, 6, 0)
def test_every_name_is_listed_exactly_once(names: set[str], page_size: int, at_once: int, seed: int) -> None:
    listed, _ = list_all(Lister(sorted(names), page_size), at_once, random.Random(seed))
    assert sorted(listed) == sorted(names)


@given(st.sets(texts, max_size=60), texts, st.integers())
@example({"a", "b"}, "\U0010ffff", 0)
@example({"a", "b"}, "\ud7ff", 0)
def test_every_name_below_a_prefix_is_listed(names: set[str], prefix: str, seed: int) -> None:
    below = sorted(prefix + name for name in names)
    listed, _ = list_all(Lister(below, 3), 4, random.Random(seed), prefix)
    assert sorted(listed) == below


@given(st.sets(texts, max_size=60), st.integers(1, 9), st.integers(1, 6), st.integers())
def test_pages_without_a_name_lose_none(names: set[str], page_size: int, at_once: int, seed: int) -> None:
    lister = Lister(sorted(names), page_size, empty_pages=random.Random(seed))
    listed, _ = list_all(lister, at_once, random.Random(seed))
    assert sorted(listed) == sorted(names)


def test_a_server_that_ignores_bounds_returns_every_name_once_too() -> None:
    class Boundless(Lister):
        def page(self, request: PageRequest) -> tuple[Sequence[str], str]:
            return super().page(PageRequest("", "", request.token))

    names = [f"{i:05}" for i in range(3000)]
    listed, _ = list_all(Boundless(names, 100), 8, random.Random(0))
    assert sorted(listed) == names


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


def common_prefix(names: Sequence[str]) -> str:
    """The common prefix of all the sorted names."""
    return next((names[0][:i] for i in range(len(names[0])) if names[0][i] != names[-1][i]), "")


@pytest.mark.parametrize("prefix_of", [common_prefix, lambda _: ""])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_listing_takes_few_round_trips_and_few_extra_requests(
    shape: str, prefix_of: Callable[[Sequence[str]], str]
) -> None:
    names = sorted(SHAPES[shape])
    lister = Lister(names, 100)
    listed, round_trips = list_all(lister, 16, random.Random(1), prefix_of(names))
    pages = -(-len(names) // 100)
    assert sorted(listed) == names
    assert lister.requests <= pages * 1.1 + 30
    assert round_trips <= pages * 0.2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pages", [1, 2, 3, 10])
def test_a_short_listing_takes_few_extra_requests(shape: str, pages: int) -> None:
    names = sorted(SHAPES[shape])[: pages * 1000]
    lister = Lister(names, 1000)
    list_all(lister, 16, random.Random(1), common_prefix(names))
    assert lister.requests <= (1 if pages == 1 else min(4 * pages, pages + 24))


@given(st.lists(texts, min_size=3, max_size=3, unique=True), st.sets(texts, max_size=5), st.booleans(), st.booleans())
def test_a_split_point_is_between_the_last_name_and_the_end(
    three: list[str], others: set[str], is_dense: bool, is_open: bool
) -> None:
    known_from, last, end = sorted(three)
    alphabet = sorted(set("".join([*three, *others])))
    point = split_point(known_from, last, "" if is_open else end, alphabet, is_dense=is_dense)
    assert point is None or (last < point and (is_open or point < end))


@pytest.mark.parametrize(
    ("known_from", "last", "end", "is_dense", "expected"),
    [
        ("0000", "0010", "1000", True, "05"),  # half way through a dense range
        ("0000", "0010", "", False, "03"),  # it is unknown how far the names continue
        ("0", "5", "", True, "7"),
        ("a", "b", "b0", True, None),  # no name with these characters is between
    ],
)
def test_a_range_is_split_by_its_density(known_from: str, last: str, end: str, is_dense: bool, expected: str | None) -> None:
    assert split_point(known_from, last, end, "0123456789", is_dense=is_dense) == expected


def first_page(names: Sequence[str], token: str) -> ListingRanges:
    ranges = ListingRanges()
    (request,) = ranges.next_requests(1)
    ranges.add_page(request, names, token)
    return ranges


@pytest.mark.parametrize(("names", "token"), [(["a"], "next"), (["b"], "next"), (["d", "c"], ""), (["c", "c"], "")])
def test_a_page_without_progress_is_an_error(names: list[str], token: str) -> None:
    ranges = first_page(["a", "b"], "next")
    (request,) = ranges.next_requests(1)
    with pytest.raises(UnusableResponseError):
        ranges.add_page(request, names, token)


def test_empty_pages_that_repeat_a_token_are_an_error() -> None:
    ranges = first_page([], "1")
    for token in ("2", "3"):
        (request,) = ranges.next_requests(1)
        assert request.token in {"1", "2"}
        ranges.add_page(request, [], token)
    (request,) = ranges.next_requests(1)
    with pytest.raises(UnusableResponseError):
        ranges.add_page(request, [], "1")


def test_empty_pages_without_end_are_an_error() -> None:
    ranges = first_page([], "0")
    for number in range(1, MAX_EMPTY_PAGES_IN_A_ROW):
        (request,) = ranges.next_requests(1)
        ranges.add_page(request, [], str(number))
    (request,) = ranges.next_requests(1)
    with pytest.raises(UnusableResponseError):
        ranges.add_page(request, [], "one more")


def test_names_of_a_thousand_bytes_are_listed_too() -> None:
    names = [f"{'long/' * 190}{i:05}" for i in range(2000)]
    lister = Lister(names, 50)
    listed, _ = list_all(lister, 8, random.Random(0))
    assert sorted(listed) == names
    assert lister.requests <= 40 * 1.1 + 30


def test_after_a_split_a_token_is_sent_with_the_bounds_that_it_was_returned_for() -> None:
    """GCS demands a token together with the parameters of the request that returned it."""
    lister = Lister(SHAPES["uuids"], 100)
    names = sorted(SHAPES["uuids"])
    lister.names = names
    ranges = ListingRanges()
    bounds_of_token: dict[str, tuple[str, str]] = {}
    sent: list[PageRequest] = []
    while sent := sent + list(ranges.next_requests(8 - len(sent))):
        request = sent.pop(0)
        if request.token:
            assert bounds_of_token[request.token] == (request.start, request.end)
        page, token = lister.page(request)
        bounds_of_token[token] = (request.start, request.end)
        ranges.add_page(request, page, token)
