"""A cache directory: its owner, its layout, and the lock that lets one daemon at a time write to it."""

import array
import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import shutil
import stat
import time
import uuid
from pathlib import Path

from gcs_prefetchd.cache.safe_folders import make_folder
from gcs_prefetchd.shared.checked_read import read_object_name
from gcs_prefetchd.shared.errors import CacheDirectoryError, CacheHeldError
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.shared.paths import object_at_path

__all__ = ["CacheDirectory"]

log = logging.getLogger(__name__)

# https://bford.info/cachedir/: backup programs recognize the first line and skip the directory.
MARKER_NAME = "CACHEDIR.TAG"
MARKER = """Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache of gcs-prefetchd, layout 1. The daemon may delete anything below objects/.
"""
STOP_TIMEOUT_S = 5.0  # after this time a killed daemon's fetch processes, which hold the lock as well, have stopped
NOT_FOREIGN = {"lost+found", "lock"}  # left in a new file system by mkfs, and by a first start that was interrupted

# ext4 then spreads the subdirectories over the disk (chattr +T). A file's inode stays in the block group of the folder in which
# it was created, and ext4 examines every inode there that was freed in the last minutes: with one folder for all temporary
# files a new file took 300 us, with 256 folders it takes 20 us.
TMP_FOLDERS = 256
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_TOPDIR_FL = 0x80086601, 0x40086602, 0x00020000


class CacheDirectory:
    """The paths of one cache directory, claimed for this process until `close`.

    `claim` raises CacheDirectoryError (not a directory, not writable, untracked files in it, no extended attributes) or
    CacheHeldError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.objects = path / "objects"
        self.index = path / "index"
        self.manifests = path / "manifests"
        self.tmp = path / "tmp"
        self.daemon_file = path / "daemon.json"
        self.socket = path / "daemon.sock"
        self._lock: int | None = None
        self._numbers = itertools.count()
        self._unremoved: set[str] = set()

    @classmethod
    def with_inherited_lock(cls, path: Path, lock: int) -> "CacheDirectory":
        """A directory that the parent process has claimed; `lock` is its lock's descriptor, which this process inherited."""
        directory = cls(path)
        directory._lock = lock
        return directory

    @property
    def lock(self) -> int:
        """The descriptor of the lock. No other daemon can claim the directory while any process has it open."""
        assert self._lock is not None, "the directory is not claimed"
        return self._lock

    def claim(self) -> None:
        """Lock the directory, create what is missing, and remove what a crashed daemon left in `tmp/`."""
        try:
            self._check_owner()
            self.path.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._take_lock()
            self._mark()
            self._forbid_writes_by_others()
            for folder in (self.objects, self.index, self.manifests, self.tmp):
                folder.mkdir(mode=0o750, exist_ok=True)
            self._reject_links()
            self._remove_stale_socket()
            self._check_attributes()
            self._create_tmp_folders()
        except OSError as exc:
            self.close()
            raise CacheDirectoryError(f"cache directory {self.path}: {exc.strerror} ({exc.filename})") from None
        except CacheDirectoryError:
            self.close()
            raise
        _spread_subdirectories(self.objects)

    def new_temp_path(self) -> str:
        """A new path in `tmp/`, for a file that is not complete yet."""
        number = next(self._numbers)
        return f"{self.tmp}/{number % TMP_FOLDERS:02x}/{number:x}"

    def open_temp_file(self, file: str) -> int:
        """Create and open the file of a `new_temp_path`; also its folder, if another program has removed it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        if self._unremoved:
            self._remove_unremoved()
        try:
            return os.open(file, flags, 0o640)
        except FileNotFoundError:
            self.check_ours()
            make_folder(Path(file).parent)
            return os.open(file, flags, 0o640)

    def remove_temp_file(self, file: str) -> None:
        """Remove the file of a `new_temp_path`. If that fails, truncate it, and remove it when the next file is opened."""
        self._unremoved.add(file)
        self._remove_unremoved()

    def check_ours(self) -> None:
        """Raise OSError if the directory was moved, removed or replaced: what is in its place is not ours."""
        try:
            is_ours = os.path.samestat((self.path / "lock").stat(), os.fstat(self.lock))
        except (FileNotFoundError, NotADirectoryError):
            is_ours = False
        if not is_ours:
            raise OSError(errno.ESTALE, "The cache directory has been moved, removed or replaced", str(self.path))

    def object_name(self, path: str) -> ObjectName | None:
        """The object whose file is at `objects/path`, or None. Reads the file's attribute if the path is a hash of the name."""
        return object_at_path(path) or read_object_name(self.objects / path)

    def write_daemon_file(self, content: dict[str, object]) -> None:
        """Write `daemon.json`, completely or not at all."""
        unfinished = self.tmp / f"daemon.json.{uuid.uuid4().hex}"
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.chmod(0o640)
        unfinished.rename(self.daemon_file)

    def remove_daemon_file(self) -> None:
        """Remove `daemon.json` and the socket: the daemon is stopping."""
        try:
            self.check_ours()
            self.daemon_file.unlink(missing_ok=True)
            self.socket.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("cache directory %s: daemon.json not removed: %s", self.path, exc.strerror)

    def close(self) -> None:
        """Release the lock, so that another daemon can claim the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_owner(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise CacheDirectoryError(f"cache directory {self.path}: is not a directory; name an empty or a new one")
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise CacheDirectoryError(
                f"cache directory {self.path}: not writable for this user; change its owner or name another"
            )
        marker = self.path / MARKER_NAME
        if marker.is_file():
            if marker.read_bytes() not in (MARKER.encode(), b""):  # empty: a power cut or a crash interrupted `_mark`
                raise CacheDirectoryError(
                    f"cache directory {self.path}: {MARKER_NAME} is not this version's; name an empty directory"
                )
        elif foreign := sorted(entry.name for entry in self.path.iterdir() if entry.name not in NOT_FOREIGN):
            raise CacheDirectoryError(
                f"cache directory {self.path}: not empty and not ours (it holds {foreign[0]!r}); name an empty or a new one"
            )

    def _mark(self) -> None:
        """Write the marker before anything else, so that the next start recognizes the files of an interrupted one as ours."""
        marker = self.path / MARKER_NAME
        if not marker.is_file() or marker.read_bytes() != MARKER.encode():
            marker.write_text(MARKER)

    def _forbid_writes_by_others(self) -> None:
        """A user who may write here could replace our socket by their own, and feed readers any bytes."""
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if mode & stat.S_IWOTH:
            try:
                self.path.chmod(mode & ~stat.S_IWOTH)
            except PermissionError:  # a container's volume may belong to root, and may have no other users
                log.warning(
                    "cache directory %s: every user who reaches it may write there, and so deceive its readers", self.path
                )

    def _create_tmp_folders(self) -> None:
        for leftover in self.tmp.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        _spread_subdirectories(self.tmp)
        for number in range(TMP_FOLDERS):
            (self.tmp / f"{number:02x}").mkdir(mode=0o750)

    def leftover_files(self) -> list[Path]:
        """The files in `tmp/`: none, unless objects are being downloaded."""
        return [path for path in self.tmp.rglob("*") if not path.is_dir() or path.is_symlink()]

    def _take_lock(self) -> None:
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pid = self._holder_pid()
                if _is_running(pid) or time.monotonic() > deadline_s:
                    raise CacheHeldError(
                        f"cache directory {self.path}: held by another daemon{f' (pid {pid})' if pid else ''}; stop it with "
                        f"`gcs-prefetchd stop --cache-dir {self.path}`"
                    ) from None
                time.sleep(0.01)
        with contextlib.suppress(OSError):  # a full disk: only `_holder_pid` needs it
            os.pwrite(self._lock, f"{os.getpid():10}\n".encode(), 0)

    def _holder_pid(self) -> int | None:
        """Read from the lock file: until a daemon is ready, `daemon.json` may be that of one that was killed before."""
        pid = os.pread(self.lock, 11, 0).strip()
        return int(pid) if pid.isdigit() else None

    def _remove_stale_socket(self) -> None:
        """The lock is ours, so a socket belongs to no running daemon. Anything else was not created by a daemon."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self.socket.lstat().st_mode):
                raise CacheDirectoryError(f"cache directory {self.path}: {self.socket.name} is not a socket; move it away")
            self.socket.unlink()

    def _remove_unremoved(self) -> None:
        for file in list(self._unremoved):
            try:
                Path(file).unlink(missing_ok=True)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(file, 0)
            else:
                self._unremoved.discard(file)

    def _reject_links(self) -> None:
        """The target of a link is not ours, and everything in `tmp/` is removed."""
        for folder in (self.objects, self.manifests, self.tmp):
            if folder.is_symlink():
                raise CacheDirectoryError(f"cache directory {self.path}: {folder.name} is a symbolic link; remove it")

    def _check_attributes(self) -> None:
        probe = self.tmp / f"probe.{os.getpid()}"
        probe.touch()
        try:
            os.setxattr(probe, "user.gcs.object", b"probe")
        except OSError as exc:
            if exc.errno != errno.ENOTSUP:
                raise
            raise CacheDirectoryError(
                f"cache directory {self.path}: its file system has no user extended attributes; use ext4, xfs, btrfs or tmpfs"
            ) from None
        finally:
            probe.unlink()


def _is_running(pid: int | None) -> bool:
    """Whether the daemon that holds the lock is running; if that is unknown, it is."""
    if not pid:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    # A killed process keeps its pid until its parent reaps it, which a container's first process may never do.
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    return True


def _spread_subdirectories(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flags = array.array("L", [0])
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags, True)
        flags[0] |= _FS_TOPDIR_FL
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags)
    except OSError:
        pass  # not ext4
    finally:
        os.close(descriptor)
