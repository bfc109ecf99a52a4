"""Where log lines go, and their format."""

import logging
import os
import re
import sys
import warnings
from pathlib import Path

from gcs_prefetchd.shared.errors import StartError

__all__ = ["setup_logging"]

MAX_LINE_CHARACTERS = 2000
_CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _OneLineFormatter(logging.Formatter):
    """Keeps a message on one line, and cuts it if a server's response made it long. A traceback stays complete."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        line = _CONTROL_CHARACTERS.sub(
            lambda match: ascii(match[0])[1:-1], super().formatMessage(record)[: MAX_LINE_CHARACTERS + 1]
        )
        return line if len(line) <= MAX_LINE_CHARACTERS else line[:MAX_LINE_CHARACTERS] + " ..."


def setup_logging(file: Path | None, level: str) -> None:
    """Log to stderr, or to a file that replaces stdout and stderr. Raises StartError if the file cannot be written."""
    if file is not None:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as exc:
            raise StartError(f"setting log_file: {file}: {exc.strerror}") from None
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.close(descriptor)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLineFormatter("%(asctime)s %(levelname)s %(message)s"))
    # watchdog warns, a screen long, about a folder that it saw twice while it scanned a growing tree. That is harmless.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"watchdog\.")
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("gcs_prefetchd").setLevel(level.upper())
