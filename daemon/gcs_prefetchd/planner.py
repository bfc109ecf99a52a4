"""What to fetch next and what to drop: plain functions over plain data, no clock, no files, no awaiting.

Least recently used goes first, and a fixed window of items ahead of each reader is fetched and held. Prefetching never pushes
out what some window still holds (Cao, Felten, Karlin and Li, "A study of integrated prefetching and caching strategies",
SIGMETRICS 1995: "do no harm").
"""

from collections.abc import Container, Iterable, Iterator

from gcs_prefetchd.streams import Stream

__all__ = ["choose_victims", "next_items"]


def next_items(streams: Iterable[Stream], window: int) -> Iterator[tuple[Stream, int]]:
    """The items that come into the streams' windows, each once, the nearest of every stream first."""
    waiting = [stream for stream in streams if stream.ahead < window]
    while waiting:
        stream = min(waiting, key=lambda one: one.ahead)
        item = stream.advance()
        if item is None or stream.ahead >= window:
            waiting.remove(stream)
        if item is not None:
            yield stream, item


def choose_victims(least_recent_first: Iterable[tuple[str, int]], short_bytes: int, keep: Container[str]) -> list[str] | None:
    """The paths to drop so that `short_bytes` come free, least recently used first; None where `keep` holds too much."""
    victims: list[str] = []
    for path, size in least_recent_first:
        if short_bytes <= 0:
            return victims
        if path not in keep:
            victims.append(path)
            short_bytes -= size
    return victims if short_bytes <= 0 else None
