"""The stamp that every cached file carries, and the checked read that trusts nothing else.

A file's extended attribute `user.gcs.object` holds "<generation> <size in bytes> <crc32c, 8 hexadecimal digits>". One short
attribute, so that ext4 keeps it within the inode. Readers check what they read against it: a truncated, flipped, edited or
emptied file is a miss, never wrong bytes.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

__all__ = ["Stamp", "crc32c_of", "read_checked", "read_stamp", "write_stamp"]

ATTRIBUTE = "user.gcs.object"
# A planted FIFO or device must not hang the reader, a planted link must not lead it elsewhere.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


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
            generation, size, crc32c = value.decode("ascii").split(" ")
            return cls(int(generation), int(size), int(crc32c, 16))
        except ValueError:
            return None


def crc32c_of(data: bytes) -> int:
    """The crc32c of the bytes, as GCS computes it."""
    return int(google_crc32c.value(data))


def write_stamp(file: int, stamp: Stamp) -> None:
    """Stamp an open file; raises OSError where the file system has no user attributes."""
    os.setxattr(file, ATTRIBUTE, stamp.to_bytes())


def read_stamp(file: int | Path) -> Stamp | None:
    """The stamp of an open file or of a path, or None."""
    try:
        return Stamp.from_bytes(os.getxattr(file, ATTRIBUTE))
    except OSError:
        return None


def read_checked(path: Path | str, expected: Stamp | None = None) -> bytes | None:
    """The file's bytes if they are those of its stamp (and of `expected`, where given), else None."""
    try:
        file = os.open(path, OPEN_FLAGS)
    except OSError:
        return None
    try:
        return _read_checked(file, expected)
    except OSError:
        return None
    finally:
        os.close(file)


def _read_checked(file: int, expected: Stamp | None) -> bytes | None:
    about = os.fstat(file)
    stamp = read_stamp(file)
    if stamp is None or (expected is not None and stamp != expected):
        return None
    if not stat.S_ISREG(about.st_mode) or about.st_size != stamp.size:
        return None
    with os.fdopen(file, "rb", buffering=0, closefd=False) as stream:
        data = stream.readall()
    return data if len(data) == stamp.size and crc32c_of(data) == stamp.crc32c else None
