"""The daemon's fetch processes: begun when there is something to prefetch, given work, begun again when one is lost."""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.reservation import Place
from gcs_prefetchd.fetch.process_messages import CANCELLED, Wire
from gcs_prefetchd.gcs.counters import Traffic
from gcs_prefetchd.gcs.download import TokenSource
from gcs_prefetchd.gcs.responses import UnfitAnswerError, brief
from gcs_prefetchd.gcs.retry import Account, Outcome
from gcs_prefetchd.shared import errors
from gcs_prefetchd.shared.checksums import Stamp
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["FetchProcess", "FetchProcesses", "ProcessLostError", "Work"]

log = logging.getLogger(__name__)

PROGRAM = [sys.executable, "-P", "-m", "gcs_prefetchd.fetch.process"]  # -P: nothing is imported from the working directory
READY_S = 60.0  # a machine that is out of memory may take long to import anything
GRACE_S = 5.0  # past the deadline of an object; then its process hangs
LOOK_EVERY_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a process that was lost is begun again


class ProcessLostError(Exception):
    """The fetch process has ended: what became of the download is to be seen on the disk."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every fetch process is told at first: where files go, where objects come from, and with what."""

    directory: CacheDirectory
    root: str
    options: dict[str, Any]
    traffic: Traffic
    token: Callable[[], TokenSource | None]


@dataclass(slots=True)
class _Job:
    """A download that a process was told to make."""

    version: ObjectVersion
    place: Place
    account: Account
    begun_s: float
    ended: asyncio.Future[Stamp]


class FetchProcess:
    """One process. The owner calls `begin`, then `connect`, and `close` at last; `lost` is done when it has ended."""

    def __init__(self, work: Work) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[int] = loop.create_future()
        self._work = work
        self._token = work.token()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket
        self._wire = Wire(lambda kind, *rest: self._hear[kind](*rest), self.kill)
        self._numbers = itertools.count()
        self._jobs: dict[int, _Job] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._hear: dict[str, Callable[..., None]] = {
            "ready": lambda: self.ready.set_result(None),
            "tried": self._tried,
            "landed": self._landed,
            "errors": work.traffic.errors.update,
            "done": self._done,
            "failed": self._failed,
            "token?": self._ask_for_token,
            "forget": self._forget_token,
        }

    @property
    def pid(self) -> int:
        """Its process id, once it has begun."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether it can be told to fetch."""
        return self.ready.done() and not self.ready.cancelled() and not self.lost.done()

    @property
    def load(self) -> int:
        """How many downloads it has under way."""
        return len(self._jobs)

    @property
    def oldest_s(self) -> float:
        """For how long it has been at the download that it began first."""
        first = next(iter(self._jobs.values()), None)
        return 0.0 if first is None else time.monotonic() - first.begun_s

    def begin(self) -> None:
        """Begin the process. Raises OSError where there is none to be had."""
        self._socket, theirs = socket.socketpair()
        lock = self._work.directory.lock
        with theirs:
            try:
                # Not asyncio's own way, which begins it in any thread: it is to end with this one, which is the daemon's.
                self._process = subprocess.Popen(  # noqa: S603  # our own program
                    [*PROGRAM, str(theirs.fileno()), str(lock), str(os.getpid())],
                    pass_fds=(theirs.fileno(), lock),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,  # a terminal's Ctrl-C is for the daemon
                )
                self._watch_its_end()
            except BaseException:
                self._socket.close()
                raise

    def _watch_its_end(self) -> None:
        try:
            ended = os.pidfd_open(self.pid)
            try:
                asyncio.get_running_loop().add_reader(ended, self._reap, ended)
            except BaseException:
                os.close(ended)
                raise
        except BaseException:
            assert self._process is not None
            self._process.kill()
            self._process.wait()
            self._process = None
            raise

    async def connect(self) -> None:
        """Tell it what every download needs; it is `ready` some time after it."""
        await self._wire.connect(self._socket)
        work = self._work
        self._wire.send("begin", str(work.directory.path), work.root, self._token is None, work.options)

    def kill(self) -> None:
        """End it at once, if it has begun."""
        if self._process is not None and not self.lost.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def close(self) -> None:
        """End it; no download may be under way."""
        self.kill()
        await asyncio.wait([self.lost])

    def fetch(self, version: ObjectVersion, place: Place, account: Account) -> tuple[int, asyncio.Future[Stamp]]:
        """Have an object brought to its place; returns the number of the download and its end.

        That is the stamp of the file that lies there by then, or the error that `Downloader.download` or a disk raises, or
        ProcessLostError.
        """
        number = next(self._numbers)
        if self.lost.done():  # since it was chosen: nobody would tell of this download any more
            ended: asyncio.Future[Stamp] = asyncio.get_running_loop().create_future()
            ended.set_exception(ProcessLostError())
            return number, ended
        job = _Job(version, place, account, time.monotonic(), asyncio.get_running_loop().create_future())
        self._jobs[number] = job
        self._work.traffic.in_flight += 1
        name = version.name
        self._wire.send(
            *("fetch", number, place.temporary, place.path),
            *(name.bucket, name.name, version.generation, version.size, version.crc32c),
        )
        return number, job.ended

    def cancel(self, number: int) -> asyncio.Future[Stamp]:
        """Have a download ended whose end was cancelled; returns its end, which may be a good one all the same."""
        job = self._jobs.get(number)
        ended: asyncio.Future[Stamp] = asyncio.get_running_loop().create_future()
        if job is None:  # its end had come
            ended.set_exception(ProcessLostError())
        else:
            job.ended = ended
            self._wire.send("cancel", number)
        return ended

    # --- what the process says

    def _tried(self, number: int, requests: int, seconds: float, received_bytes: int, is_refused: bool, is_good: bool) -> None:
        self._work.traffic.requests += requests
        self._work.traffic.received_bytes += received_bytes
        account = self._jobs[number].account
        for _ in range(requests):
            account.sent()
        account.ended(Outcome(seconds, received_bytes, is_refused, is_good))

    def _landed(self, number: int, size_bytes: int) -> None:
        self._jobs[number].place.land(size_bytes)

    def _done(self, number: int, crc32c: int) -> None:
        job = self._end(number)
        if not job.ended.done():
            job.ended.set_result(Stamp(job.version.generation, job.version.size, crc32c))

    def _failed(self, number: int, kind: str, text: str) -> None:
        job = self._end(number)
        if job.ended.done():
            return
        if kind == CANCELLED:
            job.ended.cancel()
        else:
            job.ended.set_exception(getattr(errors, kind, errors.OriginError)(text))

    def _end(self, number: int) -> _Job:
        job = self._jobs.pop(number)
        self._work.traffic.in_flight -= 1
        return job

    def _ask_for_token(self) -> None:
        task = asyncio.create_task(self._tell_token())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _tell_token(self) -> None:
        assert self._token is not None
        try:
            self._wire.send("token", await self._token.get(), "", False)
        except UnfitAnswerError as exc:
            self._wire.send("token", None, str(exc), exc.final is not None)
        except Exception as exc:  # whatever it is, the process waits for an answer
            self._wire.send("token", None, f"no access token: {brief(exc)}", False)

    def _forget_token(self, refused: str) -> None:
        assert self._token is not None
        self._token.forget(refused)

    def _reap(self, ended: int) -> None:
        asyncio.get_running_loop().remove_reader(ended)
        os.close(ended)
        assert self._process is not None
        status = self._process.wait()
        for task in self._asking:
            task.cancel()
        for number in list(self._jobs):
            job = self._end(number)
            if not job.ended.done():
                job.ended.set_exception(ProcessLostError())
        self.lost.set_result(status)
        if not self.ready.done():
            self.ready.cancel()


class FetchProcesses:
    """So many of them, begun when the first is asked for. `run` keeps them; `close` ends them when no download is under way."""

    def __init__(self, count: int, work: Work) -> None:
        self._count = count
        self._work = work
        self._wanted = asyncio.Event()
        self._processes: set[FetchProcess] = set()

    @property
    def pids(self) -> list[int]:
        """Of those that are at work."""
        return [process.pid for process in self._processes if process.is_ready]

    def least_busy(self) -> FetchProcess | None:
        """The one that has least to do, or None where none is ready."""
        self._wanted.set()
        ready = (process for process in self._processes if process.is_ready)
        return min(ready, key=lambda process: process.load, default=None)

    async def run(self) -> None:
        """Keep so many processes at work, until cancelled."""
        async with asyncio.TaskGroup() as keepers:
            for _ in range(self._count):
                keepers.create_task(self._keep_one())

    async def close(self) -> None:
        """End all of them."""
        await asyncio.gather(*(process.close() for process in self._processes))
        self._processes.clear()

    async def _keep_one(self) -> None:
        pause_s = FIRST_PAUSE_S
        await self._wanted.wait()
        while True:
            process, began_s = FetchProcess(self._work), time.monotonic()
            try:
                process.begin()
                self._processes.add(process)
                await process.connect()
                why = await self._watch(process)
                self._processes.discard(process)
            except (OSError, MemoryError) as exc:
                why = f"there is none to be had ({brief(exc)})"
                process.kill()
                self._processes.discard(process)
            if time.monotonic() - began_s > LONGEST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            log.warning("a fetch process: %s; others go on, or the daemon itself, and another begins in %g s", why, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _watch(self, process: FetchProcess) -> str:
        """Returns why it ended, when it has; one that hangs is killed."""
        why = ""
        await asyncio.wait([process.ready], timeout=READY_S)  # it is cancelled where the process is lost
        if not process.ready.done():
            why = f"not ready after {READY_S:g} s"
            process.kill()
        while not process.lost.done():
            await asyncio.wait([process.lost], timeout=LOOK_EVERY_S)
            if process.oldest_s > self._work.options["deadline_s"] + GRACE_S:
                why = f"it hangs (pid {process.pid})"
                process.kill()
        return why or f"it ended with status {process.lost.result()} (pid {process.pid})"
