"""The tries of a download or of a page: how far each has come, who is told how it went, and when there is another."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from gcs_prefetchd.gcs.backoff import delay_s
from gcs_prefetchd.gcs.counters import Traffic
from gcs_prefetchd.gcs.responses import UnfitAnswerError, brief
from gcs_prefetchd.shared.errors import OriginUnavailableError

__all__ = ["TRY_SHARE", "Account", "Attempt", "Outcome", "Retries", "Try"]

REFUSALS = ("429", "503")  # GCS asks for fewer requests
# Of the deadline silence, a body that drips and a Retry-After take so much at most, so that there is always another try.
TRY_SHARE = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request went: whether GCS refused it for now (429, 503), else what it took and what came if it went well."""

    seconds: float = 0.0
    received_bytes: int = 0
    is_refused: bool = False
    is_good: bool = False


class Account(Protocol):
    """Who is told of the requests of a download or of a page."""

    def sent(self) -> None:
        """A request goes out; a try may take several."""

    def ended(self, outcome: Outcome) -> None:
        """A try has ended, well or not."""


@dataclass(slots=True)
class Try:
    """How far the try under way has come."""

    account: Account | None = None
    slow_after_s: float = math.inf
    received_bytes: int = 0
    before_bytes: int = 0  # what tries before it had received of the same body
    size_bytes: int | None = None
    awaits_token: bool = False
    started_s: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        if self.awaits_token:
            return "no access token came"
        if self.size_bytes is None:
            return "no answer"
        return f"{self.before_bytes + self.received_bytes} of {self.size_bytes} bytes had come"

    def check_pace(self) -> None:
        """Raise TimeoutError where it has taken too long: another connection may be faster."""
        if time.monotonic() - self.started_s > self.slow_after_s:
            raise TimeoutError(f"after {self.slow_after_s:g} s {self}")


Attempt = Callable[[Try], Awaitable[T]]


class Retries:
    """Makes attempts until one succeeds, fails for good, or `deadline_s` has passed; counts failures in `traffic`.

    Another try follows an UnfitAnswerError that is not final and any of `transport_errors`. Where `renews_token`, one follows
    a first 401, too: the token was forgotten, and the next try asks for another.
    """

    def __init__(
        self,
        deadline_s: float,
        traffic: Traffic,
        *,
        renews_token: bool,
        transport_errors: tuple[type[Exception], ...] = (OSError,),
    ) -> None:
        self._deadline_s = deadline_s
        self._traffic = traffic
        self._renews_token = renews_token
        self._transport_errors = transport_errors

    async def make(self, what: str, attempt: Attempt[T], account: Account | None) -> T:
        """The result of the attempt that succeeds. Raises OriginError, which `what` begins."""
        tries, renewed, last = 0, False, ""
        current: Try | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    tries, current = tries + 1, Try(account, slow_after_s=self._deadline_s * TRY_SHARE)
                    try:
                        return await _told(attempt, current)
                    except UnfitAnswerError as exc:
                        self._traffic.errors[exc.kind] += 1
                        last, wait_s = str(exc), exc.retry_after_s
                        if exc.kind == "401" and self._renews_token and not renewed:
                            renewed = True
                        elif exc.final is not None:
                            raise exc.final(f"{what}: {last}") from None
                    except self._transport_errors as exc:
                        self._traffic.errors[_kind_of(exc)] += 1
                        last, wait_s = brief(exc), None
                    current = None
                    await asyncio.sleep(delay_s(tries, wait_s, self._deadline_s * TRY_SHARE))
        except TimeoutError:
            self._traffic.errors["deadline"] += 1
            causes = [last] if current is None else [str(current), *([f"before that {last}"] if last else [])]
            raise OriginUnavailableError(
                f"{what}: gave up after {self._deadline_s:g} s and {tries} {'try' if tries == 1 else 'tries'}; "
                f"last: {', '.join(causes)}"
            ) from None


def _kind_of(exc: BaseException) -> str:
    return "timeout" if isinstance(exc, TimeoutError) else "connection"


async def _told(attempt: Attempt[T], current: Try) -> T:
    """Make the attempt and tell its account how it went. Only a download's time is told: a page's says nothing of it."""
    if current.account is None:
        return await attempt(current)
    is_good = is_refused = False
    try:
        result = await attempt(current)
        is_good = current.size_bytes is not None
        return result
    except UnfitAnswerError as exc:
        is_refused = exc.kind in REFUSALS
        raise
    finally:
        current.account.ended(Outcome(time.monotonic() - current.started_s, current.received_bytes, is_refused, is_good))
