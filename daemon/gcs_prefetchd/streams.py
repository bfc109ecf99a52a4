"""One stream: what a reader will read in its epoch, how far it has come, and the window of items planned ahead of it. Pure."""

import numpy as np

from gcs_prefetchd.manifest import Manifest, ObjectVersion
from gcs_prefetchd.names import cache_path
from gcs_prefetchd.order import Indices

__all__ = ["Stream", "path_of"]


def path_of(version: ObjectVersion) -> str:
    """Where the object lies in the cache."""
    return cache_path(version.name.bucket, version.name.name)


class Stream:
    """One reader's order for one epoch.

    `job` ties it to the reports of the processes that read for it. Workers overtake each other, so reads may come out of
    order: `start` is the first position not read yet, `position` how many have been. `held` are the paths of its window.
    """

    def __init__(self, stream_id: str, job: str, manifest: Manifest, epoch: int, order: Indices, position: int = 0) -> None:
        self.id = stream_id
        self.job = job
        self.manifest = manifest
        self.epoch = epoch
        self.order = order
        self.position = position
        self.start = position
        self.held: set[str] = set()
        self._planned = position
        self._read = np.zeros(len(order), dtype=bool)
        self._read[:position] = True
        self._by_item = np.argsort(order, kind="stable").astype(np.uint32)
        self._sorted = order[self._by_item]

    @property
    def length(self) -> int:
        """How many items the epoch has."""
        return len(self.order)

    @property
    def ended(self) -> bool:
        """Whether everything has been read."""
        return self.position >= self.length

    @property
    def ahead(self) -> int:
        """How many items beyond the first unread one have been planned."""
        return self._planned - self.start

    def advance(self) -> int | None:
        """Plan and hold one more item and return it, or None at the epoch's end."""
        while self._planned < self.length:
            self._planned += 1
            if not self._read[self._planned - 1]:
                item = int(self.order[self._planned - 1])
                self.held.update(self._paths(item))
                return item
        return None

    def plan_again(self, item: int) -> None:
        """Something of this item is not on disk although it was planned: plan from there once more."""
        for place in self._places(item):
            if self.start <= place < self._planned and not self._read[place]:
                self._planned = int(place)
                return

    def mark_read(self, item: int) -> bool:
        """Note that the item was read, at its first unread place; False where this stream does not hold it unread."""
        unread = [place for place in self._places(item) if not self._read[place]]
        if not unread:
            return False
        self._read[unread[0]] = True
        self.position += 1
        if len(unread) == 1 or unread[1] >= self._planned:  # else the window holds the item for its next place
            self.held.difference_update(self._paths(item))
        self._move_start()
        return True

    def window(self) -> list[int]:
        """The items planned and not read yet, in order."""
        places = np.arange(self.start, self._planned)
        return [int(item) for item in self.order[places[~self._read[places]]]]

    def _places(self, item: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        # Of the same type as the order: for any other one numpy converts the whole of it at every call.
        first, last = np.searchsorted(self._sorted, np.array([item, item + 1], dtype=self._sorted.dtype))
        return self._by_item[first:last]

    def _paths(self, item: int) -> list[str]:
        return [path_of(version) for version in self.manifest.versions(item)]

    def _move_start(self) -> None:
        while self.start < self.length and self._read[self.start]:
            self.start += 1
        self._planned = max(self._planned, self.start)
