"""Our own server with a bucket of computed pairs, if nginx is not installed: `synthetic_origin.py PAIRS LATENCY_MS PORT`."""

import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import overload

from gcs_prefetchd.testing import GCSServer
from gcs_prefetchd.testing.stored_objects import Attributes, StoredObject

__all__ = ["SyntheticBucket"]

UPDATED = datetime(2026, 1, 1, tzinfo=UTC)


class _Names(Sequence[str]):
    """train/images/0000000.jpg, ..., train/labels/0000000.png, ..."""

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return 2 * self._pairs

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        part, item = divmod(place, self._pairs)
        return f"train/labels/{item:07}.png" if part else f"train/images/{item:07}.jpg"


class SyntheticBucket:
    """A bucket of this many pairs that needs no memory. Its objects can be listed but not read."""

    def __init__(self, pairs: int) -> None:
        self._names = _Names(pairs)

    def is_quick(self, name: str) -> bool:
        """Return True: nothing here reads a file."""
        return True

    def names(self) -> Sequence[str]:
        """All names, sorted."""
        return self._names

    def get(self, name: str) -> StoredObject | None:
        """The object that a listing names."""
        generation = 1_700_000_000_000_000 + int(name[-11:-4])
        return StoredObject("bench", name, generation, 100_000, "AAAAAA==", None, UPDATED, Attributes(), b"")

    def put(self, name: str, data: bytes, attributes: Attributes, generation: int | None = None) -> StoredObject:
        """Refuse: the objects are computed."""
        raise NotImplementedError

    def delete(self, name: str) -> bool:
        """Refuse: the objects are computed."""
        raise NotImplementedError


async def _serve(pairs: int, latency_ms: float, port: int) -> None:
    async with GCSServer(port=port, latency_s=latency_ms / 1000) as server:
        server._gcs.buckets["bench"] = SyntheticBucket(pairs)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
