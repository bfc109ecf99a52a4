"""Starts a fetch process, notices its exit, and kills it."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

__all__ = ["LaunchedProcess"]

PROGRAM = [sys.executable, "-P", "-m", "gcs_prefetchd.fetch.process_main"]  # -P: import nothing from the working directory


class LaunchedProcess:
    """One process, which inherits the cache directory's `lock`. `on_exit` is called once, with its exit status."""

    def __init__(self, lock: int, on_exit: Callable[[int], None]) -> None:
        self._lock = lock
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id, once it has started."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> socket.socket:
        """Start the process. Returns the daemon's end of a pair of sockets. Raises OSError if the system cannot."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # Not by asyncio, which may use any thread: the process is to be killed when the thread that started it ends.
                self._process = subprocess.Popen(  # noqa: S603  # our own program
                    [*PROGRAM, str(theirs.fileno()), str(self._lock), str(os.getpid())],
                    pass_fds=(theirs.fileno(), self._lock),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,  # a terminal's Ctrl-C is for the daemon
                )
                self._watch_exit(self._process)
            except BaseException:
                ours.close()
                raise
        return ours

    def kill(self) -> None:
        """Kill the process, if it is running."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _watch_exit(self, process: "subprocess.Popen[bytes]") -> None:
        try:
            pidfd = os.pidfd_open(process.pid)
            try:
                asyncio.get_running_loop().add_reader(pidfd, self._reap, process, pidfd)
            except BaseException:
                os.close(pidfd)
                raise
        except BaseException:
            process.kill()
            process.wait()
            self._process = None
            raise

    def _reap(self, process: "subprocess.Popen[bytes]", pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        self._on_exit(process.wait())
