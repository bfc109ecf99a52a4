"""Checks that folders below `objects/` are the cache's own, and not links to somewhere else. Every function blocks."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

__all__ = ["SafeFolders", "make_folder"]


class SafeFolders:
    """Examines each folder once until `forget`, because a path has up to a dozen folders. Any thread may use it.

    `check_ours` raises OSError if the cache directory itself is no longer ours.
    """

    def __init__(self, objects: Path, check_ours: Callable[[], None] = lambda: None) -> None:
        self.objects = objects
        self._check_ours = check_ours
        self._checked: set[str] = set()

    def forget(self) -> None:
        """Examine every folder again."""
        self._checked = set()

    def check(self, path: str) -> None:
        """Raise OSError if a folder of `objects/path` is not the cache's own: NotADirectoryError for a link."""
        folder = path.rpartition("/")[0]
        if folder not in self._checked:
            self._examine(folder)

    def make_parents(self, path: str) -> None:
        """Create the missing folders of `objects/path`."""
        self._check_ours()
        make_folder(Path(f"{self.objects}/{path}").parent)

    def _examine(self, folder: str) -> None:
        where = f"{self.objects}/{folder}".rstrip("/")
        if folder:
            self.check(folder)
        else:
            self._check_ours()
        try:
            mode = os.lstat(where).st_mode
        except FileNotFoundError:
            return  # `make_parents` creates it
        if stat.S_ISLNK(mode):
            raise OSError(errno.ENOTDIR, "A symbolic link is in the way, which is not followed", where)
        self._checked.add(folder)


def make_folder(folder: Path) -> None:
    """Create the folder and those above it; `Path.mkdir` would leave the ones above open to all users."""
    try:
        folder.mkdir(mode=0o750, exist_ok=True)
    except FileNotFoundError:
        make_folder(folder.parent)
        folder.mkdir(mode=0o750, exist_ok=True)
