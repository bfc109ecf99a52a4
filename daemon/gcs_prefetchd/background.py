"""Starting the daemon as a process of its own, and waiting for one to end; without polling."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gcs_prefetchd.errors import DaemonUnavailableError, SettingsError, StartError

__all__ = ["Starter", "start_in_background", "wait_for_end"]

STOP_PATIENCE_S = 660.0  # more than the longest stop_deadline_s


def start_in_background(arguments: list[str], stop_deadline_s: float) -> dict[str, Any]:
    """Run `gcs-prefetchd ARGUMENTS --foreground` detached and return what it says once it is ready.

    Raises SettingsError or StartError with the daemon's own words where it could not start.
    """
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "gcs_prefetchd", *arguments, "--foreground", "--ready-fd", str(write_end)]
    daemon = subprocess.Popen(  # noqa: S603  # our own module, with the arguments we were given
        command, stdin=subprocess.DEVNULL, pass_fds=[write_end], start_new_session=True
    )
    os.close(write_end)
    try:
        with os.fdopen(read_end, "rb") as pipe:
            answer = json.loads(pipe.read() or b"{}")
    except KeyboardInterrupt:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(stop_deadline_s + 1)
        raise
    if "error" in answer:
        raise (SettingsError if answer["status"] == 2 else StartError)(answer["error"])
    if "pid" not in answer:
        raise StartError(f"the daemon ended before it was ready, with status {daemon.wait()}")
    daemon.returncode = 0  # it lives on; this only tells Popen that nobody will wait for it
    return dict(answer)


class Starter:
    """Whoever started us and waits at the other end of a pipe; nobody does where there is none."""

    def __init__(self, ready_fd: int | None) -> None:
        self.waits = ready_fd is not None
        self._ready_fd = ready_fd

    def tell(self, answer: dict[str, Any]) -> None:
        """Answer, once: a daemon that fails after it was ready has nobody left to tell."""
        if self._ready_fd is not None:
            ready_fd, self._ready_fd = self._ready_fd, None
            with os.fdopen(ready_fd, "wb") as pipe:
                pipe.write(json.dumps(answer).encode())


@contextmanager
def wait_for_end(pid: int) -> Iterator[Callable[[], bool]]:
    """Hold on to a process so that its end can be waited for; yields a function that waits and says whether it ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        raise DaemonUnavailableError(f"process {pid} has ended") from None
    try:
        yield lambda: bool(select.select([process], [], [], STOP_PATIENCE_S)[0])
    finally:
        os.close(process)
