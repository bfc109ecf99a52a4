"""Counters of the requests to GCS."""

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["RequestCounters"]


@dataclass(slots=True)
class RequestCounters:
    """Totals since the start: requests sent, body bytes received, failures by kind. `in_flight` is the downloads now."""

    requests: int = 0
    received_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
