"""The stamp of a cached file, and the read that checks a file's crc32c against it.

A file's extended attribute `user.gcs.object` holds "<generation> <size in bytes> <crc32c> <crc32c of its path in the cache>",
the last two as 8 hexadecimal digits. It is one short attribute, so that ext4 keeps it within the inode. Readers check what they
read against it: a truncated, flipped, edited or emptied file is a miss, never wrong bytes, and so is an intact file that was
moved to another object's path. If the path is a hash of the object's name, `user.gcs.name` holds the object's URI.
"""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from gcs_prefetchd.shared.errors import InvalidNameError
from gcs_prefetchd.shared.objects import ObjectName, parse_object_uri

__all__ = [
    "OPEN_FLAGS",
    "Stamp",
    "crc32c_of",
    "is_intact",
    "read_checked",
    "read_object_name",
    "read_stamp",
    "write_object_name",
    "write_stamp",
]

ATTRIBUTE = "user.gcs.object"
NAME_ATTRIBUTE = "user.gcs.name"
# A planted FIFO or device must not block the reader, and a planted link must not lead it elsewhere.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # this process lacks something: not an error of the file


@dataclass(frozen=True, slots=True)
class Stamp:
    """The bytes that a file should hold: the object's generation, size in bytes and crc32c."""

    generation: int
    size: int
    crc32c: int

    def to_bytes(self) -> bytes:
        """The attribute's value."""
        return f"{self.generation} {self.size} {self.crc32c:08x}".encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> "Stamp | None":
        """Parse the attribute's value; None if it is not a stamp."""
        try:
            generation_text, size_text, crc32c_text = value.decode("ascii").split(" ")
            generation, size, crc32c = int(generation_text), int(size_text), int(crc32c_text, 16)
        except ValueError:
            return None
        # Any user who may write the file can set any number; indexes of stamps have space for these.
        fits = 0 <= generation < 1 << 64 and 0 <= size < 1 << 63 and 0 <= crc32c < 1 << 32
        return cls(generation, size, crc32c) if fits else None


def crc32c_of(data: bytes) -> int:
    """The crc32c of the bytes, as GCS computes it."""
    return int(google_crc32c.value(data))


def write_stamp(file: int, stamp: Stamp, path: str) -> None:
    """Stamp an open file for its path (`paths.cache_path`). Raises OSError if the file system has no user attributes."""
    os.setxattr(file, ATTRIBUTE, _value(stamp, path))


def read_stamp(file: int | Path | str, path: str) -> Stamp | None:
    """The stamp of the file at this path, open or not; None if it has none, or one for another path."""
    try:
        value, _, path_crc32c = os.getxattr(file, ATTRIBUTE).rpartition(b" ")
    except OSError:
        return None
    return Stamp.from_bytes(value) if path_crc32c == _path_crc32c(path) else None


def write_object_name(file: int, name: ObjectName) -> None:
    """Store the object's URI with a file whose path does not contain its name. Raises OSError."""
    os.setxattr(file, NAME_ATTRIBUTE, name.uri.encode())


def read_object_name(file: Path) -> ObjectName | None:
    """The object of a file whose path is a hash, or None."""
    try:
        return parse_object_uri(os.getxattr(file, NAME_ATTRIBUTE).decode())
    except (OSError, ValueError, InvalidNameError):
        return None


def read_checked(objects: Path | str, path: str, expected: Stamp | None = None) -> bytes | None:
    """The bytes of the file at `objects/path` if they match its stamp, and `expected` if given; otherwise None."""
    try:
        return _open_and_read(objects, path, expected)
    except (OSError, ValueError):
        return None


def is_intact(objects: Path | str, path: str, expected: Stamp) -> bool:
    """Whether `read_checked` returns the bytes. True for a file that cannot be opened for lack of descriptors or memory."""
    try:
        return _open_and_read(objects, path, expected) is not None
    except MemoryError:
        return True
    except OSError as exc:
        return exc.errno in RESOURCE_ERRORS


def _open_and_read(objects: Path | str, path: str, expected: Stamp | None) -> bytes | None:
    file = os.open(f"{objects}/{path}", OPEN_FLAGS)
    try:
        return _read_checked(file, path, expected)
    finally:
        os.close(file)


def _read_checked(file: int, path: str, expected: Stamp | None) -> bytes | None:
    status = os.fstat(file)
    if expected is None:
        stamp = read_stamp(file, path)
    else:
        stamp = expected if os.getxattr(file, ATTRIBUTE) == _value(expected, path) else None
    if stamp is None or not stat.S_ISREG(status.st_mode) or status.st_size != stamp.size:
        return None
    data = _read_all(file, stamp.size)
    return data if len(data) == stamp.size and crc32c_of(data) == stamp.crc32c else None


def _read_all(file: int, size_bytes: int) -> bytes:
    # A file object would query size and position again, and the end once more: half of the time of a read.
    data = os.read(file, size_bytes)
    while len(data) < size_bytes and (more := os.read(file, size_bytes - len(data))):  # a read returns at most 2 GiB
        data += more
    return data


def _value(stamp: Stamp, path: str) -> bytes:
    return stamp.to_bytes() + b" " + _path_crc32c(path)


def _path_crc32c(path: str) -> bytes:
    return b"%08x" % crc32c_of(os.fsencode(path))
