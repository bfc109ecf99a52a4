"""How fast requests may follow each other: GCS's ramp rule and token buckets. Pure: whoever asks says what time it is."""

__all__ = ["RAMP_START_PER_S", "Bucket", "Meter", "Ramp"]

RAMP_START_PER_S = 5000.0  # reads of a bucket without hierarchical namespace; listings and metadata count
DOUBLING_S = 1200.0
BURST_S = 0.05  # covers the grain of timers; every second stays within 5 % of the rate


class Meter:
    """How many a second there were, in the last second that is over."""

    def __init__(self) -> None:
        self._second = -1
        self._count = 0.0
        self._last = 0.0

    def add(self, count: float, now_s: float) -> None:
        """So many more, now."""
        self._turn(int(now_s))
        self._count += count

    def per_s(self, now_s: float) -> float:
        """Of the last whole second of the clock."""
        self._turn(int(now_s))
        return self._last

    def _turn(self, second: int) -> None:
        if second != self._second:
            self._last = self._count if second == self._second + 1 else 0.0
            self._second, self._count = second, 0.0


class Ramp:
    """What GCS's rule allows: 5,000 requests/s after a cold start, and twice as many every 20 minutes at most.

    A bucket is spread over more of GCS's servers because of its load and not because time passes. So the rate grows only
    while at least half of it is used, and shrinks as fast while less is. See "Request rate and access distribution
    guidelines" in the documentation of Cloud Storage.
    """

    def __init__(self) -> None:
        self.per_s = RAMP_START_PER_S
        self._last_s: float | None = None

    def move(self, used_per_s: float, now_s: float) -> None:
        """So many requests a second were sent since the last call."""
        if self._last_s is not None:
            factor: float = 2.0 ** (max(0.0, now_s - self._last_s) / DOUBLING_S)
            self.per_s = max(RAMP_START_PER_S, self.per_s * factor if 2 * used_per_s >= self.per_s else self.per_s / factor)
        self._last_s = now_s


class Bucket:
    """Tokens that come at a rate. Who asks first may go while any are left; what is spent beyond them is a debt."""

    def __init__(self, per_s: float, now_s: float) -> None:
        self.per_s = per_s
        self._tokens = self._burst
        self._last_s = now_s

    @property
    def _burst(self) -> float:
        return max(1.0, self.per_s * BURST_S)

    def spend(self, count: float, now_s: float) -> None:
        """Take tokens, be they there or not; less than 0 gives some back."""
        self._fill(now_s)
        self._tokens = min(self._tokens - count, self._burst)

    def wait_s(self, now_s: float) -> float:
        """How long until tokens are left; 0 where some are."""
        self._fill(now_s)
        return 0.0 if self._tokens > 0 else (1e-6 - self._tokens) / self.per_s

    def set_rate(self, per_s: float, now_s: float) -> None:
        """Have tokens come at another rate from now on; a debt is paid off at it."""
        self._fill(now_s)
        self.per_s = per_s
        self._tokens = min(self._tokens, self._burst)

    def _fill(self, now_s: float) -> None:
        if now_s > self._last_s:
            self._tokens = min(self._tokens + (now_s - self._last_s) * self.per_s, self._burst)
            self._last_s = now_s
