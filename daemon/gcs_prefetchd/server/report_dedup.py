"""Recognizes read reports that are sent twice: a reader repeats a report if the response was lost. Pure."""

__all__ = ["ReportDedup"]

MAX_REPORTERS = 10_000  # a process is one or two reporters, and repeats a report within seconds


class ReportDedup:
    """The number of the last report of each reporter. Only the reporters that reported last are remembered."""

    def __init__(self, max_reporters: int = MAX_REPORTERS) -> None:
        self._max_reporters = max_reporters
        self._last_numbers: dict[str, int] = {}

    def accept(self, reporter: str, number: int) -> bool:
        """Return True for a report that was not accepted before. A reporter's numbers increase, from 1."""
        last = self._last_numbers.pop(reporter, 0)
        self._last_numbers[reporter] = max(last, number)
        if len(self._last_numbers) > self._max_reporters:
            del self._last_numbers[next(iter(self._last_numbers))]
        return number > last
