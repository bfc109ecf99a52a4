"""A cache directory: whose it is, what lies in it, and the lock that lets one daemon at a time write there."""

import array
import contextlib
import fcntl
import itertools
import json
import logging
import os
import shutil
import stat
import uuid
from pathlib import Path

from gcs_prefetchd.client import read_daemon_file
from gcs_prefetchd.errors import CacheDirectoryError, CacheHeldError, DaemonUnavailableError

__all__ = ["CacheDirectory"]

log = logging.getLogger(__name__)

# https://bford.info/cachedir/: programs that make backups know the first line and pass the directory over.
MARKER_NAME = "CACHEDIR.TAG"
MARKER = """Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache of gcs-prefetchd, layout 1. The daemon may delete anything below objects/.
"""
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

    def announce(self, content: dict[str, object]) -> None:
        """Write `daemon.json`, whole or not at all."""
        unfinished = self.tmp / f"daemon.json.{uuid.uuid4().hex}"
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.chmod(0o640)
        unfinished.rename(self.daemon_file)

    def withdraw(self) -> None:
        """Remove `daemon.json` and the socket: nobody is here any more."""
        self.daemon_file.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)

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
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheHeldError(
                f"cache directory {self.path}: held by another daemon{self._holder()}; stop it with "
                f"`gcs-prefetchd stop --cache-dir {self.path}`"
            ) from None

    def _holder(self) -> str:
        with contextlib.suppress(DaemonUnavailableError):
            return f" (pid {read_daemon_file(self.path)['pid']})"
        return ""

    def _check_attributes(self) -> None:
        probe = self.tmp / f"probe.{os.getpid()}"
        probe.touch()
        try:
            os.setxattr(probe, "user.gcs.object", b"probe")
        except OSError:
            raise CacheDirectoryError(
                f"cache directory {self.path}: its file system has no user extended attributes; use ext4, xfs, btrfs or tmpfs"
            ) from None
        finally:
            probe.unlink()


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
