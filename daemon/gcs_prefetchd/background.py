"""Starting the daemon as a process of its own, and waiting for one to end; without polling."""

import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gcs_prefetchd.errors import DaemonUnavailableError, SettingsError, StartError

__all__ = ["Background", "go_on_in_background", "tell_starter", "wait_for_end"]

STOP_PATIENCE_S = 660.0  # more than the longest stop_deadline_s


@dataclass(frozen=True, slots=True)
class Background:
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


def go_on_in_background() -> Background | int:
    """Fork: this process gets a `Background`, and the other one, which outlives it, the pipe to tell it by.

    A second interpreter would have everything to import again, which takes half as long as the start itself. So call it while
    there is one thread, and nothing is open.
    """
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return Background(pid, read_end)
    os.close(read_end)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return write_end


def tell_starter(pipe: int | None, answer: dict[str, Any]) -> None:
    """Answer whoever started us, once; nothing happens where nobody waits."""
    if pipe is not None:
        with os.fdopen(pipe, "wb") as file:
            file.write(json.dumps(answer).encode())


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
