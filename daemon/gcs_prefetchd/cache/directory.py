"""A cache directory: whose it is, what lies in it, and the lock that lets one daemon at a time write there."""

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
from gcs_prefetchd.shared.checksums import read_object_name
from gcs_prefetchd.shared.errors import CacheDirectoryError, CacheHeldError
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.shared.paths import object_at_path

__all__ = ["CacheDirectory"]

log = logging.getLogger(__name__)

# https://bford.info/cachedir/: programs that make backups know the first line and pass the directory over.
MARKER_NAME = "CACHEDIR.TAG"
MARKER = """Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache of gcs-prefetchd, layout 1. The daemon may delete anything below objects/.
"""
ENDING_S = 5.0  # after which a killed daemon's fetch processes, which have the lock as well, are no more
NOT_FOREIGN = {"lost+found", "lock"}  # what mkfs leaves in a fresh file system, and a first start that was cut short

# ext4 then spreads the subdirectories over the disk (chattr +T). A file's inode stays where it was made, and ext4 looks at
# every inode of that place that was freed in the last minutes: one folder for all temporary files made each new one take 300 us
# where 256 of them take 20.
TMP_FOLDERS = 256
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_TOPDIR_FL = 0x80086601, 0x40086602, 0x00020000


class CacheDirectory:
    """The paths of one cache directory, claimed for this process until `close`.

    `claim` raises CacheDirectoryError (a file, not writable, foreign files in it, no extended attributes) or CacheHeldError.
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
        self._strays: set[str] = set()

    @classmethod
    def shared(cls, path: Path, lock: int) -> "CacheDirectory":
        """A directory that the process which began this one has claimed; `lock` is its lock, inherited."""
        directory = cls(path)
        directory._lock = lock
        return directory

    @property
    def lock(self) -> int:
        """The descriptor that keeps other daemons away for as long as any process has it."""
        assert self._lock is not None, "the directory is not claimed"
        return self._lock

    def claim(self) -> None:
        """Take the directory, making it where it does not exist, and remove what a crashed daemon left in `tmp/`."""
        try:
            self._check_owner()
            self.path.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._take_lock()
            self._mark()
            self._close_to_others()
            for folder in (self.objects, self.index, self.manifests, self.tmp):
                folder.mkdir(mode=0o750, exist_ok=True)
            self._check_links()
            self._clear_socket()
            self._check_attributes()
            self._lay_out_tmp()
        except OSError as exc:
            self.close()
            raise CacheDirectoryError(f"cache directory {self.path}: {exc.strerror} ({exc.filename})") from None
        except CacheDirectoryError:
            self.close()
            raise
        _spread_subdirectories(self.objects)

    def temporary(self) -> str:
        """A new path in `tmp/` for a file that is not whole yet."""
        number = next(self._numbers)
        return f"{self.tmp}/{number % TMP_FOLDERS:02x}/{number:x}"

    def open_temporary(self, file: str) -> int:
        """Make a file of `temporary` and open it; its folder, too, where somebody has tidied it away."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        if self._strays:
            self._sweep()
        try:
            return os.open(file, flags, 0o640)
        except FileNotFoundError:
            self.check_ours()
            make_folder(Path(file).parent)
            return os.open(file, flags, 0o640)

    def discard_temporary(self, file: str) -> None:
        """Remove a file of `temporary`. Where that fails its bytes go at least, and the file when the next one comes."""
        self._strays.add(file)
        self._sweep()

    def check_ours(self) -> None:
        """Raise OSError where the directory has been moved, removed or replaced: what lies in its place is not ours."""
        try:
            is_ours = os.path.samestat((self.path / "lock").stat(), os.fstat(self.lock))
        except (FileNotFoundError, NotADirectoryError):
            is_ours = False
        if not is_ours:
            raise OSError(errno.ESTALE, "The cache directory has been moved, removed or replaced", str(self.path))

    def object_name(self, path: str) -> ObjectName | None:
        """The object whose file is at `objects/path`, or None. Reads the file's attribute if the path is a hash of the name."""
        return object_at_path(path) or read_object_name(self.objects / path)

    def announce(self, content: dict[str, object]) -> None:
        """Write `daemon.json`, whole or not at all."""
        unfinished = self.tmp / f"daemon.json.{uuid.uuid4().hex}"
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.chmod(0o640)
        unfinished.rename(self.daemon_file)

    def withdraw(self) -> None:
        """Remove `daemon.json` and the socket: nobody is here any more."""
        try:
            self.check_ours()
            self.daemon_file.unlink(missing_ok=True)
            self.socket.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("cache directory %s: daemon.json not removed: %s", self.path, exc.strerror)

    def close(self) -> None:
        """Let another daemon have the directory."""
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
            if marker.read_bytes() not in (MARKER.encode(), b""):  # empty: a power cut or a crash came between
                raise CacheDirectoryError(
                    f"cache directory {self.path}: {MARKER_NAME} is not this version's; name an empty directory"
                )
        elif foreign := sorted(entry.name for entry in self.path.iterdir() if entry.name not in NOT_FOREIGN):
            raise CacheDirectoryError(
                f"cache directory {self.path}: not empty and not ours (it holds {foreign[0]!r}); name an empty or a new one"
            )

    def _mark(self) -> None:
        """Before anything else, so that a start cut short leaves nothing that the next one takes for foreign."""
        marker = self.path / MARKER_NAME
        if not marker.is_file() or marker.read_bytes() != MARKER.encode():
            marker.write_text(MARKER)

    def _close_to_others(self) -> None:
        """Whoever may write here could put a socket of his own in the place of ours, and have readers read what he likes."""
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if mode & stat.S_IWOTH:
            try:
                self.path.chmod(mode & ~stat.S_IWOTH)
            except PermissionError:  # volumes of containers are root's, and nobody else may be there
                log.warning(
                    "cache directory %s: every user who reaches it may write there, and so deceive its readers", self.path
                )

    def _lay_out_tmp(self) -> None:
        for leftover in self.tmp.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        _spread_subdirectories(self.tmp)
        for number in range(TMP_FOLDERS):
            (self.tmp / f"{number:02x}").mkdir(mode=0o750)

    def leftovers(self) -> list[Path]:
        """The files in `tmp/`: none while nothing is being downloaded."""
        return [path for path in self.tmp.rglob("*") if not path.is_dir() or path.is_symlink()]

    def _take_lock(self) -> None:
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        until_s = time.monotonic() + ENDING_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pid = self._holder()
                if _is_there(pid) or time.monotonic() > until_s:
                    raise CacheHeldError(
                        f"cache directory {self.path}: held by another daemon{f' (pid {pid})' if pid else ''}; stop it with "
                        f"`gcs-prefetchd stop --cache-dir {self.path}`"
                    ) from None
                time.sleep(0.01)
        with contextlib.suppress(OSError):  # a full disk: it is only for `_holder`
            os.pwrite(self._lock, f"{os.getpid():10}\n".encode(), 0)

    def _holder(self) -> int | None:
        """By the lock's own file: until a daemon is ready, `daemon.json` may be that of one that was killed before."""
        pid = os.pread(self.lock, 11, 0).strip()
        return int(pid) if pid.isdigit() else None

    def _clear_socket(self) -> None:
        """The lock is ours, so a socket belongs to nobody who lives. Anything else was not made by a daemon."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self.socket.lstat().st_mode):
                raise CacheDirectoryError(f"cache directory {self.path}: {self.socket.name} is no socket; move it away")
            self.socket.unlink()

    def _sweep(self) -> None:
        for file in list(self._strays):
            try:
                Path(file).unlink(missing_ok=True)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(file, 0)
            else:
                self._strays.discard(file)

    def _check_links(self) -> None:
        """What is behind a link is somebody else's, and whatever lies in `tmp/` will be removed."""
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


def _is_there(pid: int | None) -> bool:
    """Whether the daemon with the lock lives; where that cannot be told, it does."""
    if not pid:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _spread_subdirectories(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flags = array.array("L", [0])
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags, True)
        flags[0] |= _FS_TOPDIR_FL
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags)
    except OSError:
        pass  # not ext4: nothing to spread
    finally:
        os.close(descriptor)
