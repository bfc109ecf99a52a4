"""The table behaves like a dict in order of use, at a fraction of the memory."""

import gc
import time
from collections import OrderedDict
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gcs_prefetchd.cache.lru_table import LARGE, MAX_NAME_BYTES, LRUTable
from gcs_prefetchd.shared.checked_read import Stamp

A, B, C = Stamp(1, 10, 0xA), Stamp(2, 20, 0xB), Stamp(3, 30, 0xC)

names = st.text(st.sampled_from("ab.é\ud800"), min_size=1, max_size=9)
paths = st.builds(lambda folder, name: folder + name, st.sampled_from(["", "/", "b/", "b/images/", "b/labels/"]), names)
sizes = st.integers(0, 50) | st.integers(LARGE - 2, LARGE + 2) | st.just(5 * 2**40)
stamps = st.builds(Stamp, st.integers(0, 2**63), sizes, st.integers(0, 2**32 - 1))


def in_order(entries: LRUTable) -> list[str]:
    """The paths, least recently used first."""
    return list(chain.from_iterable(entries.pages(3)))


class LikeADict(RuleBasedStateMachine):
    """Makes the same changes to a table and to an OrderedDict; the hashes of most paths collide."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = LRUTable(lambda path: hash(path) % 3 << 12)
        self.model: OrderedDict[str, Stamp] = OrderedDict()

    @rule(path=paths, stamp=stamps)
    def put(self, path: str, stamp: Stamp) -> None:
        slot = self.entries.put(path, stamp)
        self.model[path] = stamp
        self.model.move_to_end(path)
        assert self.entries.slot(path) == slot

    @rule(path=paths, stamp=stamps)
    def put_first(self, path: str, stamp: Stamp) -> None:
        self.entries.put_first(path, stamp)
        self.model[path] = stamp
        self.model.move_to_end(path, last=False)

    @rule(path=paths)
    def pop(self, path: str) -> None:
        assert self.entries.pop(path) == self.model.pop(path, None)

    @rule(chance=st.randoms())
    def pop_existing(self, chance: object) -> None:
        if self.model:
            self.pop(chance.choice(list(self.model)))  # type: ignore[attr-defined]  # a random.Random

    @rule(path=paths)
    def use(self, path: str) -> None:
        self.entries.use(self.entries.slot(path))
        if path in self.model:
            self.model.move_to_end(path)

    @rule(path=paths)
    def look(self, path: str) -> None:
        assert (path in self.entries) == (path in self.model)
        assert self.entries.get(path) == self.model.get(path)
        assert self.entries.size(path) == (self.model[path].size if path in self.model else 0)

    @invariant()
    def has_the_same_entries_in_the_same_order(self) -> None:
        assert len(self.entries) == len(self.model)
        assert in_order(self.entries) == list(self.model)
        for path, stamp in self.model.items():
            slot = self.entries.slot(path)
            assert 0 < slot < self.entries.slot_limit
            assert (self.entries.path_at(slot), self.entries.stamp_at(slot)) == (path, stamp)


LikeADict.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=60)
test_entries_are_a_dict_in_order_of_use = LikeADict.TestCase


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2000)), min_size=1000, max_size=6000))
@settings(max_examples=10)
def test_tables_that_grow_and_empty_lose_nothing(steps: list[tuple[bool, int]]) -> None:
    entries, model = LRUTable(), {}
    for is_added, number in steps:
        path = f"b/{number}.jpg"
        if is_added:
            entries.put(path, A)
            model[path] = A
        else:
            assert entries.pop(path) == model.pop(path, None)
    assert set(in_order(entries)) == set(model)
    assert all((f"b/{number}.jpg" in entries) == (f"b/{number}.jpg" in model) for number in range(2001))


def test_the_slots_of_removed_entries_are_used_again() -> None:
    """A full cache evicts as many entries as it adds, for years."""
    entries = LRUTable()
    for number in range(30_000):
        entries.put(f"epoch-{number // 1000}/{number:07}.jpg", A)
        if number >= 500:
            entries.pop(f"epoch-{(number - 500) // 1000}/{number - 500:07}.jpg")
    assert len(entries) == 500
    assert entries.slot_limit <= 502
    assert len(entries._names._bytes) <= 1 << 16
    assert len(entries._folders.names) <= 2
    assert sum(map(len, entries._tables)) <= 8 * len(entries._tables)


def test_changes_between_two_pages_break_nothing() -> None:
    entries = LRUTable()
    for number in range(10):
        entries.put(str(number), A)
    pages, others = entries.pages(2), entries.pages(3)
    assert next(pages) == ["0", "1"]
    assert next(others) == ["0", "1", "2"]
    entries.pop("2")
    entries.pop("3")
    entries.use(entries.slot("0"))
    entries.put("new", A)
    assert list(pages) == [["4", "5"], ["6", "7"], ["8", "9"], ["0", "new"]]
    assert list(chain.from_iterable(others)) == ["4", "5", "6", "7", "8", "9", "0", "new"]
    assert in_order(entries) == ["1", "4", "5", "6", "7", "8", "9", "0", "new"]


def test_pages_that_are_not_read_to_the_end_leave_nothing_behind() -> None:
    entries = LRUTable()
    entries.put("a", A)
    pages = entries.pages(1)
    assert next(pages) == ["a"]
    pages.close()
    assert entries.slot_limit == 3
    assert entries.put("b", B) == 2


def test_unmarked_entries_are_listed_but_not_those_added_later() -> None:
    entries = LRUTable()
    for path, stamp in (("a", A), ("b", B), ("c", C)):
        entries.put(path, stamp)
    marks = bytearray(entries.slot_limit)
    marks[entries.slot("b")] = 1
    entries.pop("c")
    entries.put("late", A)  # in the slot of a removed entry
    entries.put("later", A)
    assert [entries.path_at(slot) for slot in entries.unmarked(marks)] == ["a", "late"]


@pytest.mark.parametrize("path", ["", "b/", f"b/{'x' * (MAX_NAME_BYTES + 1)}", f"b/{'é' * 128}"])
def test_a_path_that_cannot_be_a_file_is_refused(path: str) -> None:
    entries = LRUTable()
    with pytest.raises(ValueError, match="not a valid path of a file"):
        entries.put(path, A)
    assert path not in entries
    assert in_order(entries) == []


def test_the_longest_name_is_accepted() -> None:
    entries = LRUTable()
    path = "b/" + "x" * MAX_NAME_BYTES
    entries.put(path, A)
    assert in_order(entries) == [path]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(("digits", "most_bytes"), [(7, 70), (36, 100)])
def test_an_entry_takes_little_memory_and_little_time_to_add(digits: int, most_bytes: int) -> None:
    entries = LRUTable()
    before_bytes, longest_s = resident_bytes(), 0.0
    gc.disable()  # a collection of what earlier tests left takes longer than what is measured
    try:
        for number in range(300_000):
            path = f"bench/train/images/{number:0{digits}}.jpg"
            started_s = time.thread_time()
            entries.put(path, A)
            longest_s = max(longest_s, time.thread_time() - started_s)
    finally:
        gc.enable()
    assert (resident_bytes() - before_bytes) / 300_000 < most_bytes
    assert longest_s < 0.010
