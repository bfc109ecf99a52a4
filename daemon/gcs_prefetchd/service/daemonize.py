"""Starting the daemon as a process of its own, and waiting for one to end; without polling."""

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

STOP_PATIENCE_S = 660.0  # more than the longest stop_deadline_s


@dataclass(frozen=True, slots=True)
class ForkedDaemon:
    """A daemon that was forked off: its process, and the pipe on which it will say that it is ready, or why not."""

    pid: int
    pipe: int

    def wait_until_ready(self) -> dict[str, Any]:
        """What it says; raises SettingsError or StartError with its own words where it could not start."""
        try:
            with os.fdopen(self.pipe, "rb") as pipe:
                answer = json.loads(pipe.read() or b"{}")
        except KeyboardInterrupt:
            os.kill(self.pid, signal.SIGTERM)
            os.waitpid(self.pid, 0)
            raise
        if "error" in answer:
            raise (SettingsError if answer["status"] == 2 else StartError)(answer["error"])
        if "pid" not in answer:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            raise StartError(f"the daemon ended before it was ready, with status {status}")
        return dict(answer)


class ParentProcess:
    """Whoever started us and waits at the other end of a pipe; nobody does where there is none."""

    def __init__(self, pipe: int | None = None) -> None:
        self.waits = pipe is not None
        self._pipe = pipe

    def tell(self, answer: dict[str, Any]) -> None:
        """Answer, once: a daemon that fails after it was ready has nobody left to tell."""
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            with suppress(BrokenPipeError), os.fdopen(pipe, "wb") as file:  # it may have been killed
                file.write(json.dumps(answer).encode())


def fork_daemon() -> ForkedDaemon | ParentProcess:
    """Fork: this process gets a `ForkedDaemon`, and the other one, which outlives it, its `ParentProcess`.

    A second interpreter would have everything to import again, which takes half as long as the start itself. So call it while
    there is one thread, and nothing is open.
    """
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return ForkedDaemon(pid, read_end)
    os.close(read_end)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return ParentProcess(write_end)


@contextmanager
def wait_for_exit(pid: int) -> Iterator[Callable[[], bool]]:
    """Hold on to a process so that its end can be waited for; yields a function that waits and says whether it ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        raise DaemonUnavailableError(f"process {pid} has ended") from None
    try:
        yield lambda: bool(select.select([process], [], [], STOP_PATIENCE_S)[0])
    finally:
        os.close(process)
