"""How fast requests are sent, in requests and bytes per second: GCS's ramp rule and the settings' limits, as token buckets.

Pure: every call is given the time. A demand never waits here. It consumes its tokens at once, if need be as a debt, and the
prefetches wait until the debt is paid off.
"""

from math import inf

__all__ = ["RAMP_START_PER_S", "RampRule", "RateLimit", "RateMeter", "TokenBucket"]

RAMP_START_PER_S = 5000.0  # reads of a bucket without hierarchical namespace; listings and metadata requests count, too
DOUBLING_S = 1200.0
RAMP_UPDATE_S = 1.0
BURST_S = 0.05  # covers the resolution of timers; in every second the rate is exceeded by 5 % at most


class RateLimit:
    """Computes when a prefetch may start, and counts what was consumed.

    None means no limit, but the ramp rule always holds for requests. `requests` and `received_bytes` measure what was really
    sent and received, not the tokens that were consumed in advance.
    """

    def __init__(
        self, max_requests_per_s: float | None = None, max_bytes_per_s: float | None = None, now_s: float = 0.0
    ) -> None:
        self.max_requests_per_s = max_requests_per_s
        self.max_bytes_per_s = max_bytes_per_s
        self.requests = RateMeter()
        self.received_bytes = RateMeter()
        self._ramp = RampRule()
        self._ramp_updated_s = now_s
        self._request_tokens = TokenBucket(self.allowed_requests_per_s, now_s)
        self._byte_tokens = TokenBucket(max_bytes_per_s or inf, now_s)

    @property
    def allowed_requests_per_s(self) -> float:
        """The setting's limit or the ramp rule's, whichever is lower."""
        return min(self.max_requests_per_s or inf, self._ramp.allowed_per_s)

    def set_limits(self, max_requests_per_s: float | None, max_bytes_per_s: float | None, now_s: float) -> None:
        """Replace the settings' limits."""
        self.max_requests_per_s, self.max_bytes_per_s = max_requests_per_s, max_bytes_per_s
        self._request_tokens.set_rate(self.allowed_requests_per_s, now_s)
        self._byte_tokens.set_rate(max_bytes_per_s or inf, now_s)

    def consume(self, requests: int, size_bytes: int, now_s: float) -> None:
        """Consume tokens, going into debt if necessary. A negative count refunds unused ones."""
        self._request_tokens.consume(requests, now_s)
        if self.max_bytes_per_s is not None:
            self._byte_tokens.consume(size_bytes, now_s)

    def wait_s(self, now_s: float) -> float:
        """How long a prefetch must wait if nothing else is consumed; 0 if it may start."""
        wait_s = self._request_tokens.wait_s(now_s)
        return wait_s if self.max_bytes_per_s is None else max(wait_s, self._byte_tokens.wait_s(now_s))

    def count_request(self, now_s: float) -> None:
        """Count a request that was sent."""
        self.requests.add(1, now_s)
        if now_s - self._ramp_updated_s >= RAMP_UPDATE_S:
            self._ramp_updated_s = now_s
            self._ramp.update(self.requests.per_s(now_s), now_s)
            self._request_tokens.set_rate(self.allowed_requests_per_s, now_s)


class RampRule:
    """What GCS allows: 5,000 requests per second after a cold start, and at most twice as many every 20 minutes.

    GCS spreads a bucket over more servers because of its load, not because time passes. So the allowed rate grows only while
    at least half of it is used, and shrinks as fast while less is used. See "Request rate and access distribution guidelines"
    in the documentation of Cloud Storage.
    """

    def __init__(self) -> None:
        self.allowed_per_s = RAMP_START_PER_S
        self._updated_s: float | None = None

    def update(self, used_per_s: float, now_s: float) -> None:
        """Adapt the allowed rate to the rate that was used since the last update."""
        if self._updated_s is not None:
            factor: float = 2.0 ** (max(0.0, now_s - self._updated_s) / DOUBLING_S)
            is_used = 2 * used_per_s >= self.allowed_per_s
            self.allowed_per_s = max(RAMP_START_PER_S, self.allowed_per_s * factor if is_used else self.allowed_per_s / factor)
        self._updated_s = now_s


class TokenBucket:
    """Tokens that arrive at a rate. A caller may proceed while any are left; to consume more than are left makes a debt."""

    def __init__(self, per_s: float, now_s: float) -> None:
        self.per_s = per_s
        self._tokens = self._burst
        self._filled_s = now_s

    @property
    def _burst(self) -> float:
        return max(1.0, self.per_s * BURST_S)

    def consume(self, count: float, now_s: float) -> None:
        """Consume tokens, going into debt if necessary. A negative count refunds unused ones."""
        self._fill(now_s)
        self._tokens = min(self._tokens - count, self._burst)

    def wait_s(self, now_s: float) -> float:
        """How long until a token is left; 0 if one is."""
        self._fill(now_s)
        return 0.0 if self._tokens > 0 else (1e-6 - self._tokens) / self.per_s

    def set_rate(self, per_s: float, now_s: float) -> None:
        """Change the rate from now on. A debt is paid off at the new rate."""
        self._fill(now_s)
        self.per_s = per_s
        self._tokens = min(self._tokens, self._burst)

    def _fill(self, now_s: float) -> None:
        if now_s > self._filled_s:
            self._tokens = min(self._tokens + (now_s - self._filled_s) * self.per_s, self._burst)
            self._filled_s = now_s


class RateMeter:
    """Counts events per second, over the last full second of the clock."""

    def __init__(self) -> None:
        self._second = -1
        self._count = 0.0
        self._previous_count = 0.0

    def add(self, count: float, now_s: float) -> None:
        """Count events that happen now."""
        self._advance(int(now_s))
        self._count += count

    def per_s(self, now_s: float) -> float:
        """The events of the last full second."""
        self._advance(int(now_s))
        return self._previous_count

    def _advance(self, second: int) -> None:
        if second != self._second:
            self._previous_count = self._count if second == self._second + 1 else 0.0
            self._second, self._count = second, 0.0
