"""What a cache reports to its owner, every change of its contents; and what it requests: the choice of what to evict."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Protocol

from gcs_prefetchd.shared.checked_read import Stamp

__all__ = ["CacheObserver", "ChooseVictims", "EvictableFiles", "LeastRecentlyUsed"]

# Given how many bytes are short, the paths to evict so that they become free, or None if nothing may be evicted for it.
ChooseVictims = Callable[[int], list[str] | None]


class EvictableFiles(Protocol):
    """The part of a cache that a choice of victims may look at."""

    def pages(self) -> Iterator[list[str]]:
        """The cached paths, least recently used first, a few hundred at a time."""

    def evictable_bytes(self, path: str) -> int:
        """Bytes freed by evicting `path`; 0 if it is not cached or is being replaced."""


class CacheObserver(Protocol):
    """Is notified of every change, except what the cache finds in its index or on the disk while it is opened.

    The methods are called on the event loop, and must not block.
    """

    def arrived(self, path: str, stamp: Stamp) -> None:
        """A file was published, or found on the disk."""

    def used(self, path: str) -> None:
        """Another program opened the file: a use that no reader reports."""

    def lost(self, path: str) -> None:
        """The file was evicted, or deleted by hand."""

    def choose_victims(self, short_bytes: int, files: EvictableFiles) -> list[str] | None:
        """The paths to evict so that `short_bytes` become free, or None if that is impossible."""


class LeastRecentlyUsed:
    """The default observer: plain LRU, and interested in no change."""

    def arrived(self, path: str, stamp: Stamp) -> None: ...

    def used(self, path: str) -> None: ...

    def lost(self, path: str) -> None: ...

    def choose_victims(self, short_bytes: int, files: EvictableFiles) -> list[str] | None:
        """The least recently used files."""
        victims = []
        for path in chain.from_iterable(files.pages()):
            if short_bytes <= 0:
                break
            if (size_bytes := files.evictable_bytes(path)) > 0:
                victims.append(path)
                short_bytes -= size_bytes
        return victims if short_bytes <= 0 else None
