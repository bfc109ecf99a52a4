"""Checks that a cache's memory index, its disk index and its files agree. Reads every byte, for tests and diagnosis."""

from collections.abc import Awaitable, Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from gcs_prefetchd.cache.file_scan import find_files
from gcs_prefetchd.cache.memory_index import MemoryIndex
from gcs_prefetchd.shared.checked_read import Stamp, read_checked

__all__ = ["find_disagreements"]

PAGE_ENTRIES = 1000


async def find_disagreements(
    memory_index: MemoryIndex, index: Mapping[str, Stamp], objects: Path, run: Callable[..., Awaitable[Any]]
) -> list[str]:
    """One line for each path for which they differ. `run` makes a blocking call in a thread."""
    held = {path: memory_index.entries.get(path) for path in chain.from_iterable(memory_index.entries.pages(PAGE_ENTRIES))}
    problems = [f"{path}: in the index only" for path in index if path not in held]
    problems += [f"{path}: not in the index" for path in held if path not in index]
    problems += [f"{path}: index and memory differ" for path, stamp in index.items() if stamp != held.get(path, stamp)]
    for path, stamp in held.items():
        if await run(read_checked, objects, path, stamp) is None:
            problems.append(f"{path}: the file is not what the index says")
    pages = find_files(objects, PAGE_ENTRIES)
    while page := await run(next, pages, []):
        stamped = [found.path for found in page if found.stamp is not None]
        problems += [f"{path}: a file that the index lacks" for path in stamped if path not in memory_index.entries]
    if memory_index.bytes != sum(map(memory_index.entries.size, held)):
        problems.append(f"the sum of sizes is not {memory_index.bytes}")
    return problems
