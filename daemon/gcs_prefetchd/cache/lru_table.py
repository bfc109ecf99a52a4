"""A table path -> stamp, least recently used first, in columns of numbers instead of an object for each entry. Pure.

An entry with a name of 11 characters takes about 60 bytes in all; in a dict of str and Stamp it takes 330. No method except
`unmarked` takes longer the more entries there are: all may be called on the event loop.
"""

from array import array
from collections.abc import Callable, Generator
from typing import Literal

import numpy as np

from gcs_prefetchd.cache.growable_array import GrowableArray
from gcs_prefetchd.cache.string_arena import StringArena
from gcs_prefetchd.shared.checked_read import Stamp

__all__ = ["LRUTable"]

MAX_NAME_BYTES = 255  # the limit of file systems
LARGE = 2**32 - 1  # in the column of sizes: the size is in `_large`
DELETED = 2**32 - 1  # in a hash table: an entry was here
SHARD_BITS = 12  # a hash table grows in one go: each of 4,096 is small enough to do that without a noticeable pause
INITIAL_LENGTH = 8
INITIAL_SLOTS = 1024
KINDS: tuple[Literal["B", "I", "Q"], ...] = ("I", "Q", "I", "I", "I", "I", "B", "I", "I")  # of the columns


class LRUTable:
    """An ordered mapping from paths to stamps. An entry has a number, its slot, from 1 on, for as long as it exists.

    The part of a path after its last slash has at most 255 bytes in UTF-8, as in any file system. Tests pass a `hash_of` that
    makes paths collide.
    """

    def __init__(self, hash_of: Callable[[str], int] = hash) -> None:
        self._hash_of = hash_of
        self._count = 0
        self._tables = [array("I", bytes(4 * INITIAL_LENGTH)) for _ in range(1 << SHARD_BITS)]
        self._used = array("I", bytes(4 << SHARD_BITS))  # the places of each hash table that are not 0
        self._names = StringArena(MAX_NAME_BYTES)
        self._folders = _Folders()
        self._slots = 1
        self._columns = [GrowableArray(kind, INITIAL_SLOTS) for kind in KINDS]
        self._name_columns()
        self._large: dict[int, int] = {}
        self._free = 0  # the first free slot; `_next` links the others

    def __len__(self) -> int:
        return self._count

    def __contains__(self, path: str) -> bool:
        return self.slot(path) != 0

    def get(self, path: str) -> Stamp | None:
        """The path's stamp, or None."""
        slot = self.slot(path)
        return self.stamp_at(slot) if slot else None

    def put(self, path: str, stamp: Stamp) -> int:
        """Set the path's stamp and make it the most recently used; returns its slot."""
        slot = self.slot(path)
        if slot:
            self._large.pop(slot, None)
            self._unlink(slot)
        else:
            slot = self._enter(path)
        self._generation[slot] = stamp.generation
        self._crc32c[slot] = stamp.crc32c
        if stamp.size < LARGE:
            self._size[slot] = stamp.size
        else:
            self._size[slot], self._large[slot] = LARGE, stamp.size
        self._link(slot, 0)
        return slot

    def put_first(self, path: str, stamp: Stamp) -> int:
        """Set the path's stamp and make it the least recently used; returns its slot."""
        slot = self.put(path, stamp)
        self._unlink(slot)
        self._link(slot, self._next[0])
        return slot

    def pop(self, path: str) -> Stamp | None:
        """Remove the path; returns its stamp, or None if it had no entry."""
        place = self._place(path)
        if place is None:
            return None
        table, index = place
        slot, table[index] = table[index], DELETED
        stamp = self.stamp_at(slot)
        self._large.pop(slot, None)
        self._names.remove(self._name[slot], self._length[slot])
        self._folders.leave(self._folder[slot])
        self._unlink(slot)
        self._release(slot)
        self._count -= 1
        return stamp

    def use(self, slot: int) -> None:
        """Make the entry the most recently used."""
        if self._length[slot]:
            self._unlink(slot)
            self._link(slot, 0)

    def slot(self, path: str) -> int:
        """The path's slot; 0 if it has no entry."""
        place = self._place(path)
        return 0 if place is None else place[0][place[1]]

    def has_entry(self, slot: int) -> bool:
        """Whether the slot has an entry."""
        return self._length[slot] != 0

    def path_at(self, slot: int) -> str:
        """The path of a slot that has an entry."""
        return self._folders.names[self._folder[slot]] + self._name_at(slot).decode("utf-8", "surrogatepass")

    def stamp_at(self, slot: int) -> Stamp:
        """The stamp of a slot that has an entry."""
        return Stamp(self._generation[slot], self._size_at(slot), self._crc32c[slot])

    def size(self, path: str) -> int:
        """The bytes of the path's file; 0 if it has no entry."""
        slot = self.slot(path)
        return self._size_at(slot) if slot else 0

    def pages(self, max_paths: int) -> Generator[list[str], None, None]:
        """The paths, least recently used first, `max_paths` at a time.

        Entries may change between two pages: paths that are added, removed or used meanwhile may appear, or not, or twice.
        """
        bookmark = self._take_slot()
        self._link(bookmark, self._next[0])
        try:
            while page := self._page_after(bookmark, max_paths):
                yield page
        finally:
            self._unlink(bookmark)
            self._release(bookmark)

    @property
    def slot_limit(self) -> int:
        """All slots are smaller than this."""
        return self._slots

    def unmarked(self, marks: bytearray) -> list[int]:
        """The slots that have an entry and whose byte in `marks` is 0; slots beyond its end are left out."""
        held = np.frombuffer(self._length, dtype=np.uint8)[: len(marks)] != 0
        slots: list[int] = np.flatnonzero(held & (np.frombuffer(marks, dtype=np.uint8) == 0)).tolist()
        return slots

    def _place(self, path: str) -> tuple["array[int]", int] | None:
        """The hash table with the path's slot, and the index of that slot in it."""
        hashed = self._hash_of(path)
        table, fingerprint = self._tables[hashed & (1 << SHARD_BITS) - 1], hashed >> SHARD_BITS & 0xFFFFFFFF
        mask = len(table) - 1
        index = fingerprint & mask
        while slot := table[index]:
            if slot != DELETED and self._fingerprint[slot] == fingerprint and self._is_at(slot, path):
                return table, index
            index = index + 1 & mask
        return None

    def _is_at(self, slot: int, path: str) -> bool:
        folder = self._folders.names[self._folder[slot]]
        return path.startswith(folder) and path[len(folder) :].encode("utf-8", "surrogatepass") == self._name_at(slot)

    def _name_at(self, slot: int) -> bytes:
        return self._names.get(self._name[slot], self._length[slot])

    def _size_at(self, slot: int) -> int:
        size = self._size[slot]
        return self._large[slot] if size == LARGE else size

    def _enter(self, path: str) -> int:
        start = path.rfind("/") + 1
        name = path[start:].encode("utf-8", "surrogatepass")
        if not 0 < len(name) <= MAX_NAME_BYTES:
            raise ValueError(f"{path!r}: not a valid path of a file")
        slot = self._take_slot()
        self._folder[slot] = self._folders.enter(path[:start])
        self._name[slot] = self._names.add(name)
        self._length[slot] = len(name)
        hashed = self._hash_of(path)
        self._fingerprint[slot] = hashed >> SHARD_BITS & 0xFFFFFFFF
        self._insert(hashed & (1 << SHARD_BITS) - 1, slot)
        self._count += 1
        return slot

    def _insert(self, shard: int, slot: int) -> None:
        table = self._tables[shard]
        if (self._used[shard] + 1) * 4 > len(table) * 3:
            slots = [one for one in table if one not in (0, DELETED)]
            length = INITIAL_LENGTH
            while length * 5 < (len(slots) + 1) * 8:
                length *= 2
            table = self._tables[shard] = array("I", bytes(4 * length))
            for one in slots:
                self._set(table, one)
            self._used[shard] = len(slots)
        self._used[shard] += self._set(table, slot)

    def _set(self, table: "array[int]", slot: int) -> bool:
        """Returns whether the place had never been used."""
        mask = len(table) - 1
        index = self._fingerprint[slot] & mask
        while table[index] not in (0, DELETED):
            index = index + 1 & mask
        was_new = table[index] == 0
        table[index] = slot
        return was_new

    def _take_slot(self) -> int:
        slot = self._free
        if slot:
            self._free = self._next[slot]
            return slot
        if self._slots == len(self._next):
            for column in self._columns:
                column.grow(2 * self._slots)
            self._name_columns()
        self._slots += 1
        return self._slots - 1

    def _name_columns(self) -> None:
        """Name the columns' views. Slot 0 is the start and the end of the LRU ring."""
        views = [column.view for column in self._columns]
        self._fingerprint, self._generation, self._size, self._crc32c, self._folder, self._name = views[:6]
        self._length = views[6]  # of the name in bytes; 0 if the slot is free or a bookmark
        self._next, self._before = views[7:]

    def _release(self, slot: int) -> None:
        self._length[slot] = 0
        self._next[slot], self._free = self._free, slot

    def _link(self, slot: int, after: int) -> None:
        """Insert a slot into the ring before another; before 0, it is the most recently used."""
        before = self._before[after]
        self._next[before] = self._before[after] = slot
        self._before[slot], self._next[slot] = before, after

    def _unlink(self, slot: int) -> None:
        before, after = self._before[slot], self._next[slot]
        self._next[before], self._before[after] = after, before

    def _page_after(self, bookmark: int, max_paths: int) -> list[str]:
        page: list[str] = []
        slot = self._next[bookmark]
        while slot and len(page) < max_paths:
            if self._length[slot]:  # else it is another's bookmark
                page.append(self.path_at(slot))
            slot = self._next[slot]
        self._unlink(bookmark)
        self._link(bookmark, slot)
        return page


class _Folders:
    """Numbers the folders that have entries."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._entries: list[int] = []
        self._free: list[int] = []

    def enter(self, folder: str) -> int:
        number = self._numbers.get(folder)
        if number is None:
            if self._free:
                number = self._free.pop()
                self.names[number] = folder
            else:
                number = len(self.names)
                self.names.append(folder)
                self._entries.append(0)
            self._numbers[folder] = number
        self._entries[number] += 1
        return number

    def leave(self, number: int) -> None:
        self._entries[number] -= 1
        if not self._entries[number]:
            del self._numbers[self.names[number]]
            self.names[number] = ""
            self._free.append(number)
