"""How fast requests go out, in requests and bytes a second: settings' bounds and GCS's ramp rule. Pure: it is told the time.

A reader never waits here: what it asks for is spent at once, a debt if need be, and prefetches wait until that is paid off.
"""

from math import inf

from gcs_prefetchd.fetch.ramp_rule import Bucket, Meter, Ramp

__all__ = ["Governor"]

RAMP_EVERY_S = 1.0


class Governor:
    """Says when a prefetch may go, and counts what is spent. None as a bound is none, but for requests the ramp holds always.

    `requests` and `received_bytes` measure what was really sent and received, which is not what was spent ahead.
    """

    def __init__(
        self, max_requests_per_s: float | None = None, max_bytes_per_s: float | None = None, now_s: float = 0.0
    ) -> None:
        self.max_requests_per_s = max_requests_per_s
        self.max_bytes_per_s = max_bytes_per_s
        self.requests = Meter()
        self.received_bytes = Meter()
        self._ramp = Ramp()
        self._ramped_s = now_s
        self._request_tokens = Bucket(self.allowed_requests_per_s, now_s)
        self._byte_tokens = Bucket(max_bytes_per_s or inf, now_s)

    @property
    def allowed_requests_per_s(self) -> float:
        """The setting or the ramp, whichever is less."""
        return min(self.max_requests_per_s or inf, self._ramp.per_s)

    def bound(self, max_requests_per_s: float | None, max_bytes_per_s: float | None, now_s: float) -> None:
        """Take other bounds."""
        self.max_requests_per_s, self.max_bytes_per_s = max_requests_per_s, max_bytes_per_s
        self._request_tokens.set_rate(self.allowed_requests_per_s, now_s)
        self._byte_tokens.set_rate(max_bytes_per_s or inf, now_s)

    def spend(self, requests: int, size_bytes: int, now_s: float) -> None:
        """Take these tokens, be they there or not; less than 0 gives back what was spent ahead and not used."""
        self._request_tokens.spend(requests, now_s)
        if self.max_bytes_per_s is not None:
            self._byte_tokens.spend(size_bytes, now_s)

    def wait_s(self, now_s: float) -> float:
        """How long a prefetch has to wait if nothing else is spent; 0 where it may go."""
        wait_s = self._request_tokens.wait_s(now_s)
        return wait_s if self.max_bytes_per_s is None else max(wait_s, self._byte_tokens.wait_s(now_s))

    def sent(self, now_s: float) -> None:
        """A request was sent."""
        self.requests.add(1, now_s)
        if now_s - self._ramped_s >= RAMP_EVERY_S:
            self._ramped_s = now_s
            self._ramp.move(self.requests.per_s(now_s), now_s)
            self._request_tokens.set_rate(self.allowed_requests_per_s, now_s)
