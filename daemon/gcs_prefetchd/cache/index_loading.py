"""Taking stock of a cache after a start: what its index says, in order of use, while the event loop goes on."""

import asyncio
from array import array
from collections.abc import AsyncIterator, Container

import numpy as np

from gcs_prefetchd.cache.disk_index import Record
from gcs_prefetchd.cache.memory_index import Contents
from gcs_prefetchd.shared.malloc import return_freed_memory

__all__ = ["load_index"]


async def load_index(
    contents: Contents, pages: AsyncIterator[list[tuple[str, Record]]], changed: Container[str], at_a_time: int
) -> None:
    """Put the index's pages into the contents, least recently used first; what is `changed` or held already is left as it is.

    The index has its rows in the order in which they first came: to have SQLite sort them would take files outside the cache
    directory, or a hundred bytes of memory for each.
    """
    slots, used_s = array("I"), array("d")
    async for page in pages:
        for path, record in page:
            if path not in changed and path not in contents.entries:
                slots.append(contents.load(path, record))
                used_s.append(record.used_s)
    order = array("I", await asyncio.to_thread(_order, used_s))
    for start in range(0, len(order), at_a_time):
        for number in order[start : start + at_a_time]:
            contents.entries.use(slots[number])
        await asyncio.sleep(0)
    del slots, used_s, order
    await asyncio.to_thread(return_freed_memory)  # a start needs lists as long as the cache, and nothing after it does


def _order(used_s: "array[float]") -> bytes:
    return np.argsort(np.frombuffer(used_s), kind="stable").astype(np.uint32).tobytes()
