"""The file of one object on its way into the cache: bytes in `tmp/`, then stamped and renamed."""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.safe_folders import Folders
from gcs_prefetchd.shared.checksums import Stamp, write_object_name, write_stamp
from gcs_prefetchd.shared.errors import CacheWriteError
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import name_of

__all__ = ["FileSink", "UnfinishedFile", "publish"]

MOST_CHUNKS = 1024  # the kernel's IOV_MAX
BUFFER_BYTES = 1 << 20  # below this an object is written in one go, in the same call that publishes it


class UnfinishedFile:
    """`temporary` is one of `directory.temporary`, made by the first `append`; `objects/path` is where it will lie.

    All of it blocks, in one thread at a time. Ends in `finish` or in `discard`. They raise OSError.
    """

    def __init__(self, directory: CacheDirectory, folders: Folders, temporary: str, name: ObjectName, path: str) -> None:
        self.published: Stamp | None = None
        self._directory = directory
        self._folders = folders
        self._temporary = temporary
        self._name = name
        self._path = path
        self._file: int | None = None

    def append(self, chunks: Sequence[bytes]) -> None:
        """Write the next bytes."""
        if self._file is None:
            self._file = self._directory.open_temporary(self._temporary)
        _write_all(self._file, chunks)

    def truncate(self) -> None:
        """Begin at byte 0."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)

    def finish(self, chunks: Sequence[bytes], stamp: Stamp) -> None:
        """Write the last bytes and give the file, whole and checked, its stamp and its final name."""
        self.append(chunks)
        assert self._file is not None
        hashed_name = self._name if name_of(self._path) is None else None
        publish(self._file, self._temporary, self._folders, self._path, stamp, hashed_name)
        self.published = stamp
        self._close()

    def discard(self) -> None:
        """Leave nothing of it, unless it was published."""
        self._close()
        if self.published is None:
            self._directory.discard_temporary(self._temporary)

    def refusal(self, exc: OSError) -> CacheWriteError:
        """What is raised where the disk refuses, in a line that names the object."""
        return CacheWriteError(f"cache {self._name.uri}: {exc.strerror} ({self._directory.path})")

    def _close(self) -> None:
        file, self._file = self._file, None  # closed once, whatever happens: its number may be another file's by then
        if file is not None:
            with contextlib.suppress(OSError):  # bytes that have not reached the disk are a miss to whoever reads them
                os.close(file)


class FileSink(ABC):
    """A sink of `Downloader.download` that writes into a file. Raises CacheWriteError where the disk refuses."""

    def __init__(self, file: UnfinishedFile) -> None:
        self._file = file
        self._chunks: list[bytes] = []
        self._buffered = self._landed_bytes = 0
        self._is_on_disk = False  # some of it is, or is on its way there

    async def begin(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0."""
        self._chunks.clear()
        self._buffered = self._landed_bytes = 0
        if self._is_on_disk:
            await self._on_disk(self._file.truncate)
            self._landed(0)

    async def write(self, chunk: bytes) -> None:
        """The next bytes."""
        self._chunks.append(chunk)
        self._buffered += len(chunk)
        if self._buffered >= BUFFER_BYTES:
            chunks, self._chunks, size_bytes, self._buffered = self._chunks, [], self._buffered, 0
            await self._on_disk(partial(self._file.append, chunks))
            self._landed_bytes += size_bytes
            self._landed(self._landed_bytes)

    async def _finish(self, stamp: Stamp) -> None:
        await self._on_disk(partial(self._file.finish, self._chunks, stamp))

    async def _on_disk(self, call: Callable[[], None]) -> None:
        self._is_on_disk = True
        try:
            await self._make(call)
        except OSError as exc:
            raise self._file.refusal(exc) from exc

    @abstractmethod
    async def _make(self, call: Callable[[], None]) -> None:
        """Make a call that blocks, after those before it."""

    @abstractmethod
    def _landed(self, size_bytes: int) -> None:
        """So many of the bytes are on the disk now."""


def publish(file: int, temporary: str, folders: Folders, path: str, stamp: Stamp, hashed_name: ObjectName | None) -> None:
    """Stamp a whole and checked file, open as `file`, and give it its final name, `objects/path`. Raises OSError."""
    folders.check(path)
    write_stamp(file, stamp, path)
    if hashed_name is not None:  # the path does not tell whose it is
        write_object_name(file, hashed_name)
    final = f"{folders.objects}/{path}"
    try:
        os.rename(temporary, final)  # noqa: PTH104  # a Path costs as much as the call
    except FileNotFoundError:
        folders.make(path)
        os.rename(temporary, final)  # noqa: PTH104


def _write_all(file: int, chunks: Sequence[bytes]) -> None:
    """Write the chunks, as a rule by one system call: each time a thread comes back from one it stands in line for the GIL."""
    left: list[bytes | memoryview] = list(chunks)
    while left:
        written = os.writev(file, left[:MOST_CHUNKS])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = memoryview(left[0])[written:]
