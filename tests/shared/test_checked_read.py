"""The stamp of a cached file, and the read that checks the file against it."""

import fcntl
import os
import random
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gcs_prefetchd.shared.checked_read import ATTRIBUTE, Stamp, _read_all, crc32c_of, read_checked, read_stamp, write_stamp

BYTES = random.Random(1).randbytes(5000)


def stamp_of(data: bytes, generation: int = 1) -> Stamp:
    return Stamp(generation, len(data), crc32c_of(data))


def cached(path: Path, data: bytes = BYTES, stamp: Stamp | None = None) -> Path:
    path.write_bytes(data)
    with path.open("rb+") as file:
        write_stamp(file.fileno(), stamp or stamp_of(data), path.name)
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=3000))
@example(b"")
def test_an_intact_file_is_read(tmp_path: Path, data: bytes) -> None:
    assert read_checked(cached(tmp_path / "file", data).parent, "file") == data
    assert read_checked(str(tmp_path), "file", stamp_of(data)) == data


def overwrite(path: Path, at: int, data: bytes) -> None:
    """In place, so that the stamp stays."""
    with path.open("rb+") as file:
        file.seek(at)
        file.write(data)


def fill_with_hole(path: Path) -> None:
    os.truncate(path, 100)
    os.truncate(path, len(BYTES))


def moved_behind_a_link(path: Path) -> None:
    path.rename(path.with_name("intact"))
    path.symlink_to("intact")


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated by a byte": lambda path: os.truncate(path, len(BYTES) - 1),
    "grown by a byte": lambda path: overwrite(path, len(BYTES), b"\0"),
    "emptied": lambda path: os.truncate(path, 0),
    "zeroed": lambda path: overwrite(path, 0, bytes(len(BYTES))),
    "replaced by as many bytes": lambda path: overwrite(path, 0, BYTES[::-1]),
    "cut and filled up with a hole": fill_with_hole,
    "without a stamp": lambda path: os.removexattr(path, ATTRIBUTE),
    "removed": lambda path: path.unlink(),
    "a directory": replaced_by(Path.mkdir),
    "a link to itself": replaced_by(lambda path: path.symlink_to(path)),
    "a dangling link": replaced_by(lambda path: path.symlink_to("nowhere")),
    "a link to an intact file": moved_behind_a_link,
    "a FIFO": replaced_by(os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_match_its_stamp_is_a_miss(tmp_path: Path, damage: str) -> None:
    path = cached(tmp_path / "file")
    assert read_checked(path.parent, path.name) == BYTES
    DAMAGES[damage](path)
    assert read_checked(path.parent, path.name) is None
    assert read_checked(path.parent, path.name, stamp_of(BYTES)) is None


def test_a_socket_is_a_miss(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert read_checked(tmp_path, "socket") is None


def test_a_device_is_a_miss() -> None:
    assert read_checked("/dev", "zero") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, len(BYTES) - 1), st.integers(1, 255))
def test_any_flipped_byte_is_a_miss(tmp_path: Path, at: int, flip: int) -> None:
    path = cached(tmp_path / "file")
    overwrite(path, at, bytes([BYTES[at] ^ flip]))
    assert read_checked(path.parent, path.name) is None


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"1",
        b"1 5000",
        b"1 5000 zzzzzzzz",
        b"one 5000 00000000",
        b"1  5000 00000000",
        b"1 5000 00000000 0",
        b"1 5000 -1",
        b"\xff\xfe",
        b"1 " + b"9" * 3000 + b" 0",
        bytes(30),
    ],
)
def test_an_invalid_stamp_is_a_miss(tmp_path: Path, value: bytes) -> None:
    path = cached(tmp_path / "file")
    os.setxattr(path, ATTRIBUTE, value)
    assert read_checked(path.parent, path.name) is None


@given(st.binary(max_size=60))
def test_any_value_parses_as_a_stamp_or_none(value: bytes) -> None:
    stamp = Stamp.from_bytes(value)
    assert stamp is None or isinstance(stamp.crc32c, int)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1))
def test_a_stamp_parses_back_unchanged(generation: int, size: int, crc32c: int) -> None:
    stamp = Stamp(generation, size, crc32c)
    assert Stamp.from_bytes(stamp.to_bytes()) == stamp


def test_the_format_of_stamps_never_changes() -> None:
    """Caches outlive upgrades."""
    assert ATTRIBUTE == "user.gcs.object"
    assert Stamp(1700000000000000, 12, 0xABC).to_bytes() == b"1700000000000000 12 00000abc"


def test_the_checksum_is_castagnolis_crc32c() -> None:
    """The check value of CRC-32C in the literature."""
    assert crc32c_of(b"123456789") == 0xE3069283


@pytest.mark.parametrize(
    "expected",
    [
        Stamp(2, len(BYTES), crc32c_of(BYTES)),
        Stamp(1, len(BYTES) + 1, crc32c_of(BYTES)),
        Stamp(1, len(BYTES), crc32c_of(BYTES) ^ 1),
    ],
)
def test_an_intact_file_of_another_version_is_a_miss(tmp_path: Path, expected: Stamp) -> None:
    path = cached(tmp_path / "file")
    assert read_checked(path.parent, path.name, expected) is None
    assert read_checked(path.parent, path.name) == BYTES


def test_a_reader_can_finish_a_file_that_is_unlinked_meanwhile(tmp_path: Path) -> None:
    path = cached(tmp_path / "file")
    with path.open("rb") as file:
        path.unlink()
        assert read_stamp(file.fileno(), "file") == stamp_of(BYTES)
        assert file.read() == BYTES


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a process of another user")
def test_an_unreadable_file_is_a_miss() -> None:
    """Read by another user, to whom file modes apply. Below /tmp, because pytest's folders are closed to other users."""
    program = """
import os, sys, tempfile
from pathlib import Path
from gcs_prefetchd.shared.checked_read import Stamp, crc32c_of, read_checked, write_stamp
with tempfile.TemporaryDirectory(dir="/tmp") as folder:
    path = Path(folder, "file")
    path.write_bytes(b"data")
    with path.open("rb+") as file:
        write_stamp(file.fileno(), Stamp(1, 4, crc32c_of(b"data")), "file")
    Path(folder).chmod(0o755)
    results = []
    for mode in (0o644, 0o000):
        path.chmod(mode)
        os.seteuid(65534)
        results.append(read_checked(path.parent, path.name))
        os.seteuid(0)
    print(results)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[b'data', None]\n", "")


def test_reading_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    path = cached(tmp_path / "file")
    for _ in range(20):
        read_checked(path.parent, path.name)
        read_checked(path.parent, path.name, Stamp(9, 9, 9))
        read_checked(tmp_path.parent, tmp_path.name)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_read_in_several_parts_is_joined() -> None:
    """As with more than 2 GiB. The test reads a pipe that holds less than the requested size, and needs no such file."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(writing, "wb", buffering=0) as pipe:
        sender = threading.Thread(target=pipe.write, args=[BYTES])
        sender.start()
        assert _read_all(reading, len(BYTES)) == BYTES
        sender.join()
    assert _read_all(reading, 10) == b""
    os.close(reading)


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = cached(tmp_path / "file")
    path.chmod(0o440)
    before = path.stat()
    read_checked(path.parent, path.name)
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns, stat.S_IMODE(after.st_mode)) == (
        before.st_mtime_ns,
        before.st_ctime_ns,
        0o440,
    )


def test_an_intact_file_moved_to_another_objects_path_is_a_miss(tmp_path: Path) -> None:
    cached(tmp_path / "0.jpg").rename(tmp_path / "1.jpg")
    assert read_checked(tmp_path, "1.jpg") is None


@pytest.mark.parametrize(
    "value", [b"-1 1 00000000", b"18446744073709551616 1 0", b"1 -1 0", b"1 9223372036854775808 0", b"1 1 100000000"]
)
def test_numbers_that_no_object_can_have_are_not_a_stamp(value: bytes) -> None:
    assert Stamp.from_bytes(value) is None
