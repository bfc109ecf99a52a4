"""Which folders below `objects/` are the cache's own: what lies behind a link in the place of one is not. All of it blocks."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

__all__ = ["SafeFolders", "make_folder"]


class SafeFolders:
    """Looks at each folder once until `forget`, for a file has up to a dozen above it. Any thread may use it.

    `check_ours` raises OSError where the whole cache directory is not ours any more.
    """

    def __init__(self, objects: Path, check_ours: Callable[[], None] = lambda: None) -> None:
        self.objects = objects
        self._check_ours = check_ours
        self._seen: set[str] = set()

    def forget(self) -> None:
        """Look at every folder again."""
        self._seen = set()

    def check(self, path: str) -> None:
        """Raise OSError where the way to `objects/path` is not the cache's own: NotADirectoryError for a link in it."""
        folder = path.rpartition("/")[0]
        if folder not in self._seen:
            self._look_at(folder)

    def make(self, path: str) -> None:
        """Make the folders that `objects/path` lacks."""
        self._check_ours()
        make_folder(Path(f"{self.objects}/{path}").parent)

    def _look_at(self, folder: str) -> None:
        where = f"{self.objects}/{folder}".rstrip("/")
        if folder:
            self.check(folder)
        else:
            self._check_ours()
        try:
            mode = os.lstat(where).st_mode
        except FileNotFoundError:
            return  # `make` makes it
        if stat.S_ISLNK(mode):
            raise OSError(errno.ENOTDIR, "A symbolic link is in the way, which is not followed", where)
        self._seen.add(folder)


def make_folder(folder: Path) -> None:
    """Make the folder and those above it; `Path.mkdir` would leave the ones above open to everybody."""
    try:
        folder.mkdir(mode=0o750, exist_ok=True)
    except FileNotFoundError:
        make_folder(folder.parent)
        folder.mkdir(mode=0o750, exist_ok=True)
