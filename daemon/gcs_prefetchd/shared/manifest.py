"""The frozen listing of a data root: sorted ids and, for each part of an item, generation, size and crc32c.

On disk it is a folder of `.npy` files named by a digest, which the daemon writes once and every worker maps into memory:
a million items cost a worker no Python strings of its own.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from gcs_prefetchd.shared.errors import ManifestError
from gcs_prefetchd.shared.item_ids import ByteArray, Ids, Int64Array, select_texts, sort_texts
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion

__all__ = [
    "UNKNOWN_CRC32C",
    "Ids",
    "Manifest",
    "ManifestBuilder",
    "ObjectColumns",
    "build_manifest",
    "is_abandoned",
    "is_digest",
    "load_manifest",
]

UNKNOWN_CRC32C = -1
BUILD_BATCH = 1000  # objects, as many as on a page
UNFINISHED = ".tmp"
# In a container every daemon may have the same process id: this distinguishes a manifest that we are writing from one that an
# earlier daemon left.
_OURS = secrets.token_hex(4)


@dataclass(frozen=True, slots=True, eq=False)
class ObjectColumns:
    """Objects of one bucket in columns: their names, generations, sizes (bytes) and crc32c (-1 if GCS named none)."""

    names: Sequence[str]
    generation: Int64Array
    size: Int64Array
    crc32c: Int64Array

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice) -> "ObjectColumns":
        return ObjectColumns(self.names[rows], self.generation[rows], self.size[rows], self.crc32c[rows])

    def versions(self, bucket: str) -> Iterator[ObjectVersion]:
        """The version of each object."""
        columns = (self.generation.tolist(), self.size.tolist(), self.crc32c.tolist())
        for name, generation, size, crc32c in zip(self.names, *columns, strict=True):
            yield ObjectVersion(ObjectName(bucket, name), generation, size, None if crc32c == UNKNOWN_CRC32C else crc32c)

    @classmethod
    def from_versions(cls, versions: Sequence[ObjectVersion]) -> "ObjectColumns":
        """These versions in columns."""
        columns = np.array(
            [(v.generation, v.size, UNKNOWN_CRC32C if v.crc32c is None else v.crc32c) for v in versions], dtype=np.int64
        ).reshape(-1, 3)
        return cls([v.name.name for v in versions], columns[:, 0], columns[:, 1], columns[:, 2])


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """The items of a data root at one moment.

    `generation`, `size` (bytes) and `crc32c` (-1 if unknown) have the shape (items, parts).
    `incomplete` names the objects that are missing from items; those items are left out.
    """

    data_root: DataRoot
    item_patterns: ItemPatterns
    ids: Ids
    generation: Int64Array
    size: Int64Array
    crc32c: Int64Array
    incomplete: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    def versions(self, item: int) -> list[ObjectVersion]:
        """The item's parts, in the order of the patterns."""
        return [self.version(item, part) for part in range(len(self.item_patterns.patterns))]

    def version(self, item: int, part: int) -> ObjectVersion:
        """One part of an item, as it was when the data root was listed."""
        crc32c = int(self.crc32c[item, part])
        return ObjectVersion(
            self.part_name(item, part),
            int(self.generation[item, part]),
            int(self.size[item, part]),
            None if crc32c == UNKNOWN_CRC32C else crc32c,
        )

    def part_name(self, item: int, part: int) -> ObjectName:
        """The name of the object with this part."""
        name = self.data_root.folder + self.item_patterns.part_name(self.ids[item], part)
        return ObjectName(self.data_root.bucket, name)

    def find(self, name: ObjectName) -> tuple[int, int] | None:
        """The item and part of an object, or None if it is not in this manifest."""
        if name not in self.data_root:
            return None
        match = self.item_patterns.match(name.name[len(self.data_root.folder) :])
        if match is None:
            return None
        item = self.ids.find(match[0])
        return None if item is None else (item, match[1])

    def save(self, manifests: Path) -> Path:
        """Write it to `manifests/<digest>/`, first under a temporary name. Returns the folder, which is then the newest."""
        folder = manifests / self.digest
        if folder.exists():
            try:
                load_manifest(folder)
            except ManifestError:  # damaged by a power cut: while the listing is unchanged, no other save would replace it
                shutil.rmtree(folder)
            else:
                _make_newest(folder)
                return folder
        unfinished = manifests / f"{self.digest}.{os.getpid()}.{_OURS}{UNFINISHED}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        description = {"data_root": self.data_root.uri, "patterns": self.item_patterns.patterns, "incomplete": self.incomplete}
        try:
            for name, array in self._arrays().items():
                np.save(unfinished / f"{name}.npy", array)
            (unfinished / "manifest.json").write_text(json.dumps(description))
            unfinished.rename(folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            if not folder.exists():  # otherwise another thread was first: the same digest is the same manifest
                raise
        _make_newest(folder)
        return folder

    def _arrays(self) -> dict[str, ByteArray | Int64Array]:
        return {
            "ids": self.ids.text,
            "ends": self.ids.ends,
            "generation": self.generation,
            "size": self.size,
            "crc32c": self.crc32c,
        }


class ManifestBuilder:
    """Collects the listed objects of a data root, a page at a time and in any order, in columns of numbers and bytes.

    A page blocks the event loop for well under a millisecond. `build` takes seconds for millions of objects, nearly all of that
    in array operations, so that a thread can run it beside the loop.
    """

    def __init__(self, data_root: DataRoot, item_patterns: ItemPatterns) -> None:
        self.listed_objects = 0  # including those that are not part of an item
        self._data_root = data_root
        self._item_patterns = item_patterns
        self._ids: list[bytes] = []
        self._columns: list[Int64Array] = []  # for each page: length of the id, part, generation, size, crc32c

    def add(self, objects: ObjectColumns) -> None:
        """Add objects. Those without a matching pattern are ignored; of an object listed twice the last one counts."""
        self.listed_objects += len(objects)
        start, match = len(self._data_root.folder), self._item_patterns.match
        matches = [match(name[start:]) for name in objects.names]
        rows = [row for row, found in enumerate(matches) if found is not None]
        ids = [found[0].encode() for found in matches if found is not None]
        parts = [found[1] for found in matches if found is not None]
        columns = (objects.generation[rows], objects.size[rows], objects.crc32c[rows])
        self._ids.append(b"".join(ids))
        self._columns.append(np.array([list(map(len, ids)), parts, *columns], dtype=np.int64))

    def build(self) -> Manifest:
        """The manifest of the complete items; `incomplete` names what is missing from the others."""
        text = np.frombuffer(b"".join(self._ids), dtype=np.uint8)
        columns = np.concatenate([np.empty((5, 0), dtype=np.int64), *self._columns], axis=1)
        lengths, parts = columns[:2]
        ends = np.cumsum(lengths)
        order, is_first = sort_texts(text, ends)
        item_of = np.empty(len(order), dtype=np.int64)
        item_of[order] = np.cumsum(is_first) - 1
        # The row of each part of each item in the columns, or -1.
        rows = np.full((int(is_first.sum()), len(self._item_patterns.patterns)), -1, dtype=np.int64)
        rows[item_of, parts] = np.arange(len(order))
        is_complete = (rows >= 0).all(axis=1)
        incomplete = self._missing(text, ends, rows[~is_complete])
        rows = rows[is_complete]
        ids = Ids(*select_texts(text, ends, rows[:, 0]))
        generation, size, crc32c = (column[rows] for column in columns[2:])
        digest = _digest(self._data_root, self._item_patterns, [ids.text, ids.ends, generation, size, crc32c])
        return Manifest(self._data_root, self._item_patterns, ids, generation, size, crc32c, incomplete, digest)

    def _missing(self, text: ByteArray, ends: Int64Array, rows: Int64Array) -> tuple[str, ...]:
        ids = Ids(*select_texts(text, ends, rows.max(axis=1, initial=0)))
        root, item_patterns = self._data_root.uri, self._item_patterns
        return tuple(f"{root}/{item_patterns.part_name(ids[int(item)], int(part))}" for item, part in np.argwhere(rows < 0))


def build_manifest(data_root: DataRoot, item_patterns: ItemPatterns, objects: Iterable[ObjectVersion]) -> Manifest:
    """Build a manifest. Objects without a matching pattern are ignored; items without all parts are named and left out."""
    builder, remaining = ManifestBuilder(data_root, item_patterns), iter(objects)
    while batch := list(islice(remaining, BUILD_BATCH)):
        builder.add(ObjectColumns.from_versions(batch))
    return builder.build()


def load_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Map a saved manifest into memory. Raises ManifestError if it is missing or damaged.

    Without `verify` only the form of the files is checked, not whether their content matches the folder's name.
    """
    try:
        description = json.loads((folder / "manifest.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _KINDS}
        data_root, item_patterns = DataRoot.parse(description["data_root"]), ItemPatterns(tuple(description["patterns"]))
        incomplete = tuple(description["incomplete"])
    except Exception as exc:  # damaged bytes can raise anything in the parsers of JSON and of numpy's headers
        raise ManifestError(f"manifest {folder}: cannot be read ({type(exc).__name__}: {exc})") from exc
    wrong = ManifestError(f"manifest {folder}: its content does not match its name")
    if {name: str(array.dtype) for name, array in arrays.items()} != _KINDS:
        raise wrong
    shape = (len(arrays["ends"]), len(item_patterns.patterns))
    if arrays["ids"].ndim != 1 or arrays["ends"].ndim != 1 or any(arrays[name].shape != shape for name in _OF_PARTS):
        raise ManifestError(f"manifest {folder}: its arrays differ in length")
    # About 0.1 s for a million items; a wrong generation would make every reader of the item fail.
    if verify and _digest(data_root, item_patterns, list(arrays.values())) != folder.name:
        raise wrong
    ids = Ids(arrays["ids"], arrays["ends"], folder, _map_ids)
    return Manifest(
        data_root, item_patterns, ids, arrays["generation"], arrays["size"], arrays["crc32c"], incomplete, folder.name
    )


def _map_ids(folder: Path) -> Ids:
    # The process that sends the ids has verified the digest.
    return load_manifest(folder, verify=False).ids


def _make_newest(folder: Path) -> None:
    """Give it the latest time, whatever the clock shows: the clock may have been ahead when the others were saved."""
    latest_ns = max((other.stat().st_mtime_ns for other in folder.parent.iterdir() if other != folder), default=0)
    os.utime(folder, ns=(max(time.time_ns(), latest_ns + 1),) * 2)


def is_digest(name: str) -> bool:
    """Whether a folder has the name of a manifest; other files beside the manifests are not ours."""
    return re.fullmatch(r"[0-9a-f]{32}", name) is not None


def is_abandoned(unfinished: Path) -> bool:
    """Whether the folder is an unfinished manifest whose process is gone."""
    digest, _, writer = unfinished.name.removesuffix(UNFINISHED).partition(".")
    pid, _, token = writer.partition(".")
    if unfinished.suffix != UNFINISHED or not is_digest(digest) or not pid.isdecimal():
        return False
    if int(pid) == os.getpid():
        return token != _OURS
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # it is alive, as another user
    return False


_OF_PARTS = ("generation", "size", "crc32c")
_KINDS = {"ids": "uint8", "ends": "int64", **dict.fromkeys(_OF_PARTS, "int64")}


def _digest(data_root: DataRoot, item_patterns: ItemPatterns, arrays: Sequence[ByteArray | Int64Array]) -> str:
    digest = hashlib.blake2b(json.dumps([data_root.uri, item_patterns.patterns]).encode(), digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
