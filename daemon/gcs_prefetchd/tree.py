"""The tree of files under `objects/`: walking, publishing, unlinking. All of it blocks; no link is followed."""

import contextlib
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
    """How the files differ from what was known of them."""

    unknown: dict[str, Stamp] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def find_files(objects: Path, known: Mapping[str, Stamp]) -> Found:
    """Compare the files with what is known. Files that carry no stamp of ours are foreign: they are left alone."""
    found = Found()
    seen = 0
    present = set()
    for path, entry in _walk(objects, ""):
        stamp = known.get(path)
        size = entry.stat(follow_symlinks=False).st_size
        if stamp is not None and size == stamp.size:
            present.add(path)
            seen += 1
            continue
        stamp = read_stamp(Path(entry.path))
        if stamp is None:
            found.foreign.append(path)
        elif stamp.size != size:
            found.damaged.append(path)
        else:
            found.unknown[path] = stamp
    if seen < len(known):
        found.missing = [path for path in known if path not in present and path not in found.damaged]
    return found


def publish(unfinished: Path, final: Path, stamp: Stamp, hashed_name: ObjectName | None) -> None:
    """Stamp a whole and checked file and give it its final name. Raises OSError."""
    file = os.open(unfinished, os.O_RDWR | os.O_CLOEXEC)
    try:
        write_stamp(file, stamp)
        if hashed_name is not None:
            os.setxattr(file, NAME_ATTRIBUTE, hashed_name.uri.encode())
    finally:
        os.close(file)
    try:
        unfinished.rename(final)
    except FileNotFoundError:
        final.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        unfinished.rename(final)


def read_object_name(file: Path) -> ObjectName | None:
    """The object whose file lies under a hash, or None."""
    try:
        return parse_object_uri(os.getxattr(file, NAME_ATTRIBUTE).decode())
    except (OSError, ValueError, InvalidNameError):
        return None


def unlink_all(files: list[Path]) -> None:
    """Unlink the files that are still there. One that cannot be unlinked is logged; the next rescan finds it again."""
    for file in files:
        try:
            file.unlink()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            log.warning("cached %s: cannot be unlinked: %s", file, exc.strerror)


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):
                yield prefix + entry.name, entry
