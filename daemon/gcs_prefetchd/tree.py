"""The tree of files under `objects/`: walking, publishing, unlinking. All of it blocks; no link is followed."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gcs_prefetchd.errors import InvalidNameError
from gcs_prefetchd.names import ObjectName, parse_object_uri
from gcs_prefetchd.stamp import Stamp, read_stamp, write_stamp

__all__ = ["Found", "find_files", "publish", "read_object_name", "unlink_all"]

log = logging.getLogger(__name__)

NAME_ATTRIBUTE = "user.gcs.name"


@dataclass(slots=True)
class Found:
    """How the files differ from what was known of them. `unknown` holds new paths and known ones with another stamp."""

    unknown: dict[str, Stamp] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def find_files(objects: Path, known: Mapping[str, Stamp]) -> Found:
    """Compare the files with what is known. Files that carry no stamp of ours are foreign: they are left alone.

    Raises OSError where the disk fails: what cannot be looked at is not gone.
    """
    found = Found()
    present = set()
    for path, file, size in _walk(objects, ""):
        stamp = read_stamp(file, path) if _is_text(path) else None
        if stamp is None:
            found.foreign.append(path)
        elif stamp.size != size:
            found.damaged.append(path)
        elif stamp != known.get(path):
            found.unknown[path] = stamp
        else:
            present.add(path)
    if len(present) < len(known):
        present.update(found.unknown, found.damaged)
        found.missing = [path for path in known if path not in present]
    return found


def publish(file: int, unfinished: str, objects: Path, path: str, stamp: Stamp, hashed_name: ObjectName | None) -> None:
    """Stamp a whole and checked file, open as `file`, and give it its final name, `objects/path`. Raises OSError."""
    write_stamp(file, stamp, path)
    if hashed_name is not None:
        os.setxattr(file, NAME_ATTRIBUTE, hashed_name.uri.encode())
    final = f"{objects}/{path}"
    try:
        os.rename(unfinished, final)  # noqa: PTH104  # a Path costs as much as the call
    except FileNotFoundError:
        _make_folder(Path(final).parent)
        os.rename(unfinished, final)  # noqa: PTH104


def read_object_name(file: Path) -> ObjectName | None:
    """The object whose file lies under a hash, or None."""
    try:
        return parse_object_uri(os.getxattr(file, NAME_ATTRIBUTE).decode())
    except (OSError, ValueError, InvalidNameError):
        return None


def unlink_all(files: list[str]) -> None:
    """Unlink the files that are still there. One that cannot be unlinked is logged; the next rescan finds it again."""
    for file in files:
        try:
            os.unlink(file)  # noqa: PTH108
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            log.warning("cached %s: cannot be unlinked: %s", file, exc.strerror)


def _make_folder(folder: Path) -> None:
    """Make the folder and those above it; `Path.mkdir` would leave the ones above open to everybody."""
    try:
        folder.mkdir(mode=0o750, exist_ok=True)
    except FileNotFoundError:
        _make_folder(folder.parent)
        folder.mkdir(mode=0o750, exist_ok=True)


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, str, int]]:
    """Every regular file: its path below `objects/`, its path, its size in bytes."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            try:
                size = entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue  # evicted since the folder was read
            yield prefix + entry.name, entry.path, size


def _is_text(path: str) -> bool:
    """Whether the file's name is UTF-8: ours are, and the index can hold nothing else."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
