"""The memory index counts bytes, orders entries by use, and reports every change to the disk index."""

import pytest

from gcs_prefetchd.cache.disk_index import IndexRecord
from gcs_prefetchd.cache.memory_index import MemoryIndex
from gcs_prefetchd.shared.checked_read import Stamp

SMALL, LARGE = Stamp(1, 10, 0xA), Stamp(2, 1000, 0xB)


class Notes:
    """The records that a memory index reports."""

    def __init__(self) -> None:
        self.records: list[tuple[str, IndexRecord | None]] = []

    def add(self, path: str, record: IndexRecord | None) -> None:
        self.records.append((path, record))


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def index(notes: Notes) -> MemoryIndex:
    return MemoryIndex(notes.add)


def order(index: MemoryIndex) -> list[str]:
    return [path for page in index.pages(2) for path in page]


def test_bytes_are_the_sum_of_the_cached_files(index: MemoryIndex) -> None:
    index.put("a", SMALL)
    index.adopt("b", SMALL)
    index.load("c", IndexRecord(LARGE, 1.0))
    assert (index.bytes, len(index)) == (1020, 3)
    index.put("a", LARGE)
    assert index.bytes == 2010
    assert index.remove("c")
    assert not index.remove("c")
    assert (index.bytes, len(index)) == (1010, 2)
    index.clear()
    assert (index.bytes, len(index)) == (0, 0)


def test_a_file_found_on_the_disk_counts_as_the_least_recently_used(index: MemoryIndex) -> None:
    index.put("used", SMALL)
    index.adopt("found", SMALL)
    index.put("new", SMALL)
    assert index.touch("used")
    assert not index.touch("absent")
    assert order(index) == ["found", "new", "used"]


def test_times_of_use_never_repeat_and_never_go_back(index: MemoryIndex, notes: Notes) -> None:
    index.load("future", IndexRecord(SMALL, 4e9))  # the clock was set back since
    for _ in range(50):
        index.put("a", SMALL)
        index.touch("a")
    times_s = [record.used_s for _, record in notes.records if record is not None]
    assert times_s[0] > 4e9
    assert times_s == sorted(set(times_s))


def test_adopted_files_have_times_before_all_others(index: MemoryIndex, notes: Notes) -> None:
    index.load("old", IndexRecord(SMALL, -5.0))
    index.adopt("first", SMALL)
    index.adopt("second", SMALL)
    times_s = [record.used_s for _, record in notes.records if record is not None]
    assert times_s[1] < times_s[0] < -5.0


def test_changes_are_recorded_inside_the_context_only(index: MemoryIndex) -> None:
    index.put("before", SMALL)
    with index.recording_changes(["already"]) as changed:
        index.put("put", SMALL)
        index.touch("before")
        index.adopt("adopted", SMALL)
        index.load("loaded", IndexRecord(SMALL, 1.0))
        index.remove("put")
    index.put("after", SMALL)
    assert changed == {"already", "put", "before"}


def test_a_watcher_sees_another_file_with_the_same_stamp_but_no_use(index: MemoryIndex) -> None:
    index.put("a", SMALL)
    with index.watching("a") as is_same:
        index.touch("a")
        assert is_same()
        index.put("a", SMALL)
        assert not is_same()
    with index.watching("a") as is_same:
        index.remove("a")
        assert not is_same()
