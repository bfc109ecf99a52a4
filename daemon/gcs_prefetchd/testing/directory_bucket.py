"""A bucket backed by a directory: files are read on demand, hashed once, and never written."""

import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from mimetypes import guess_type
from os import scandir, stat_result
from pathlib import Path
from stat import S_ISREG

from gcs_prefetchd.shared.errors import SettingsError
from gcs_prefetchd.testing.paths import is_bucket_name
from gcs_prefetchd.testing.stored_objects import Attributes, MemoryBucket, StoredObject, check_object_name, digests

__all__ = ["DiskBucket", "open_root"]

PIECE_BYTES = 1 << 20


def open_root(root: Path) -> "dict[str, DiskBucket]":
    """Return a bucket for each directory in `root`; raises SettingsError if `root` is not a readable directory."""
    try:
        directories = sorted(path for path in root.iterdir() if path.is_dir() and is_bucket_name(path.name))
    except OSError as exc:
        raise SettingsError(f"root {root}: {exc.strerror or exc}") from exc
    if not directories:
        raise SettingsError(f"root {root}: holds no directory to serve as a bucket")
    return {path.name: DiskBucket(path.name, path) for path in directories}


class DiskBucket:
    """A directory as a bucket: a file's generation is its modification time in microseconds.

    Uploads and deletions stay in memory and hide what is on disk. Links to files are followed, links to directories are not.
    """

    def __init__(self, bucket: str, directory: Path) -> None:
        self._bucket = bucket
        self._directory = directory
        self._known: dict[str, tuple[tuple[int, int], StoredObject]] = {}
        self._uploaded = MemoryBucket(bucket)
        self._hidden: set[str] = set()
        self._lock = threading.Lock()  # several threads respond

    def is_quick(self, name: str) -> bool:
        """Return whether the object was hashed before, so that `get` costs one stat."""
        return name in self._known or name in self._hidden

    def get(self, name: str) -> StoredObject | None:
        """Return the object for the file's current content; reads the complete file if it is new or has changed."""
        if name in self._hidden:
            return self._uploaded.get(name)
        path = self._path(name)
        try:
            status = path.stat() if path is not None else None
            if path is None or status is None or not S_ISREG(status.st_mode):
                return None
            version = (status.st_mtime_ns, status.st_size)
            known = self._known.get(name)
            if known is not None and known[0] == version:
                return known[1]
            stored = self._read(name, path, status)
        except OSError:
            return None
        self._known[name] = (version, stored)
        return stored

    def names(self) -> Sequence[str]:
        """Return all names, sorted; reads the directories at each call."""
        with self._lock:
            shown = {name for name in _files(self._directory, "") if name not in self._hidden}
            return sorted(shown.union(self._uploaded.names()))

    def put(self, name: str, data: bytes, attributes: Attributes, generation: int | None = None) -> StoredObject:
        """Store `data` in memory, hiding any file of that name."""
        check_object_name(name)
        with self._lock:
            self._hidden.add(name)
            return self._uploaded.put(name, data, attributes, generation)

    def delete(self, name: str) -> bool:
        """Delete the object from memory and hide its file, which stays."""
        existed = self.get(name) is not None
        with self._lock:
            self._hidden.add(name)
            self._uploaded.delete(name)
        return existed

    def _path(self, name: str) -> Path | None:
        """Return where an object's file would be, or None for a name that no file in the directory can have."""
        segments = name.split("/")
        if "\0" in name or any(segment in {"", ".", ".."} for segment in segments):
            return None
        return self._directory.joinpath(*segments)

    def _read(self, name: str, path: Path, status: stat_result) -> StoredObject:
        crc32c, md5 = digests(_pieces(path))
        content_type, _ = guess_type(name)
        return StoredObject(
            bucket=self._bucket,
            name=name,
            generation=status.st_mtime_ns // 1000,
            size_bytes=status.st_size,
            crc32c=crc32c,
            md5=md5,
            updated=datetime.fromtimestamp(status.st_mtime, UTC),
            attributes=Attributes(content_type or "application/octet-stream"),
            source=path,
        )


def _files(directory: Path, prefix: str) -> Iterator[str]:
    with scandir(directory) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _files(directory / entry.name, name + "/")
            elif entry.is_file() and _is_unicode(name):
                yield name


def _is_unicode(name: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in name)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
