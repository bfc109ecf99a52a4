"""A cache directory is claimed only if it is ours, by one daemon at a time; otherwise it is left as it was."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gcs_prefetchd.cache.directory import MARKER, MARKER_NAME, CacheDirectory
from gcs_prefetchd.shared.errors import CacheDirectoryError, CacheHeldError
from support.caches import mounted, needs_mount, run_script

CLAIM = """
import os, sys
from pathlib import Path
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.shared.errors import CacheDirectoryError
if "as-nobody" in sys.argv:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    CacheDirectory(Path(sys.argv[1])).claim()
except CacheDirectoryError as exc:
    print(exc)
else:
    print("claimed", flush=True)
    sys.stdin.read()
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, to become another user")


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[CacheDirectory]:
    directory = CacheDirectory(path)
    directory.claim()
    try:
        yield directory
    finally:
        directory.close()


@contextlib.contextmanager
def claimed_by_another(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CLAIM, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        try:
            yield other
        finally:
            other.kill()


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def refusal(path: Path) -> str:
    """Why the directory cannot be claimed."""
    directory = CacheDirectory(path)
    with pytest.raises(CacheDirectoryError) as error:
        directory.claim()
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"cache directory {path}: ")
    return text


def test_a_new_directory_is_created_with_its_parents(tmp_path: Path) -> None:
    with claimed(tmp_path / "a/b/cache") as directory:
        assert directory.objects.is_dir()
        assert (directory.path / MARKER_NAME).read_text() == MARKER


def test_backup_programs_recognize_the_marker(tmp_path: Path) -> None:
    with claimed(tmp_path / "cache") as directory:
        first_line = (directory.path / "CACHEDIR.TAG").read_text().splitlines()[0]
    assert first_line == "Signature: 8a477f597d28d172789f06886806bc55"  # https://bford.info/cachedir/


def test_an_empty_directory_is_claimed(tmp_path: Path) -> None:
    with claimed(tmp_path):
        pass


def test_a_new_file_system_is_claimed_and_keeps_its_lost_and_found(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    with claimed(tmp_path):
        assert (tmp_path / "lost+found").is_dir()


def test_our_own_directory_is_claimed_again_with_everything_in_it(tmp_path: Path) -> None:
    with claimed(tmp_path) as directory:
        (directory.objects / "a.jpg").write_bytes(b"a")
        (directory.manifests / "m").mkdir()
    with claimed(tmp_path) as directory:
        assert (directory.objects / "a.jpg").read_bytes() == b"a"
        assert (directory.manifests / "m").is_dir()


def test_everything_in_the_directory_is_closed_to_other_users(tmp_path: Path) -> None:
    with claimed(tmp_path / "cache") as directory:
        directory.write_daemon_file({"pid": 1})
        folders = [directory.path, directory.objects, directory.index, directory.manifests, directory.tmp]
        assert [oct(folder.stat().st_mode & 0o777) for folder in folders] == ["0o750"] * 5
        assert directory.daemon_file.stat().st_mode & 0o777 == 0o640
        assert (directory.path / "lock").stat().st_mode & 0o777 == 0o640


def test_a_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    file.write_text("mine")
    assert "is not a directory; name an empty or a new one" in refusal(file)
    assert file.read_text() == "mine"


def test_a_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file/cache"
    assert refusal(path) == f"cache directory {path}: Not a directory ({path})"


def test_a_directory_with_foreign_files_is_refused_naming_one_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert "not empty and not ours (it holds 'thesis.tex')" in refusal(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_folders_with_our_names_do_not_make_a_directory_ours(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/precious").touch()
    assert "it holds 'tmp'" in refusal(tmp_path)
    assert (tmp_path / "tmp/precious").exists()


@pytest.mark.parametrize("other", [b"Signature: 8a477f597d28d172789f06886806bc55\n# of a browser", b"\xff\xfe", b"layout 2"])
def test_the_cache_of_another_program_or_version_is_refused(other: bytes, tmp_path: Path) -> None:
    (tmp_path / MARKER_NAME).write_bytes(other)
    assert "CACHEDIR.TAG is not this version's; name an empty directory" in refusal(tmp_path)
    assert (tmp_path / MARKER_NAME).read_bytes() == other


@pytest.mark.parametrize("left", [["lock"], ["lock", MARKER_NAME]])
def test_an_interrupted_first_start_does_not_stop_the_next(left: list[str], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).touch()  # an empty marker: an interrupted start, or a power cut
    with claimed(tmp_path) as directory:
        assert (directory.path / MARKER_NAME).read_text() == MARKER


@needs_root
def test_a_directory_that_this_user_cannot_write_is_refused(shared_folder: Path) -> None:
    path = shared_folder / "cache"
    path.mkdir(mode=0o755)
    tried = run_script(CLAIM, path, "as-nobody")
    assert tried.stdout == f"cache directory {path}: not writable for this user; change its owner or name another\n", tried


@needs_root
def test_a_directory_that_this_user_cannot_create_is_refused(shared_folder: Path) -> None:
    path = shared_folder / "cache"
    tried = run_script(CLAIM, path, "as-nobody")
    assert tried.stdout == f"cache directory {path}: Permission denied ({path})\n", tried


@needs_root
def test_a_directory_that_this_user_cannot_enter_is_refused(shared_folder: Path) -> None:
    path = shared_folder / "closed/cache"
    path.parent.mkdir(mode=0o700)
    tried = run_script(CLAIM, path, "as-nobody")
    assert tried.stdout == f"cache directory {path}: Permission denied ({path})\n", tried


@needs_mount
def test_a_read_only_file_system_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "ro") as disk:
        assert refusal(disk / "cache").endswith(f"Read-only file system ({disk}/cache)")


@needs_mount
def test_a_file_system_without_extended_attributes_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ramfs", "mode=755") as disk:
        assert "its file system has no user extended attributes; use ext4, xfs, btrfs or tmpfs" in refusal(disk)


def test_a_second_daemon_is_refused_with_the_holders_pid_and_how_to_stop_it(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/CACHEDIR.TAG").write_text(MARKER)
    (tmp_path / "cache/lock").write_text(f"{2**22 - 1:10}\n")
    CacheDirectory(tmp_path / "cache").daemon_file.write_text('{"pid": 4194303}')  # of a daemon that was killed
    with claimed_by_another(tmp_path / "cache") as other, pytest.raises(CacheHeldError) as error:
        CacheDirectory(tmp_path / "cache").claim()
    assert str(error.value) == (
        f"cache directory {tmp_path}/cache: held by another daemon (pid {other.pid}); stop it with "
        f"`gcs-prefetchd stop --cache-dir {tmp_path}/cache`"
    )


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_claim_waits_for_the_processes_of_a_killed_daemon(tmp_path: Path, is_reaped: bool) -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | (0 if is_reaped else os.WNOWAIT))
    with claimed(tmp_path) as directory:
        os.pwrite(directory.lock, f"{ended.pid:10}\n".encode(), 0)
        holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(directory.lock,))
    assert holder.stdin is not None
    ends = threading.Timer(0.2, holder.stdin.close)
    ends.start()
    with claimed(tmp_path):
        assert holder.wait(10) == 0
    ends.join()
    ended.wait()


@pytest.mark.parametrize("content", [b"", b"no number", b"\xff\xfe"])
def test_a_second_daemon_is_refused_even_if_the_holder_is_unknown(tmp_path: Path, content: bytes) -> None:
    with claimed_by_another(tmp_path / "cache"):
        (tmp_path / "cache/lock").write_bytes(content)
        with pytest.raises(CacheHeldError, match="held by another daemon; stop it"):
            CacheDirectory(tmp_path / "cache").claim()


def test_the_socket_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as folder, claimed(Path(folder)) as directory:
        listener.bind(str(directory.socket))
        directory.close()
        directory.claim()
        assert not directory.socket.exists()


@pytest.mark.parametrize(
    "make",
    [lambda path: path.write_text("mine"), lambda path: path.mkdir(), lambda path: path.symlink_to("/dev/log"), os.mkfifo],
    ids=["file", "folder", "link", "fifo"],
)
def test_a_file_in_the_place_of_the_socket_is_refused_and_left_alone(tmp_path: Path, make: Callable[[Path], object]) -> None:
    with claimed(tmp_path) as directory:
        make(directory.socket)
    before = directory.socket.lstat()
    assert refusal(tmp_path) == f"cache directory {tmp_path}: daemon.sock is not a socket; move it away"
    assert directory.socket.lstat() == before


def test_a_second_daemon_leaves_the_downloads_of_the_first_alone(tmp_path: Path) -> None:
    with claimed(tmp_path) as first:
        (first.tmp / "under way").touch()
        assert "held by another daemon" in refusal(tmp_path)
        assert (first.tmp / "under way").exists()


def test_closing_lets_the_next_daemon_claim_the_directory(tmp_path: Path) -> None:
    with claimed(tmp_path):
        pass
    with claimed_by_another(tmp_path):
        pass


def test_a_killed_daemon_lets_the_next_one_claim_the_directory(tmp_path: Path) -> None:
    with claimed_by_another(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with claimed(tmp_path):
            pass


def test_a_refused_directory_stays_free_for_others(tmp_path: Path) -> None:
    """A failed claim keeps nothing open."""
    (tmp_path / "objects").touch()
    (tmp_path / MARKER_NAME).write_text(MARKER)
    assert f"File exists ({tmp_path}/objects)" in refusal(tmp_path)
    (tmp_path / "objects").unlink()
    with claimed_by_another(tmp_path):
        pass


def test_leftovers_of_a_crash_are_removed_whatever_they_are(tmp_path: Path) -> None:
    with claimed(tmp_path / "cache") as directory:
        tmp = directory.tmp
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (tmp / "0123abcd").write_bytes(b"half")
    (tmp / "folder/deeper").mkdir(parents=True)
    (tmp / "folder/deeper/file").touch()
    (tmp / "link").symlink_to(elsewhere)
    os.mkfifo(tmp / "pipe")

    with claimed(tmp_path / "cache"):
        assert directory.leftover_files() == []
        assert not (tmp / "folder").exists()
    assert (elsewhere / "precious").exists()


@pytest.mark.skipif(shutil.which("lsattr") is None, reason="needs lsattr")
def test_subdirectories_are_spread_over_an_ext4_disk(tmp_path: Path) -> None:
    file_system = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if "ext" not in file_system:
        pytest.skip(f"{tmp_path} is on {file_system.strip()}, not on ext4")
    with claimed(tmp_path / "cache") as directory:
        for folder in (directory.objects, directory.tmp):  # a file's inode stays where it was created, which is in tmp/
            flags = subprocess.run(["lsattr", "-d", folder], capture_output=True, text=True, check=True).stdout
            assert "T" in flags.split()[0]
        made_in = {Path(directory.new_temp_path()).parent for _ in range(1000)}
    assert len(made_in) > 200


@needs_mount
def test_a_disk_that_is_not_ext4_works_without_spreading(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=1m") as disk, claimed(disk / "cache") as directory:
        assert directory.objects.is_dir()


def test_the_daemon_file_is_complete_or_absent(tmp_path: Path) -> None:
    with claimed(tmp_path) as directory:
        directory.write_daemon_file({"pid": 1})
        before = directory.daemon_file.stat().st_ino
        directory.write_daemon_file({"pid": 2})
        assert directory.daemon_file.stat().st_ino != before  # renamed into place, never written there
        assert directory.leftover_files() == []
        directory.socket.touch()
        directory.remove_daemon_file()
        assert not directory.daemon_file.exists()
        assert not directory.socket.exists()
        directory.remove_daemon_file()
