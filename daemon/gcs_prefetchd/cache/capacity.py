"""How much a cache may hold: the size limit, the free-space floor, and what is reserved. Pure arithmetic."""

from gcs_prefetchd.shared.byte_sizes import format_size

__all__ = ["Capacity"]


class Capacity:
    """`limit_bytes` bounds what is cached and reserved together; `min_free_bytes` of the disk stay free.

    Callers pass `cached_bytes`, the sum of the cached files, and `free_bytes`, which the disk has left. They need not look that
    up if `has_floor` is false: there is no floor, and any number will do.
    """

    def __init__(self, limit_bytes: int, min_free_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self.min_free_bytes = min_free_bytes
        self.reserved_bytes = 0
        self.written_bytes = 0  # of the reserved ones, those that are on the disk already

    @property
    def has_floor(self) -> bool:
        """Whether some of the disk must stay free."""
        return self.min_free_bytes > 0

    def reserve(self, size_bytes: int) -> None:
        """Count the bytes as reserved. Every `reserve` must be paired with `release`."""
        self.reserved_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """The bytes are no longer reserved: they are cached, or will not be."""
        self.reserved_bytes -= size_bytes

    def fits(self, size_bytes: int, cached_bytes: int) -> bool:
        """Whether this many bytes fit beside what is cached, with nothing evicted. What is reserved does not count."""
        return cached_bytes + size_bytes <= self.limit_bytes

    def over_limit(self, size_bytes: int, cached_bytes: int) -> int:
        """By how many bytes `size_bytes` more would exceed the limit; less than 0 if they fit."""
        return cached_bytes + self.reserved_bytes + size_bytes - self.limit_bytes

    def under_floor(self, size_bytes: int, free_bytes: int) -> int:
        """By how many bytes `size_bytes` more would leave too little of the disk free; less than 0 if they fit."""
        if not self.has_floor:
            return -self.limit_bytes
        to_write = self.reserved_bytes - self.written_bytes + size_bytes
        return self.min_free_bytes + to_write - free_bytes

    def short_of(self, size_bytes: int, cached_bytes: int, free_bytes: int) -> int:
        """How many bytes must be evicted before `size_bytes` more fit; 0 or less if they fit."""
        return max(self.over_limit(size_bytes, cached_bytes), self.under_floor(size_bytes, free_bytes))

    def refusal(self, size_bytes: int, cached_bytes: int) -> str:
        """Why there is no space for `size_bytes`, in one line."""
        if size_bytes > self.limit_bytes:
            return f"no space for {format_size(size_bytes)}: the whole cache is {format_size(self.limit_bytes)}"
        return (
            f"no space for {format_size(size_bytes)}: the cache holds {format_size(cached_bytes)} of "
            f"{format_size(self.limit_bytes)}, reserves {format_size(self.reserved_bytes)} for downloads, keeps "
            f"{format_size(self.min_free_bytes)} of the disk free, and needs what it holds sooner"
        )
