"""The tree of files under `objects/`: walking, unlinking. All of it blocks; no link is followed."""

import logging
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from gcs_prefetchd.cache.file_comparison import Found
from gcs_prefetchd.cache.safe_folders import Folders
from gcs_prefetchd.shared.checksums import read_stamp

__all__ = ["find_each", "find_files", "unlink_all"]

log = logging.getLogger(__name__)


def find_files(objects: Path, at_most: int) -> Iterator[list[Found]]:
    """Every regular file, so many at a time: folders are read as they are walked, and never held as a whole.

    A file that comes or goes meanwhile may be found or not. Raises OSError where the disk fails: what cannot be looked at is
    not gone.
    """
    files = _walk(objects, "")
    while page := list(islice(files, at_most)):
        yield page


def find_each(folders: Folders, paths: list[str]) -> list[Found | None]:
    """The files at these paths, None where there is no regular file. Raises OSError where the disk fails, or the directory is
    not ours any more."""
    found = [_find(folders, path) for path in paths]
    if None in found:
        folders.forget()
        folders.check("")  # what was moved away as a whole while we looked is not gone
    return found


def _find(folders: Folders, path: str) -> Found | None:
    objects = folders.objects
    try:
        folders.check(path)
        about = os.lstat(objects / path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Found(path, about.st_size, read_stamp(objects / path, path)) if stat.S_ISREG(about.st_mode) else None


def unlink_all(folders: Folders, paths: Iterable[str]) -> dict[str, str]:
    """Unlink the files that are still there; returns those that cannot be unlinked, and why. That is logged in one line."""
    stuck = {}
    for path in paths:
        try:
            folders.check(path)
            os.unlink(f"{folders.objects}/{path}")  # noqa: PTH108
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            stuck[path] = str(exc.strerror)
    for path, why in islice(stuck.items(), 1):
        log.warning("cached %s and %d others: cannot be unlinked: %s", path, len(stuck) - 1, why)
    return stuck


def _walk(folder: Path | str, prefix: str) -> Iterator[Found]:
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, f"{path}/")
            elif entry.is_file(follow_symlinks=False):
                try:
                    size = entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue  # evicted since the folder was read
                yield Found(path, size, read_stamp(entry.path, path) if _is_text(path) else None)


def _is_text(path: str) -> bool:
    """Whether the file's name is UTF-8: ours are, and the index can hold nothing else."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
