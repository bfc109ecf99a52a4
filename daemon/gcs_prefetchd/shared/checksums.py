"""The stamp that every cached file carries, and the checked read that trusts nothing else.

A file's extended attribute `user.gcs.object` holds "<generation> <size in bytes> <crc32c> <crc32c of its path in the cache>",
the last two as 8 hexadecimal digits. One short attribute, so that ext4 keeps it within the inode. Readers check what they
read against it: a truncated, flipped, edited or emptied file is a miss, never wrong bytes, and so is a whole file that was
moved to another object's path. Where the path is a hash of the object's name, `user.gcs.name` holds its URI.
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
# A planted FIFO or device must not hang the reader, a planted link must not lead it elsewhere.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
WANT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of what we need ourselves: they say nothing of the file


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which bytes a file holds: the object's generation, their number and their crc32c."""

    generation: int
    size: int
    crc32c: int

    def to_bytes(self) -> bytes:
        """The attribute's value."""
        return f"{self.generation} {self.size} {self.crc32c:08x}".encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> "Stamp | None":
        """Read the attribute's value; None where it is none of ours."""
        try:
            generation_text, size_text, crc32c_text = value.decode("ascii").split(" ")
            generation, size, crc32c = int(generation_text), int(size_text), int(crc32c_text, 16)
        except ValueError:
            return None
        # Anybody who may write the file can set any number; those who keep stamps have room for these.
        fits = 0 <= generation < 1 << 64 and 0 <= size < 1 << 63 and 0 <= crc32c < 1 << 32
        return cls(generation, size, crc32c) if fits else None


def crc32c_of(data: bytes) -> int:
    """The crc32c of the bytes, as GCS computes it."""
    return int(google_crc32c.value(data))


def write_stamp(file: int, stamp: Stamp, path: str) -> None:
    """Stamp an open file for its path (`names.cache_path`); raises OSError where the file system has no user attributes."""
    os.setxattr(file, ATTRIBUTE, _value(stamp, path))


def read_stamp(file: int | Path | str, path: str) -> Stamp | None:
    """The stamp of a file, open or not, that lies at this path; None where it has none, or one for another path."""
    try:
        value, _, mark = os.getxattr(file, ATTRIBUTE).rpartition(b" ")
    except OSError:
        return None
    return Stamp.from_bytes(value) if mark == _path_mark(path) else None


def write_object_name(file: int, name: ObjectName) -> None:
    """Note whose file it is, for one whose path does not tell; raises OSError."""
    os.setxattr(file, NAME_ATTRIBUTE, name.uri.encode())


def read_object_name(file: Path) -> ObjectName | None:
    """The object whose file lies under a hash, or None."""
    try:
        return parse_object_uri(os.getxattr(file, NAME_ATTRIBUTE).decode())
    except (OSError, ValueError, InvalidNameError):
        return None


def read_checked(objects: Path | str, path: str, expected: Stamp | None = None) -> bytes | None:
    """The bytes of the file at `objects/path` if they are those of its stamp (and of `expected`, where given), else None."""
    try:
        return _open_and_read(objects, path, expected)
    except (OSError, ValueError):
        return None


def is_intact(objects: Path | str, path: str, expected: Stamp) -> bool:
    """Whether `read_checked` brings the bytes. One that cannot be looked at for want of descriptors or memory may be."""
    try:
        return _open_and_read(objects, path, expected) is not None
    except MemoryError:
        return True
    except OSError as exc:
        return exc.errno in WANT


def _open_and_read(objects: Path | str, path: str, expected: Stamp | None) -> bytes | None:
    file = os.open(f"{objects}/{path}", OPEN_FLAGS)
    try:
        return _read_checked(file, path, expected)
    finally:
        os.close(file)


def _read_checked(file: int, path: str, expected: Stamp | None) -> bytes | None:
    about = os.fstat(file)
    if expected is None:
        stamp = read_stamp(file, path)
    else:
        stamp = expected if os.getxattr(file, ATTRIBUTE) == _value(expected, path) else None
    if stamp is None or not stat.S_ISREG(about.st_mode) or about.st_size != stamp.size:
        return None
    data = _read_whole(file, stamp.size)
    return data if len(data) == stamp.size and crc32c_of(data) == stamp.crc32c else None


def _read_whole(file: int, size_bytes: int) -> bytes:
    # A file object would ask for the size and the position again, and once more for the end: half of what a read takes.
    data = os.read(file, size_bytes)
    while len(data) < size_bytes and (more := os.read(file, size_bytes - len(data))):  # a read brings 2 GiB at most
        data += more
    return data


def _value(stamp: Stamp, path: str) -> bytes:
    return stamp.to_bytes() + b" " + _path_mark(path)


def _path_mark(path: str) -> bytes:
    return b"%08x" % crc32c_of(os.fsencode(path))
