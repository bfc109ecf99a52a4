"""The temporary file of one object: written in `tmp/`, then stamped and renamed to its final name."""

import contextlib
import os
from collections.abc import Sequence

from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.safe_folders import SafeFolders
from gcs_prefetchd.shared.checked_read import Stamp, write_object_name, write_stamp
from gcs_prefetchd.shared.errors import CacheWriteError
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.shared.paths import object_at_path

__all__ = ["TempFile", "publish_file"]

MAX_CHUNKS = 1024  # the kernel's IOV_MAX


class TempFile:
    """`temp_path` is a path from `directory.new_temp_path`, created by the first `write`; `objects/path` is its final name.

    Every method blocks; call them from one thread at a time, and finish with `publish` or `discard`. They raise OSError.
    """

    def __init__(self, directory: CacheDirectory, folders: SafeFolders, temp_path: str, name: ObjectName, path: str) -> None:
        self.published: Stamp | None = None
        self._directory = directory
        self._folders = folders
        self._temp_path = temp_path
        self._name = name
        self._path = path
        self._file: int | None = None

    def write(self, chunks: Sequence[bytes]) -> None:
        """Write the next bytes."""
        if self._file is None:
            self._file = self._directory.open_temp_file(self._temp_path)
        _write_all(self._file, chunks)

    def truncate(self) -> None:
        """Start again at byte 0."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)

    def publish(self, chunks: Sequence[bytes], stamp: Stamp) -> None:
        """Write the last bytes of the object, which was checked, and give the file its stamp and its final name."""
        self.write(chunks)
        assert self._file is not None
        hashed_name = self._name if object_at_path(self._path) is None else None
        publish_file(self._file, self._temp_path, self._folders, self._path, stamp, hashed_name)
        self.published = stamp
        self._close()

    def discard(self) -> None:
        """Remove the file, unless it was published."""
        self._close()
        if self.published is None:
            self._directory.remove_temp_file(self._temp_path)

    def write_error(self, exc: OSError) -> CacheWriteError:
        """The error to raise if the disk fails: one line that names the object."""
        return CacheWriteError(f"cache {self._name.uri}: {exc.strerror} ({self._directory.path})")

    def _close(self) -> None:
        file, self._file = self._file, None  # close it only once: its number may soon be another file's
        if file is not None:
            with contextlib.suppress(OSError):  # readers treat a file as a miss if its bytes did not reach the disk
                os.close(file)


def publish_file(
    file: int, temp_path: str, folders: SafeFolders, path: str, stamp: Stamp, hashed_name: ObjectName | None
) -> None:
    """Stamp a complete and checked file, open as `file`, and rename it to `objects/path`. Raises OSError."""
    folders.check(path)
    write_stamp(file, stamp, path)
    if hashed_name is not None:  # the path does not contain the object's name
        write_object_name(file, hashed_name)
    final = f"{folders.objects}/{path}"
    try:
        os.rename(temp_path, final)  # noqa: PTH104  # a Path costs as much as the call
    except FileNotFoundError:
        folders.make_parents(path)
        os.rename(temp_path, final)  # noqa: PTH104


def _write_all(file: int, chunks: Sequence[bytes]) -> None:
    """Write the chunks, usually by one system call: after each call, a thread waits for the GIL again."""
    left: list[bytes | memoryview] = list(chunks)
    while left:
        written = os.writev(file, left[:MAX_CHUNKS])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = memoryview(left[0])[written:]
