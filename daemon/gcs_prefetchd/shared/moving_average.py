"""How fast things go of late: reads per second, and how long downloads take. Pure: whoever asks says what time it is."""

import math

__all__ = ["MovingDuration", "MovingRate"]

MEMORY_S = 10.0
ASSUMED_DOWNLOAD_S = 0.1
ASSUMED_PER_S = 100.0  # before anything was counted
SLOWEST_PER_S = 0.01
MEMORY_SHARE = 0.02  # of what a new duration weighs against all before it


class MovingRate:
    """Events per second over the last ten seconds or so; what is silent slows down."""

    def __init__(self) -> None:
        self._count = 0.0
        self._seconds = 0.0
        self._last_s: float | None = None

    def add(self, count: int, now_s: float) -> None:
        """So many more have been counted by now."""
        if self._last_s is not None:
            kept = math.exp(-max(now_s - self._last_s, 0.0) / MEMORY_S)
            self._seconds = self._seconds * kept + MEMORY_S * (1 - kept)
            self._count = self._count * kept + count
        self._last_s = now_s

    def per_s(self, now_s: float) -> float:
        """The rate, never 0; 100 before the second count."""
        if self._last_s is None or self._count == 0:
            return ASSUMED_PER_S
        silent_s = max(now_s - self._last_s, 0.0)
        return max(self._count / (self._seconds + silent_s + 1e-3), SLOWEST_PER_S)


class MovingDuration:
    """Mean and standard deviation of the latest fifty durations or so, in seconds."""

    def __init__(self, assumed_s: float = ASSUMED_DOWNLOAD_S) -> None:
        self.mean_s = assumed_s
        self._variance = assumed_s**2

    def add(self, seconds: float) -> None:
        """One more was measured."""
        off = seconds - self.mean_s
        self.mean_s += MEMORY_SHARE * off
        self._variance = (1 - MEMORY_SHARE) * (self._variance + MEMORY_SHARE * off * off)

    @property
    def deviation_s(self) -> float:
        """The standard deviation."""
        return math.sqrt(self._variance)
