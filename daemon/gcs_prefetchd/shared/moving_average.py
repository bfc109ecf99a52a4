"""Moving averages: events per second, and durations. Pure: callers pass the time."""

import math

__all__ = ["MovingDuration", "MovingRate"]

MEMORY_S = 10.0
ASSUMED_DOWNLOAD_S = 0.1
ASSUMED_PER_S = 100.0  # before the first event
MIN_PER_S = 0.01
NEW_WEIGHT = 0.02  # of a new duration against all earlier ones


class MovingRate:
    """Events per second over about the last ten seconds; without events it falls."""

    def __init__(self) -> None:
        self._count = 0.0
        self._seconds = 0.0
        self._last_s: float | None = None

    def add(self, count: int, now_s: float) -> None:
        """Add the events since the last call."""
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
        return max(self._count / (self._seconds + silent_s + 1e-3), MIN_PER_S)


class MovingDuration:
    """Mean and standard deviation of about the last fifty durations, in seconds."""

    def __init__(self, assumed_s: float = ASSUMED_DOWNLOAD_S) -> None:
        self.mean_s = assumed_s
        self._variance = assumed_s**2

    def add(self, seconds: float) -> None:
        """Add a duration."""
        difference = seconds - self.mean_s
        self.mean_s += NEW_WEIGHT * difference
        self._variance = (1 - NEW_WEIGHT) * (self._variance + NEW_WEIGHT * difference**2)

    @property
    def deviation_s(self) -> float:
        """The standard deviation."""
        return math.sqrt(self._variance)
