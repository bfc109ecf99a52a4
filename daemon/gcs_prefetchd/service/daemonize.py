"""Forking the daemon into the background, and waiting for a process to exit. Nothing polls."""

import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from gcs_prefetchd.shared.errors import DaemonUnavailableError, SettingsError, StartError

__all__ = ["ForkedDaemon", "ParentProcess", "fork_daemon", "wait_for_exit"]

EXIT_TIMEOUT_S = 660.0  # more than the longest stop_deadline_s


@dataclass(frozen=True, slots=True)
class ForkedDaemon:
    """The daemon as its parent process sees it: a pid, and a pipe on which it reports that it is ready or has failed."""

    pid: int
    pipe: int

    def wait_until_ready(self) -> dict[str, Any]:
        """Return the daemon's report. Raises SettingsError or StartError with the daemon's message if it could not start."""
        try:
            with os.fdopen(self.pipe, "rb") as pipe:
                report = json.loads(pipe.read() or b"{}")
        except KeyboardInterrupt:
            os.kill(self.pid, signal.SIGTERM)
            os.waitpid(self.pid, 0)
            raise
        if "error" in report:
            raise (SettingsError if report["status"] == 2 else StartError)(report["error"])
        if "pid" not in report:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            raise StartError(f"the daemon exited before it was ready, with status {status}")
        return dict(report)


class ParentProcess:
    """The process that forked the daemon and waits at the other end of a pipe. Without a pipe there is none."""

    def __init__(self, pipe: int | None = None) -> None:
        self.exists = pipe is not None
        self._pipe = pipe

    def report(self, report: dict[str, Any]) -> None:
        """Send one report. Later ones are discarded: once the daemon was ready, the parent has exited."""
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            with suppress(BrokenPipeError), os.fdopen(pipe, "wb") as file:  # the parent may have been killed
                file.write(json.dumps(report).encode())


def fork_daemon() -> ForkedDaemon | ParentProcess:
    """Fork. The parent gets a `ForkedDaemon`; the child, which outlives it, gets its `ParentProcess`.

    A new interpreter would import everything again, which takes half as long as the complete start. So call this while there is
    only one thread and nothing is open.
    """
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return ForkedDaemon(pid, read_end)
    os.close(read_end)
    os.setsid()
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    return ParentProcess(write_end)


@contextmanager
def wait_for_exit(pid: int) -> Iterator[Callable[[], bool]]:
    """Hold on to a process, so that its pid is not reused. Yields a function that waits and returns whether it has exited."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        raise DaemonUnavailableError(f"process {pid} has exited") from None
    try:
        yield lambda: bool(select.select([process], [], [], EXIT_TIMEOUT_S)[0])
    finally:
        os.close(process)
