"""What files differ in from what is held is found out a page at a time, and what changes meanwhile is left alone."""

from gcs_prefetchd.cache.file_comparison import Comparison, Found
from gcs_prefetchd.cache.lru_table import Entries
from gcs_prefetchd.shared.checksums import Stamp

A, B = Stamp(1, 10, 0xA), Stamp(2, 20, 0xB)


def holding(*paths: str) -> Entries:
    entries = Entries()
    for path in paths:
        entries.put(path, A)
    return entries


def unseen(comparison: Comparison) -> list[str]:
    return [path for page in comparison.unseen(2) for path in page]


def test_files_as_they_are_held_differ_in_nothing() -> None:
    entries = holding("a", "b", "c")
    comparison = Comparison(entries, set(), set())
    for page in (["c", "a"], ["b"]):
        differences = comparison.take([Found(path, 10, A) for path in page])
        assert (differences.new, differences.damaged) == ([], [])
    assert unseen(comparison) == []


def test_each_difference_has_its_place() -> None:
    entries = holding("same", "other", "short", "gone", "bare")
    comparison = Comparison(entries, set(), set())
    found = [
        Found("same", 10, A),
        Found("new", 20, B),
        Found("other", 20, B),
        Found("short", 9, A),
        Found("new short", 9, A),
        Found("bare", 10, None),
        Found("foreign", 10, None),
    ]

    differences = comparison.take(found)

    assert differences.new == [("new", B), ("other", B)]
    assert differences.damaged == ["short", "new short"]
    for path, stamp in differences.new:
        comparison.see(entries.put_first(path, stamp))
    entries.pop("short")  # as whoever unlinks it does
    assert unseen(comparison) == ["gone", "bare"]
    assert comparison.gone(["gone", "bare"], [None, Found("bare", 10, None)]) == ["gone", "bare"]


def test_what_a_second_look_finds_is_not_gone() -> None:
    comparison = Comparison(holding("a"), set(), set())
    assert comparison.gone(["a"], [Found("a", 10, A)]) == []


def test_what_changes_meanwhile_is_left_to_whoever_changes_it() -> None:
    entries, changed, arriving = holding("dropped", "published", "arriving", "gone"), set[str](), {"arriving"}
    comparison = Comparison(entries, changed, arriving)
    entries.pop("dropped")
    entries.put("published", B)
    entries.put("late", B)
    changed.update({"dropped", "published", "late"})

    differences = comparison.take([Found("dropped", 10, A), Found("published", 9, A), Found("arriving", 9, A)])

    assert (differences.new, differences.damaged) == ([], [])
    assert unseen(comparison) == ["gone"]
    changed.add("gone")
    assert comparison.gone(["gone"], [None]) == []


def test_a_page_may_come_after_what_it_tells_of_has_gone() -> None:
    entries = holding("a", "b", "c")
    pages = Comparison(entries, set(), set()).unseen(1)
    assert next(pages) == ["a"]
    entries.pop("b")
    assert list(pages) == [[], ["c"]]
