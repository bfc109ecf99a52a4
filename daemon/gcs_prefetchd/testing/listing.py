"""Pages of a bucket's listing: pure, over the sorted names."""

import base64
import binascii
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MAX_RESULTS", "ListQuery", "Page", "list_page"]

MAX_RESULTS = 1000  # GCS never returns more entries in a page, whatever is requested


@dataclass(frozen=True, slots=True)
class ListQuery:
    """The parameters of a listing, as the JSON API names them."""

    prefix: str = ""
    delimiter: str = ""
    start_offset: str = ""  # inclusive
    end_offset: str = ""  # exclusive
    max_results: int = MAX_RESULTS
    page_token: str = ""
    include_trailing_delimiter: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """One page: names of objects, "folders" and where the next page starts (None after the last)."""

    names: tuple[str, ...]
    prefixes: tuple[str, ...]
    next_page_token: str | None


def list_page(names: Sequence[str], query: ListQuery) -> Page | None:
    """Return one page of the sorted `names`, or None if the page token is not valid.

    Objects and "folders" (`prefixes`) count towards `max_results` together, as in GCS.
    """
    position = _start(names, query)
    if position is None:
        return None
    found: list[str] = []
    prefixes: list[str] = []
    limit = min(query.max_results, MAX_RESULTS)
    while position < len(names) and _is_within(names[position], query):
        if len(found) + len(prefixes) >= limit:
            last_is_prefix = bool(prefixes) and (not found or prefixes[-1] > found[-1])
            return Page(tuple(found), tuple(prefixes), _token(prefixes[-1] if last_is_prefix else found[-1]))
        name = names[position]
        folder = _folder(name, query)
        if folder is None:
            found.append(name)
            position += 1
            continue
        prefixes.append(folder)
        if query.include_trailing_delimiter and name == folder:
            found.append(name)
        position = _after_folder(names, folder, position)
    return Page(tuple(found), tuple(prefixes), None)


def _start(names: Sequence[str], query: ListQuery) -> int | None:
    position = bisect_left(names, max(query.prefix, query.start_offset))
    if not query.page_token:
        return position
    last = _last_of(query.page_token)
    if last is None:
        return None
    if _folder(last, query) == last:
        return max(position, _after_folder(names, last, 0))
    return max(position, bisect_right(names, last))


def _is_within(name: str, query: ListQuery) -> bool:
    return name.startswith(query.prefix) and (not query.end_offset or name < query.end_offset)


def _folder(name: str, query: ListQuery) -> str | None:
    """Return the name up to the first delimiter past the prefix, which represents all names that share it."""
    if not query.delimiter:
        return None
    end = name.find(query.delimiter, len(query.prefix))
    return None if end < 0 else name[: end + len(query.delimiter)]


def _after_folder(names: Sequence[str], folder: str, low: int) -> int:
    # The names that start with `folder` are adjacent: looking at each would make a page cost as much as the complete bucket.
    high = len(names)
    while low < high:
        middle = (low + high) // 2
        if names[middle].startswith(folder) or names[middle] < folder:
            low = middle + 1
        else:
            high = middle
    return low


def _token(last: str) -> str:
    return base64.urlsafe_b64encode(last.encode()).decode()


def _last_of(token: str) -> str | None:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
