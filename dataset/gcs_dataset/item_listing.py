"""Items from the names of files or objects: their ids, and the parts that some of them lack. No I/O."""

import logging
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

from gcs_prefetchd.shared.errors import ItemError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Ids

__all__ = ["Items", "complete_items", "ids_of_names", "warn_of_incomplete"]

LOGGED_NAMES = 5

log = logging.getLogger("gcs_dataset")


@dataclass(frozen=True, slots=True)
class Items:
    """The ids of the items that have all their parts, and the names of the parts that other items lack."""

    ids: Ids
    incomplete: tuple[str, ...]


def ids_of_names(names: Iterable[str], where: str) -> list[str]:
    """The sorted ids of files or objects: their names below the folder `where`, without the extension.

    Names that end in "/" are folder placeholders, not items. Raises ItemError if two names have the same id, because only one
    of them could ever be read, and if there are no items.
    """
    by_id: dict[str, str] = {}
    for name in names:
        if name.endswith("/"):
            continue
        item_id = posixpath.splitext(name)[0]
        other = by_id.setdefault(item_id, name)
        if other != name:
            raise ItemError(f"{where}: {other} and {name} have the same id {item_id!r}")
    if not by_id:
        raise ItemError(f"{where}: holds no items")
    return sorted(by_id)


def complete_items(names: Iterable[str], item_patterns: ItemPatterns, where: str) -> Items:
    """Group the names (below the data root `where`) into items; those that lack a part are left out, and the part is named."""
    parts: list[set[str]] = [set() for _ in item_patterns.patterns]
    for name in names:
        match = item_patterns.match(name)
        if match is not None:
            parts[match[1]].add(match[0])
    complete = set.intersection(*parts)
    incomplete = tuple(
        f"{where}/{item_patterns.part_name(item_id, part)}"
        for item_id in sorted(set().union(*parts) - complete)
        for part, ids in enumerate(parts)
        if item_id not in ids
    )
    return Items(Ids.from_sorted(sorted(complete)), incomplete)


def warn_of_incomplete(items: Items, item_patterns: ItemPatterns, where: str) -> None:
    """Log once which parts are missing; raises ItemError if no item is complete."""
    logged = ", ".join(items.incomplete[:LOGGED_NAMES])
    more = len(items.incomplete) - LOGGED_NAMES
    missing = logged + (f" and {more} more" if more > 0 else "")
    if not items.ids:
        wanted = " with ".join(item_patterns.patterns)
        raise ItemError(f"{where}: holds no item ({wanted})" + (f"; missing: {missing}" if missing else ""))
    if missing:
        log.warning("%s: items without all their parts are left out; missing: %s", where, missing)
