"""Finds and unlinks the files below `objects/`. Every function blocks; none follows a link."""

import logging
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gcs_prefetchd.cache.safe_folders import SafeFolders
from gcs_prefetchd.shared.checked_read import Stamp, read_stamp

__all__ = ["FoundFile", "find_each", "find_files", "unlink_all"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file on the disk: its path, its size in bytes, and its stamp, which is None if the file is not one of ours."""

    path: str
    size: int
    stamp: Stamp | None


def find_files(objects: Path, max_files: int) -> Iterator[list[FoundFile]]:
    """Every regular file, `max_files` at a time: folders are read during the walk, and never held in full.

    A file that appears or disappears meanwhile may be found or not. Raises OSError if the disk fails: a file that cannot be
    examined is not gone.
    """
    files = _walk(objects, "")
    while page := list(islice(files, max_files)):
        yield page


def find_each(folders: SafeFolders, paths: list[str]) -> list[FoundFile | None]:
    """The files at these paths, None for each that is not a regular file. Raises OSError if the disk fails, or if the directory
    is no longer ours."""
    found = [_find(folders, path) for path in paths]
    if None in found:
        folders.forget()
        folders.check("")  # a directory that was moved away meanwhile has lost none of its files
    return found


def _find(folders: SafeFolders, path: str) -> FoundFile | None:
    objects = folders.objects
    try:
        folders.check(path)
        status = os.lstat(objects / path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return FoundFile(path, status.st_size, read_stamp(objects / path, path)) if stat.S_ISREG(status.st_mode) else None


def unlink_all(folders: SafeFolders, paths: Iterable[str]) -> dict[str, str]:
    """Unlink the files that still exist; returns those that cannot be unlinked, with reasons, and logs them in one line."""
    failed = {}
    for path in paths:
        try:
            folders.check(path)
            os.unlink(f"{folders.objects}/{path}")  # noqa: PTH108
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            failed[path] = str(exc.strerror)
    for path, reason in islice(failed.items(), 1):
        log.warning("cached %s and %d others: cannot be unlinked: %s", path, len(failed) - 1, reason)
    return failed


def _walk(folder: Path | str, prefix: str) -> Iterator[FoundFile]:
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
                yield FoundFile(path, size, read_stamp(entry.path, path) if _is_utf8(path) else None)


def _is_utf8(path: str) -> bool:
    """Whether the file's name is UTF-8: ours are, and the index can hold nothing else."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
