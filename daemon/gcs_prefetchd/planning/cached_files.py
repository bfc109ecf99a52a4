"""The files of the cache as parts of items: turns paths into items for the eviction policy, and back. Pure but for the clock
that it is given."""

from collections.abc import Callable, Iterable

from gcs_prefetchd.planning.eviction import EvictionPolicy, Victim
from gcs_prefetchd.planning.item_lookup import ItemLookup
from gcs_prefetchd.planning.item_refs import ItemRef, PartRef

__all__ = ["CachedFiles"]


class CachedFiles:
    """Reports what happens to files to the eviction policy, and chooses the files to evict."""

    def __init__(self, lookup: ItemLookup, eviction: EvictionPolicy, clock: Callable[[], float]) -> None:
        self._lookup = lookup
        self._eviction = eviction
        self._clock = clock

    def locate_all(self, paths: Iterable[str]) -> list[tuple[str, PartRef | None]]:
        """Each path with the part that is stored there. For a thread."""
        return [(path, self._lookup.locate(path)) for path in paths]

    def adopt(self, path: str, part: PartRef | None) -> None:
        """Add a file that was cached before its data root was listed. Call it for the least recently used file first, and
        `Registry.finish_adoption` after the last."""
        if part is None:
            self._eviction.use_itemless(path, 0.0)
        else:
            self._eviction.itemless.pop(path, None)
            self._eviction.adopt_part(*part)

    def add(self, path: str) -> None:
        """A file was published."""
        part = self._lookup.locate(path)
        if part is None:
            self._eviction.use_itemless(path, self._clock())
            return
        self._eviction.add_part(*part, self._clock())

    def remove(self, path: str) -> PartRef | None:
        """A file is gone; returns the part that it was."""
        self._eviction.itemless.pop(path, None)
        part = self._lookup.locate(path)
        self._lookup.forget(path)
        if part is not None:
            self._eviction.remove_part(*part)
        return part

    def record_open(self, path: str) -> None:
        """Some program opened a file."""
        if path in self._lookup:
            return  # it will be read soon, or was read a moment ago
        part = self._lookup.locate(path)
        if part is not None:
            self._eviction.record_use(part.data_root, part.item, self._clock())
        elif path in self._eviction.itemless:
            self._eviction.use_itemless(path, self._clock())

    def choose_victims(self, short_bytes: int, wanted: ItemRef | None, size_of: Callable[[str], int]) -> list[str] | None:
        """The files to evict so that `short_bytes` become free for an item; none of them is needed sooner than that.

        Returns None if that is impossible. If `wanted` is None, any file may be evicted.
        """
        # The next use is computed here and not when the item was planned: a reader slows down, and all its times change.
        now_s = self._clock()
        due_s = -1.0 if wanted is None else self._eviction.cached[wanted.data_root].next_use_s(wanted.item, now_s)
        paths: list[str] = []

        def size_of_victim(victim: Victim) -> int:
            own = self._paths_of(victim)
            paths.extend(own)
            return sum(map(size_of, own))

        return None if self._eviction.choose_victims(short_bytes, due_s, size_of_victim, now_s) is None else paths

    def _paths_of(self, victim: Victim) -> list[str]:
        if isinstance(victim, str):
            return [victim]
        return self._lookup.paths(*victim, self._eviction.cached[victim.data_root].parts_of(victim.item))
