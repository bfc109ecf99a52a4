"""What passes between us and GCS, counted."""

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["RequestCounters"]


@dataclass(slots=True)
class RequestCounters:
    """Counts since the start: requests sent, body bytes received, failures by kind; and the downloads under way now."""

    requests: int = 0
    received_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
