"""Lines of the log that would repeat: the first of a kind is said at once, those after it in one line now and then."""

import asyncio
import logging
from dataclasses import dataclass

__all__ = ["Repeats"]


@dataclass(slots=True)
class _Unsaid:
    """Of one kind: how many lines were not said since the last that was, the last of them, and when they will be."""

    timer: asyncio.TimerHandle
    count: int = 0
    line: str = ""


class Repeats:
    """Says lines of any number of kinds, of each at most one line in `every_s` seconds; `close` says what is left.

    Thousands of lines that differ in a name alone tell no more than their number does, and fill a disk.
    """

    def __init__(self, log: logging.Logger, every_s: float) -> None:
        self._log = log
        self._every_s = every_s
        self._unsaid: dict[str, _Unsaid] = {}

    def warn(self, kind: str, line: str) -> bool:
        """Say the line, or count it to those of its kind that are said together. Returns whether it was said."""
        if kind not in self._unsaid:
            self._unsaid[kind] = _Unsaid(self._say_later(kind))
            self._log.warning("%s", line)
            return True
        self._unsaid[kind].count += 1
        self._unsaid[kind].line = line
        return False

    def close(self) -> None:
        """Say what is left to be said."""
        for unsaid in self._unsaid.values():
            unsaid.timer.cancel()
            self._say(unsaid)
        self._unsaid.clear()

    def _say_later(self, kind: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._every_s, self._time_has_come, kind)

    def _time_has_come(self, kind: str) -> None:
        unsaid = self._unsaid.pop(kind)
        if unsaid.count:
            self._say(unsaid)
            self._unsaid[kind] = _Unsaid(self._say_later(kind))

    def _say(self, unsaid: _Unsaid) -> None:
        if unsaid.count == 1:
            self._log.warning("%s", unsaid.line)
        elif unsaid.count:
            self._log.warning("%s; %s more like it since the line before", unsaid.line, f"{unsaid.count - 1:,}")
