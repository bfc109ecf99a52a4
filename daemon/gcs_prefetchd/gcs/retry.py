"""Retries: attempts at a download or a page, the delay between them, and the report of how each ended."""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.gcs.responses import UnusableResponseError, one_line
from gcs_prefetchd.shared.errors import OriginUnavailableError

__all__ = ["MAX_ATTEMPT_SHARE", "Attempt", "AttemptFunction", "Outcome", "RequestObserver", "Retrier", "backoff_delay_s"]

THROTTLING_STATUSES = ("429", "503")  # with these GCS demands fewer requests
# The share of the deadline that silence, a slow body or a Retry-After may use, so that there is always time to retry.
MAX_ATTEMPT_SHARE = 0.5
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended: throttled (429, 503), successful, or neither. Duration and bytes count only after a success."""

    duration_s: float = 0.0
    received_bytes: int = 0
    is_throttled: bool = False
    is_success: bool = False


class RequestObserver(Protocol):
    """Is notified of the requests of one download or one page."""

    def request_sent(self) -> None:
        """A request is sent; one attempt may send several."""

    def attempt_ended(self, outcome: Outcome) -> None:
        """An attempt ended, successfully or not."""


@dataclass(slots=True)
class Attempt:
    """Progress of the current attempt."""

    observer: RequestObserver | None = None
    slow_after_s: float = math.inf
    received_bytes: int = 0
    earlier_bytes: int = 0  # of the same body, received by earlier attempts
    size_bytes: int | None = None
    awaits_token: bool = False
    started_s: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        if self.awaits_token:
            return "no access token arrived"
        if self.size_bytes is None:
            return "no response"
        return f"{self.earlier_bytes + self.received_bytes} of {self.size_bytes} bytes received"

    def check_duration(self) -> None:
        """Raise TimeoutError if it takes too long: another connection may be faster."""
        if time.monotonic() - self.started_s > self.slow_after_s:
            raise TimeoutError(f"after {self.slow_after_s:g} s {self}")


AttemptFunction = Callable[[Attempt], Awaitable[T]]


class Retrier:
    """Repeats an attempt until it succeeds, fails for good, or `deadline_s` has passed. Counts failures in `counters`.

    Retries after an UnusableResponseError that is not final and after any of `transport_errors`. With `renews_token` it also
    retries after the first 401: the refused token was discarded, and the next attempt gets a new one.
    """

    def __init__(
        self,
        deadline_s: float,
        counters: RequestCounters,
        *,
        renews_token: bool,
        transport_errors: tuple[type[Exception], ...] = (OSError,),
    ) -> None:
        self._deadline_s = deadline_s
        self._counters = counters
        self._renews_token = renews_token
        self._transport_errors = transport_errors

    async def run(self, what: str, attempt: AttemptFunction[T], observer: RequestObserver | None) -> T:
        """Return the result of the first attempt that succeeds. Raises OriginError, whose message starts with `what`."""
        attempts, renewed, last = 0, False, ""
        current: Attempt | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    attempts, current = attempts + 1, Attempt(observer, slow_after_s=self._deadline_s * MAX_ATTEMPT_SHARE)
                    try:
                        return await _observed(attempt, current)
                    except UnusableResponseError as exc:
                        self._counters.errors[exc.kind] += 1
                        last, wait_s = str(exc), exc.retry_after_s
                        if exc.kind == "401" and self._renews_token and not renewed:
                            renewed = True
                        elif exc.final is not None:
                            raise exc.final(f"{what}: {last}") from None
                    except self._transport_errors as exc:
                        self._counters.errors[_kind_of(exc)] += 1
                        last, wait_s = one_line(exc), None
                    current = None
                    await asyncio.sleep(backoff_delay_s(attempts, wait_s, self._deadline_s * MAX_ATTEMPT_SHARE))
        except TimeoutError:
            self._counters.errors["deadline"] += 1
            causes = [last] if current is None else [str(current), *([f"before that {last}"] if last else [])]
            raise OriginUnavailableError(
                f"{what}: gave up after {self._deadline_s:g} s and {attempts} {'attempt' if attempts == 1 else 'attempts'}; "
                f"last: {', '.join(causes)}"
            ) from None


def backoff_delay_s(
    attempt: int, retry_after_s: float | None = None, max_retry_after_s: float = math.inf, jitter: float | None = None
) -> float:
    """Seconds to wait after the `attempt`-th failure (from 1).

    Exponential with full jitter (Brooker, "Exponential backoff and jitter", 2015), and never shorter than the server's
    Retry-After, of which `max_retry_after_s` counts at most. `jitter` in [0, 1) replaces the random part.
    """
    share = random.random() if jitter is None else jitter  # noqa: S311  # no secret depends on it
    delay = share * min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt, 32))
    return max(delay, min(retry_after_s or 0.0, max_retry_after_s))


def _kind_of(exc: BaseException) -> str:
    return "timeout" if isinstance(exc, TimeoutError) else "connection"


async def _observed(attempt: AttemptFunction[T], current: Attempt) -> T:
    """Make the attempt and report its outcome. Only a download counts as a success: a page's duration means nothing."""
    if current.observer is None:
        return await attempt(current)
    is_success = is_throttled = False
    try:
        result = await attempt(current)
        is_success = current.size_bytes is not None
        return result
    except UnusableResponseError as exc:
        is_throttled = exc.kind in THROTTLING_STATUSES
        raise
    finally:
        current.observer.attempt_ended(
            Outcome(time.monotonic() - current.started_s, current.received_bytes, is_throttled, is_success)
        )
