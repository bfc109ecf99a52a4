"""How slow the server is: latency, bandwidth, concurrency and request rate."""

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

__all__ = ["Pace", "Pacer"]

BURST_S = 0.05


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow the server is.

    `latency_s` passes before the first byte of every response; with `latency_sigma` it is the median of a lognormal
    distribution. `bytes_per_s` bounds the rate of each body. At most `at_once` media requests are served
    at a time, the others queue, and requests beyond `requests_per_s` get a 503; by default there is no bound.
    """

    latency_s: float = 0.0
    latency_sigma: float = 0.0
    bytes_per_s: float | None = None
    at_once: int | None = None
    requests_per_s: float | None = None


class Pacer:
    """Holds media requests to a pace, which may change between them."""

    def __init__(self) -> None:
        self._lines: dict[int, asyncio.Semaphore] = {}
        self._tokens = 0.0
        self._last_s = float("-inf")

    def line(self, pace: Pace) -> AbstractAsyncContextManager[None]:
        """The queue in which a request waits, and which it occupies while it is served."""
        if pace.at_once is None:
            return nullcontext()
        return self._lines.setdefault(pace.at_once, asyncio.Semaphore(pace.at_once))

    def is_too_fast(self, pace: Pace, now_s: float) -> bool:
        """Whether a request that arrives now exceeds the rate."""
        if pace.requests_per_s is None:
            return False
        burst = max(1.0, pace.requests_per_s * BURST_S)
        self._tokens = min(burst, self._tokens + (now_s - self._last_s) * pace.requests_per_s)
        self._last_s = now_s
        if self._tokens < 1:
            return True
        self._tokens -= 1
        return False
