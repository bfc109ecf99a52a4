"""Where log lines go and how they look."""

import logging
import os
import re
import sys
import warnings
from pathlib import Path

from gcs_prefetchd.shared.errors import StartError

__all__ = ["setup_logging"]

LONGEST_LINE = 2000
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _OneLine(logging.Formatter):
    """Keeps a message on one line and cuts it where somebody else's answer made it long; a traceback stays whole."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        line = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], super().formatMessage(record)[: LONGEST_LINE + 1])
        return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " ..."


def setup_logging(file: Path | None, level: str) -> None:
    """Log to stderr, or to a file that takes stdout's and stderr's place. Raises StartError where it cannot be written."""
    if file is not None:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as exc:
            raise StartError(f"setting log_file: {file}: {exc.strerror}") from None
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.close(descriptor)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    # watchdog tells of a folder that it saw twice while it took stock of a growing tree: harmless, and a screen long.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"watchdog\.")
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("gcs_prefetchd").setLevel(level.upper())
