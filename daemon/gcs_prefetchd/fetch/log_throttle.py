"""Log lines that would repeat: the first of a kind is logged at once, the later ones are summed up in one line per period."""

import asyncio
import logging
from dataclasses import dataclass

__all__ = ["LogThrottle"]


@dataclass(slots=True)
class _Withheld:
    """The lines of one kind that were not logged yet: their count, the last of them, and the timer that will log it."""

    timer: asyncio.TimerHandle
    count: int = 0
    last_line: str = ""


class LogThrottle:
    """Logs at most one line per kind in `period_s` seconds, as a warning. `close` logs the rest.

    Thousands of lines that differ only in a name give no more information than their number does, and fill a disk.
    """

    def __init__(self, log: logging.Logger, period_s: float) -> None:
        self._log = log
        self._period_s = period_s
        self._withheld: dict[str, _Withheld] = {}

    def warn(self, kind: str, line: str) -> bool:
        """Log the line, or withhold it until the period of its kind ends. Returns whether it was logged."""
        if kind not in self._withheld:
            self._withheld[kind] = _Withheld(self._start_period(kind))
            self._log.warning("%s", line)
            return True
        self._withheld[kind].count += 1
        self._withheld[kind].last_line = line
        return False

    def close(self) -> None:
        """Log what is withheld."""
        for withheld in self._withheld.values():
            withheld.timer.cancel()
            self._sum_up(withheld)
        self._withheld.clear()

    def _start_period(self, kind: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._period_s, self._end_period, kind)

    def _end_period(self, kind: str) -> None:
        withheld = self._withheld.pop(kind)
        if withheld.count:
            self._sum_up(withheld)
            self._withheld[kind] = _Withheld(self._start_period(kind))

    def _sum_up(self, withheld: _Withheld) -> None:
        if withheld.count == 1:
            self._log.warning("%s", withheld.last_line)
        elif withheld.count:
            self._log.warning("%s; %s more like it since the line before", withheld.last_line, f"{withheld.count - 1:,}")
