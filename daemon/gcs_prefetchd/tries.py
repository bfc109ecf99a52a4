"""One try of a download or of a page: how far it has come, and who is told how it went."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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
    received_bytes: int = 0
    size_bytes: int | None = None
    awaits_token: bool = False

    def __str__(self) -> str:
        if self.awaits_token:
            return "no access token came"
        return "no answer" if self.size_bytes is None else f"{self.received_bytes} of {self.size_bytes} bytes had come"


Attempt = Callable[[Try], Awaitable[T]]


async def told(attempt: Attempt[T], current: Try) -> T:
    """Make the attempt and tell its account how it went. Only a download's time is told: a page's says nothing of it."""
    if current.account is None:
        return await attempt(current)
    started_s = time.monotonic()
    is_good = is_refused = False
    try:
        result = await attempt(current)
        is_good = current.size_bytes is not None
        return result
    except UnfitAnswerError as exc:
        is_refused = exc.kind in REFUSALS
        raise
    finally:
        current.account.ended(Outcome(time.monotonic() - started_s, current.received_bytes, is_refused, is_good))
