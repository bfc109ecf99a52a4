"""By default a cache evicts what was used least recently."""

from collections.abc import Iterator

from gcs_prefetchd.cache.observer import LeastRecentlyUsed


class Files:
    """Cached files with their evictable bytes, least recently used first."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def pages(self) -> Iterator[list[str]]:
        paths = list(self.sizes)
        yield from (paths[start : start + 2] for start in range(0, len(paths), 2))

    def evictable_bytes(self, path: str) -> int:
        return self.sizes[path]


def test_the_oldest_files_are_chosen_and_no_more_than_needed() -> None:
    files = Files(a=10, b=10, c=10, d=10)
    assert LeastRecentlyUsed().choose_victims(11, files) == ["a", "b"]
    assert LeastRecentlyUsed().choose_victims(20, files) == ["a", "b"]
    assert LeastRecentlyUsed().choose_victims(21, files) == ["a", "b", "c"]


def test_files_that_free_nothing_are_skipped() -> None:
    assert LeastRecentlyUsed().choose_victims(10, Files(replaced=0, a=10)) == ["a"]


def test_nothing_is_chosen_if_all_files_together_are_too_small() -> None:
    assert LeastRecentlyUsed().choose_victims(21, Files(a=10, b=10)) is None
