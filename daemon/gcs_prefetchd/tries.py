"""One try of a download or of a page: how far it has come, and who is told how it went."""

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from gcs_prefetchd.answers import UnfitAnswerError
from gcs_prefetchd.limit import Outcome

__all__ = ["Account", "Attempt", "Try", "told"]

REFUSALS = ("429", "503")  # GCS asks for fewer requests

T = TypeVar("T")


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


async def told(attempt: Attempt[T], current: Try) -> T:
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
