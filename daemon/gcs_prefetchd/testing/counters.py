"""Counters of requests and of bytes sent, and a way to wait for a condition on them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

__all__ = ["Counts", "CountsWaiter", "Kind"]


class Kind(StrEnum):
    """The purpose of a request."""

    MEDIA = "media"
    METADATA = "metadata"
    LIST = "list"
    BUCKET = "bucket"
    UPLOAD = "upload"
    DELETE = "delete"
    TOKEN = "token"  # noqa: S105 - a kind of request, not a secret
    OTHER = "other"


class Counts:
    """Requests by kind, and for each by `bucket/name` (by bucket for `list` and `bucket`, by path for `token`).

    A request is counted when it arrives, whatever its response; `bytes` of media bodies are counted when they were sent.
    `open_media` is the number of media requests in progress, `peak_open_media` its maximum.
    """

    def __init__(self) -> None:
        self.media: Counter[str] = Counter()
        self.metadata: Counter[str] = Counter()
        self.list: Counter[str] = Counter()
        self.bucket: Counter[str] = Counter()
        self.upload: Counter[str] = Counter()
        self.delete: Counter[str] = Counter()
        self.token: Counter[str] = Counter()
        self.other: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.open_media = 0
        self.peak_open_media = 0

    def of(self, kind: Kind) -> Counter[str]:
        """Return the requests of one kind."""
        counter: Counter[str] = getattr(self, kind.value)
        return counter

    def total(self, kind: Kind | str | None = None) -> int:
        """Return the number of requests of one kind, or of all kinds."""
        kinds = Kind if kind is None else [Kind(kind)]
        return sum(self.of(each).total() for each in kinds)

    @property
    def total_bytes(self) -> int:
        """Bytes of media bodies sent."""
        return self.bytes.total()

    def reset(self) -> None:
        """Reset all counters; media requests in progress stay open."""
        for kind in Kind:
            self.of(kind).clear()
        self.bytes.clear()
        self.peak_open_media = self.open_media

    def copy(self) -> "Counts":
        """Return a copy of the counts."""
        copied = Counts()
        for kind in Kind:
            copied.of(kind).update(self.of(kind))
        copied.bytes.update(self.bytes)
        copied.open_media, copied.peak_open_media = self.open_media, self.peak_open_media
        return copied

    def summary(self, *, objects: bool = True) -> dict[str, object]:
        """Return the counts for JSON: the totals, and the counts per object if `objects` is true."""
        summary: dict[str, object] = {
            "requests": {kind.value: self.total(kind) for kind in Kind},
            "total": self.total(),
            "bytes": self.total_bytes,
            "open_media": self.open_media,
            "peak_open_media": self.peak_open_media,
        }
        if objects:
            by_kind = {kind.value: dict(self.of(kind)) for kind in Kind}
            summary["objects"] = by_kind | {"bytes": dict(self.bytes)}
        return summary


class CountsWaiter:
    """Counts that wake the callers which wait for them. Belongs to one event loop."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._waiters: list[tuple[Callable[[Counts], bool], asyncio.Future[None]]] = []

    def arrived(self, kind: Kind, key: str) -> None:
        """Count a request."""
        self.counts.of(kind)[key] += 1
        self._wake()

    def sent(self, key: str, size_bytes: int) -> None:
        """Count bytes of a media body."""
        self.counts.bytes[key] += size_bytes
        self._wake()

    @contextmanager
    def open(self, kind: Kind) -> Iterator[None]:
        """Count a media request as open within the context."""
        if kind is not Kind.MEDIA:
            yield
            return
        self.counts.open_media += 1
        self.counts.peak_open_media = max(self.counts.peak_open_media, self.counts.open_media)
        try:
            yield
        finally:
            self.counts.open_media -= 1
            self._wake()

    async def wait_for(self, condition: Callable[[Counts], bool]) -> None:
        """Return as soon as `condition` holds for the counts; it is evaluated after each change."""
        if condition(self.counts):
            return
        waiter = (condition, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await waiter[1]
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters[:]:
            condition, future = waiter
            if not future.done() and condition(self.counts):
                future.set_result(None)
