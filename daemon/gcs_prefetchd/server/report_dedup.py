"""Which read reports have been counted: one whose answer was lost comes again. Pure."""

__all__ = ["Reporters"]

MOST = 10_000  # a process has one or two, and sends a report again within seconds


class Reporters:
    """The number of the last report of each reporter, for those that reported last."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._last: dict[str, int] = {}

    def is_new(self, reporter: str, number: int) -> bool:
        """Whether this report has not come before; from now on it has. Numbers rise, from 1 on."""
        last = self._last.pop(reporter, 0)
        self._last[reporter] = max(last, number)
        if len(self._last) > self._most:
            del self._last[next(iter(self._last))]
        return number > last
