"""The frozen listing of a data root: sorted ids and, for each part of an item, generation, size and crc32c.

On disk it is a folder of `.npy` files named by a digest, which the daemon writes once and every worker maps into memory:
a million items cost a worker no Python strings of its own.
"""

import hashlib
import json
import os
import shutil
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from gcs_prefetchd.errors import ManifestError, SettingsError
from gcs_prefetchd.names import DataRoot, ObjectName

__all__ = [
    "IMAGE_PATTERN",
    "LABEL_PATTERN",
    "Ids",
    "Layout",
    "Manifest",
    "ObjectVersion",
    "build_manifest",
    "load_manifest",
]

IMAGE_PATTERN = "images/{id}.jpg"
LABEL_PATTERN = "labels/{id}.png"
UNKNOWN_CRC32C = -1


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One generation of an object, as a listing or a response names it. `crc32c` is None where GCS told none."""

    name: ObjectName
    generation: int
    size: int
    crc32c: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of an item lie below the data root: one pattern with `{id}` for each part, images first."""

    patterns: tuple[str, ...] = (IMAGE_PATTERN, LABEL_PATTERN)

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if pattern.count("{id}") != 1:
                raise SettingsError(f"pattern {pattern!r} must hold {{id}} once, as in {IMAGE_PATTERN!r}")
        if len(set(self.patterns)) != len(self.patterns):
            raise SettingsError(f"pattern {self.patterns[0]!r} stands for both the image and the label")

    def part_name(self, item_id: str, part: int) -> str:
        """The object's name below the data root."""
        before, after = self.patterns[part].split("{id}")
        return f"{before}{item_id}{after}"

    def match(self, name: str) -> tuple[str, int] | None:
        """The id and the part that the name (below the data root) stands for, or None."""
        best = None
        most = -1
        for part, pattern in enumerate(self.patterns):
            before, after = pattern.split("{id}")
            fixed = len(before) + len(after)
            # `7_mask.png` fits both `{id}.png` and `{id}_mask.png`: the pattern that says more of it is meant.
            if fixed > most and len(name) > fixed and name.startswith(before) and name.endswith(after):
                best, most = (name[len(before) : len(name) - len(after)], part), fixed
        return best

    def folders(self) -> list[str]:
        """The prefixes (below the data root) whose listings hold every part; none lies within another."""
        starts = sorted({pattern.split("{id}")[0] for pattern in self.patterns})
        return [start for start in starts if not any(start != other and start.startswith(other) for other in starts)]


class Ids(Sequence[str]):
    """Sorted ids in one memory-mapped block of UTF-8; behaves as a list of str without holding one."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64], folder: Path | None = None) -> None:
        self._text = text
        self._ends = ends
        self._folder = folder

    @classmethod
    def of(cls, ids: Iterable[str]) -> "Ids":
        """The ids, which must be sorted."""
        encoded = [item_id.encode() for item_id in ids]
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self._at(index % len(self))

    def __iter__(self) -> Iterator[str]:
        return map(self._at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Ids):
            return np.array_equal(self._ends, other._ends) and np.array_equal(self._text, other._text)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # a list of ids has no hash either

    def find(self, item_id: str) -> int | None:
        """The index of the id, or None. Takes log2(n) steps."""
        index = bisect_left(self, item_id)
        return index if index < len(self) and self._at(index) == item_id else None

    def _at(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].tobytes().decode()

    def __reduce__(self) -> tuple[object, ...]:
        # Spawned workers map the files that the ids came from, instead of a copy of their own through a pipe.
        if self._folder is not None and self._folder.exists():
            return _map_ids, (self._folder,)
        return Ids, (np.asarray(self._text), np.asarray(self._ends))

    @property
    def arrays(self) -> dict[str, NDArray[np.uint8] | NDArray[np.int64]]:
        """The block of text and where each id ends in it, as they are saved."""
        return {"ids": self._text, "ends": self._ends}


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """The items of a data root at one moment.

    `generation`, `size` (bytes) and `crc32c` (-1 where unknown) have the shape (items, parts).
    `incomplete` names the objects that some item lacks; those items are left out.
    """

    data_root: DataRoot
    layout: Layout
    ids: Ids
    generation: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32c: NDArray[np.int64]
    incomplete: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    def versions(self, item: int) -> list[ObjectVersion]:
        """The item's parts, in the layout's order."""
        return [self.version(item, part) for part in range(len(self.layout.patterns))]

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
        """The object that holds this part."""
        name = self.data_root.folder + self.layout.part_name(self.ids[item], part)
        return ObjectName(self.data_root.bucket, name)

    def find(self, name: ObjectName) -> tuple[int, int] | None:
        """The item and part that an object is, or None where it is none of this manifest's."""
        if name not in self.data_root:
            return None
        match = self.layout.match(name.name[len(self.data_root.folder) :])
        if match is None:
            return None
        item = self.ids.find(match[0])
        return None if item is None else (item, match[1])

    def changed_since(self, before: "Manifest") -> Iterator[ObjectVersion]:
        """The objects whose generation is not what it was in an earlier manifest; new ones are not among them."""
        known = {item_id: index for index, item_id in enumerate(before.ids)}
        for item, item_id in enumerate(self.ids):
            index = known.get(item_id)
            if index is not None:
                for part in np.flatnonzero(self.generation[item] != before.generation[index]):
                    yield self.version(item, int(part))

    def save(self, manifests: Path) -> Path:
        """Write it to `manifests/<digest>/` under a temporary name first; returns the folder."""
        folder = manifests / self.digest
        if folder.exists():
            try:
                load_manifest(folder)
            except ManifestError:  # a power cut left it: its digest would bring no other one for as long as nothing changes
                shutil.rmtree(folder)
            else:
                return folder
        unfinished = manifests / f"{self.digest}.{os.getpid()}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, array in self._arrays().items():
            np.save(unfinished / f"{name}.npy", array)
        about = {"data_root": self.data_root.uri, "patterns": self.layout.patterns, "incomplete": self.incomplete}
        (unfinished / "manifest.json").write_text(json.dumps(about))
        try:
            unfinished.rename(folder)
        except OSError:
            shutil.rmtree(unfinished)  # another thread was first: the same digest is the same manifest
            if not folder.exists():
                raise
        return folder

    def _arrays(self) -> dict[str, NDArray[np.uint8] | NDArray[np.int64]]:
        return {**self.ids.arrays, "generation": self.generation, "size": self.size, "crc32c": self.crc32c}


def build_manifest(data_root: DataRoot, layout: Layout, objects: Iterable[ObjectVersion]) -> Manifest:
    """Freeze a listing. Objects that no pattern matches are passed over; items that lack a part are named and left out."""
    parts: list[dict[str, ObjectVersion]] = [{} for _ in layout.patterns]
    start = len(data_root.folder)
    for version in objects:
        match = layout.match(version.name.name[start:])
        if match is not None:
            parts[match[1]][match[0]] = version
    everything = sorted(set().union(*parts))
    complete = [item_id for item_id in everything if all(item_id in part for part in parts)]
    lacking = [
        f"{data_root.uri}/{layout.part_name(item_id, index)}"
        for item_id in everything
        for index, part in enumerate(parts)
        if item_id not in part
    ]
    rows = [[part[item_id] for part in parts] for item_id in complete]
    shape = (len(complete), len(parts))
    generation = np.array([[v.generation for v in row] for row in rows], dtype=np.int64).reshape(shape)
    size = np.array([[v.size for v in row] for row in rows], dtype=np.int64).reshape(shape)
    crc32c = np.array(
        [[UNKNOWN_CRC32C if v.crc32c is None else v.crc32c for v in row] for row in rows], dtype=np.int64
    ).reshape(shape)
    ids = Ids.of(complete)
    digest = _digest(data_root, layout, [*ids.arrays.values(), generation, size, crc32c])
    return Manifest(data_root, layout, ids, generation, size, crc32c, tuple(lacking), digest)


def load_manifest(folder: Path) -> Manifest:
    """Map a saved manifest into memory; raises ManifestError where it is missing or damaged."""
    try:
        about = json.loads((folder / "manifest.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _KINDS}
        data_root, layout = DataRoot.parse(about["data_root"]), Layout(tuple(about["patterns"]))
        incomplete = tuple(about["incomplete"])
    except Exception as exc:  # damaged bytes bring out anything in the parsers of JSON and of numpy's headers
        raise ManifestError(f"manifest {folder}: cannot be read ({type(exc).__name__}: {exc})") from exc
    ids = Ids(arrays["ids"], arrays["ends"], folder)
    shape = (len(ids), len(layout.patterns))
    if any(arrays[name].shape != shape for name in ("generation", "size", "crc32c")):
        raise ManifestError(f"manifest {folder}: its arrays differ in length")
    # About 0.1 s for a million items, against a wrong generation that would make every reader of it fail.
    kinds = {name: str(array.dtype) for name, array in arrays.items()}
    if kinds != _KINDS or _digest(data_root, layout, list(arrays.values())) != folder.name:
        raise ManifestError(f"manifest {folder}: its content is not what its name says")
    return Manifest(data_root, layout, ids, arrays["generation"], arrays["size"], arrays["crc32c"], incomplete, folder.name)


def _map_ids(folder: Path) -> Ids:
    return load_manifest(folder).ids


_KINDS = {"ids": "uint8", "ends": "int64", "generation": "int64", "size": "int64", "crc32c": "int64"}


def _digest(data_root: DataRoot, layout: Layout, arrays: Sequence[NDArray[np.uint8] | NDArray[np.int64]]) -> str:
    digest = hashlib.blake2b(json.dumps([data_root.uri, layout.patterns]).encode(), digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
