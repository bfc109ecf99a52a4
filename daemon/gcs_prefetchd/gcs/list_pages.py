"""Parses a page of GCS's JSON listing into columns. Pure."""

import base64
from typing import Any

import numpy as np

from gcs_prefetchd.gcs.responses import UnusableResponseError
from gcs_prefetchd.shared.item_ids import Int64Array
from gcs_prefetchd.shared.manifest import UNKNOWN_CRC32C, ObjectColumns

__all__ = ["FIELDS", "parse_page", "without_folder_placeholders"]

FIELDS = "nextPageToken,items(name,generation,size,crc32c)"
NO_HASH = "AAAAAA=="  # replaces a missing hash, so that all of them are decoded at once


def parse_page(page: Any) -> tuple[ObjectColumns, str]:
    """Return the page's objects and the next page's token ("" after the last page). Raises UnusableResponseError."""
    try:
        items, token = page.get("items", []), str(page.get("nextPageToken") or "")
        list(items)
    except (AttributeError, TypeError):
        raise UnusableResponseError("listing", "the page is not a listing") from None
    try:
        return _columns(items), token
    except (AttributeError, KeyError, ValueError, TypeError, OverflowError):
        shown = str(next((item for item in items if not _is_valid(item)), items))[:200]
    raise UnusableResponseError("listing", f"an entry lacks name, generation or size: {shown}")


def without_folder_placeholders(objects: ObjectColumns) -> ObjectColumns:
    """The objects without folder placeholders, which are those whose names end with a slash."""
    rows = [row for row, name in enumerate(objects.names) if not name.endswith("/")]
    if len(rows) == len(objects):
        return objects
    names = [objects.names[row] for row in rows]
    return ObjectColumns(names, objects.generation[rows], objects.size[rows], objects.crc32c[rows])


def _columns(items: Any) -> ObjectColumns:
    names = [item["name"] for item in items]
    "".join(names).encode()  # raises if one is not a str, or not Unicode
    generation = np.array([int(item["generation"]) for item in items], dtype=np.int64)
    size = np.array([int(item["size"]) for item in items], dtype=np.int64)
    if np.any(generation < 0) or np.any(size < 0):
        raise ValueError
    return ObjectColumns(names, generation, size, _crc32c([item.get("crc32c") for item in items]))


def _crc32c(encoded: list[str | None]) -> Int64Array:
    """The hashes. Each is encoded as base64 of four bytes: six characters and `==`."""
    text = "".join([NO_HASH if one is None else one for one in encoded])
    padding = "=" * (2 * len(encoded))
    # If one is longer and another shorter, the padding is not where it should be.
    if len(text) != 8 * len(encoded) or text[6::8] + text[7::8] != padding or text.count("=") != len(padding):
        raise ValueError
    decoded = np.frombuffer(base64.b64decode(text.replace("=", "A"), validate=True), dtype=np.uint8).reshape(-1, 6)
    crc32c = np.ascontiguousarray(decoded[:, :4]).view(">u4").reshape(-1).astype(np.int64)
    if None in encoded:
        crc32c[[one is None for one in encoded]] = UNKNOWN_CRC32C
    return crc32c


def _is_valid(item: Any) -> bool:
    try:
        return len(_columns([item])) == 1
    except (AttributeError, KeyError, ValueError, TypeError, OverflowError):
        return False
