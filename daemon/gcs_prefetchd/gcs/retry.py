"""The tries of a download or of a page: how far each has come, who is told how it went, and when there is another."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from gcs_prefetchd.gcs.backoff import delay_s
from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.gcs.responses import UnusableResponseError, one_line
from gcs_prefetchd.shared.errors import OriginUnavailableError

__all__ = ["MAX_ATTEMPT_SHARE", "Attempt", "AttemptFunction", "Outcome", "RequestObserver", "Retrier"]

REFUSALS = ("429", "503")  # GCS asks for fewer requests
# Of the deadline silence, a body that drips and a Retry-After take so much at most, so that there is always another try.
MAX_ATTEMPT_SHARE = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request went: whether GCS refused it for now (429, 503), else what it took and what came if it went well."""

    duration_s: float = 0.0
    received_bytes: int = 0
    is_throttled: bool = False
    is_success: bool = False


class RequestObserver(Protocol):
    """Who is told of the requests of a download or of a page."""

    def request_sent(self) -> None:
        """A request goes out; a try may take several."""

    def attempt_ended(self, outcome: Outcome) -> None:
        """A try has ended, well or not."""


@dataclass(slots=True)
class Attempt:
    """How far the try under way has come."""

    observer: RequestObserver | None = None
    slow_after_s: float = math.inf
    received_bytes: int = 0
    before_bytes: int = 0  # what tries before it had received of the same body
    size_bytes: int | None = None
    awaits_token: bool = False
    started_s: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        if self.awaits_token:
            return "no access token arrived"
        if self.size_bytes is None:
            return "no response"
        return f"{self.before_bytes + self.received_bytes} of {self.size_bytes} bytes received"

    def check_pace(self) -> None:
        """Raise TimeoutError where it has taken too long: another connection may be faster."""
        if time.monotonic() - self.started_s > self.slow_after_s:
            raise TimeoutError(f"after {self.slow_after_s:g} s {self}")


AttemptFunction = Callable[[Attempt], Awaitable[T]]


class Retrier:
    """Makes attempts until one succeeds, fails for good, or `deadline_s` has passed; counts failures in `counters`.

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

    async def make(self, what: str, attempt: AttemptFunction[T], observer: RequestObserver | None) -> T:
        """The result of the attempt that succeeds. Raises OriginError, which `what` begins."""
        tries, renewed, last = 0, False, ""
        current: Attempt | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    tries, current = tries + 1, Attempt(observer, slow_after_s=self._deadline_s * MAX_ATTEMPT_SHARE)
                    try:
                        return await _told(attempt, current)
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
                    await asyncio.sleep(delay_s(tries, wait_s, self._deadline_s * MAX_ATTEMPT_SHARE))
        except TimeoutError:
            self._counters.errors["deadline"] += 1
            causes = [last] if current is None else [str(current), *([f"before that {last}"] if last else [])]
            raise OriginUnavailableError(
                f"{what}: gave up after {self._deadline_s:g} s and {tries} {'attempt' if tries == 1 else 'attempts'}; "
                f"last: {', '.join(causes)}"
            ) from None


def _kind_of(exc: BaseException) -> str:
    return "timeout" if isinstance(exc, TimeoutError) else "connection"


async def _told(attempt: AttemptFunction[T], current: Attempt) -> T:
    """Make the attempt and tell its observer how it went. Only a download's time is told: a page's says nothing of it."""
    if current.observer is None:
        return await attempt(current)
    is_success = is_throttled = False
    try:
        result = await attempt(current)
        is_success = current.size_bytes is not None
        return result
    except UnusableResponseError as exc:
        is_throttled = exc.kind in REFUSALS
        raise
    finally:
        current.observer.attempt_ended(
            Outcome(time.monotonic() - current.started_s, current.received_bytes, is_throttled, is_success)
        )
