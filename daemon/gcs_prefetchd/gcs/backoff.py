"""How long to wait before a failed request is tried again."""

import math
import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["delay_s", "parse_retry_after"]

FIRST_S = 0.1
LONGEST_S = 10.0


def delay_s(
    attempt: int, retry_after_s: float | None = None, patience_s: float = math.inf, spread: float | None = None
) -> float:
    """Seconds to wait after the `attempt`-th failure (from 1).

    Exponential with full jitter (Brooker, "Exponential backoff and jitter", 2015), and never sooner than the server asked for,
    unless it asks for more than `patience_s`. `spread` in [0, 1) replaces the random part.
    """
    share = random.random() if spread is None else spread  # noqa: S311  # no secret depends on it
    delay = share * min(LONGEST_S, FIRST_S * 2.0 ** min(attempt, 32))
    return max(delay, min(retry_after_s or 0.0, patience_s))


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, given in seconds or as a date; None where it says nothing of use."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        wait_s = (parsedate_to_datetime(text) - (now or datetime.now(UTC))).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, wait_s)
