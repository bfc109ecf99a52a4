"""Reads and lists the images of a local folder."""

import os
import posixpath
from pathlib import Path

from PIL import Image

from gcs_dataset.decode import decode
from gcs_dataset.item_listing import Items, complete_items, ids_of_names
from gcs_prefetchd.shared.errors import ItemError
from gcs_prefetchd.shared.item_patterns import ItemPatterns

__all__ = ["list_items_local", "list_pairs_local", "pil_loader"]


def pil_loader(path: str | os.PathLike[str], mode: str | None = "RGB") -> Image.Image:
    """The image in a local file, fully loaded and converted to `mode`; None keeps the stored mode (class indices of labels).

    Raises ItemError if the file cannot be read or is not an image.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        raise ItemError(f"{os.fspath(path)}: {exc.strerror}") from exc
    return decode(data, os.fspath(path), mode)


def list_items_local(path: str | os.PathLike[str]) -> list[str]:
    """The sorted ids of the files below a folder: their paths without the extension (`a/7.jpg` is `a/7`).

    Raises ItemError if there is no such folder, no file in it, or if two files have the same id.
    """
    return ids_of_names(_files_below(Path(path)), os.fspath(path))


def list_pairs_local(data_root: str | os.PathLike[str], item_patterns: ItemPatterns) -> Items:
    """The items of a local data root that have all their parts, and the parts that the others lack."""
    root = Path(data_root)
    # A pattern may have text before its id (`photo-{id}.jpg`), and only the part before its last slash is a folder.
    folders = {posixpath.dirname(start) for start in item_patterns.folders()}
    names = [posixpath.join(folder, name) for folder in folders for name in _files_below(root / folder)]
    return complete_items(names, item_patterns, str(root))


def _files_below(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ItemError(f"{folder}: no such folder")
    found = []
    for parent, _, files in os.walk(folder, followlinks=True):
        below = Path(parent).relative_to(folder)
        found += [(below / file).as_posix() for file in files]
    for name in found:
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise ItemError(f"{folder}: the name {name!r} is not UTF-8; rename the file")
    return found
