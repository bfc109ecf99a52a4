"""A process that downloads for the daemon: `python -m gcs_prefetchd.fetch.process SOCKET LOCK DAEMON_PID`.

It does what needs no knowledge of plans: GET, check, write, stamp, rename, for one object after another of those that it is
told to fetch, many at a time. Small bodies are written by the thread that received them: they go to the disk while the
processor's cache still holds them, and no reader waits for that thread. What is to be fetched, for which room, and what to
do about what fails is the daemon's business.

It ends with the daemon: when its socket is closed, or at once where the daemon was killed. Until then it holds the cache
directory's lock, too, so that no other daemon comes before its last file has.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from gcs_prefetchd.cache.batch_thread import Batches
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.safe_folders import Folders
from gcs_prefetchd.cache.temp_file import FileSink, UnfinishedFile
from gcs_prefetchd.fetch.process_messages import CANCELLED, Wire
from gcs_prefetchd.gcs.counters import Traffic
from gcs_prefetchd.gcs.download import Downloader, Sender
from gcs_prefetchd.gcs.responses import UnfitAnswerError
from gcs_prefetchd.gcs.retry import Outcome
from gcs_prefetchd.shared.checksums import Stamp
from gcs_prefetchd.shared.errors import CredentialsError, PrefetchdError
from gcs_prefetchd.shared.malloc import keep_freed_memory
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__: list[str] = []

LARGE = 1 << 18  # bytes: what takes longer to write than others should wait
TOKEN_FOR_S = 30.0  # then the daemon is asked again, which knows when a token is too old
LOOK_AGAIN_S = 0.01  # at the folders of the cache, which somebody may have moved
_PR_SET_PDEATHSIG = 1

_Message = tuple[str | int, ...]


class _Token:
    """The daemon's access token."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._value: str | None = None
        self._fresh_until_s = 0.0
        self._coming: asyncio.Future[str] | None = None

    async def get(self) -> str:
        """The token; raises UnfitAnswerError where the daemon gets none."""
        loop = asyncio.get_running_loop()
        if self._value is not None and loop.time() < self._fresh_until_s:
            return self._value
        if self._coming is None:
            self._coming = loop.create_future()
            self._send("token?")
        return await asyncio.shield(self._coming)

    def forget(self, refused: str) -> None:
        """GCS refused this token."""
        if self._value == refused:
            self._value = None
            self._send("forget", refused)

    def take(self, value: str | None, reason: str, is_final: bool) -> None:
        """What the daemon says to `token?`."""
        coming, self._coming = self._coming, None
        assert coming is not None
        if value is None:
            coming.set_exception(UnfitAnswerError("token", reason, final=CredentialsError if is_final else None))
            coming.exception()  # who asked may have been cancelled meanwhile
        else:
            self._value, self._fresh_until_s = value, asyncio.get_running_loop().time() + TOKEN_FOR_S
            coming.set_result(value)


class _Account:
    """Tells the daemon of the tries of one download."""

    def __init__(self, number: int, send: Callable[..., None]) -> None:
        self._number = number
        self._send = send
        self._requests = 0

    def sent(self) -> None:
        """A request goes out."""
        self._requests += 1

    def ended(self, outcome: Outcome) -> None:
        """A try has ended."""
        tried = (self._requests, outcome.seconds, outcome.received_bytes, outcome.is_refused, outcome.is_good)
        self._requests = 0
        self._send("tried", self._number, *tried)


class _Turns:
    """One after another, and in between the event loop sees what else has come: answers come many at a time, and writing all
    of them first would hold up the requests that are next."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def next(self) -> None:
        """Wait for a turn."""
        turn = self._loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._serve)
        await turn

    def _serve(self) -> None:
        turn = self._waiting.popleft()
        if not turn.done():
            turn.set_result(None)
        if self._waiting:
            self._loop.call_soon(self._serve)


class _Sink(FileSink):
    """Writes small bodies at once, while the processor's cache holds them, and large ones in the thread `files`, for meanwhile
    answers would pile up in the kernel. Ends in `discard`, always."""

    def __init__(self, file: UnfinishedFile, files: Batches, landed: Callable[[int], None]) -> None:
        super().__init__(file)
        self._files = files
        self._tell = landed
        self._is_large = False

    async def begin(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0."""
        self._is_large = version.size >= LARGE  # that of one generation, and so the same for each attempt
        await super().begin(version)

    async def publish(self, stamp: Stamp) -> None:
        """All has come."""
        await self._finish(stamp)

    async def discard(self) -> None:
        """Leave nothing of what was not published."""
        with contextlib.suppress(OSError):  # it goes with the next that is discarded, or when the next daemon starts
            await self._make(self._file.discard)

    async def _make(self, call: Callable[[], None]) -> None:
        if self._is_large:
            await asyncio.shield(self._files.do(call))
        else:
            call()

    def _landed(self, size_bytes: int) -> None:
        self._tell(size_bytes)


class _FetchProcess:
    """What the process does, from the first message on; `ended` is set when the daemon has closed the socket."""

    def __init__(self, lock: int) -> None:
        self.ended = asyncio.Event()
        self._lock = lock
        self._wire = Wire(lambda kind, *rest: self._hear[kind](*rest), self.ended.set)
        self._directory: CacheDirectory
        self._folders: Folders
        self._looked_s = 0.0
        self._token: _Token
        self._traffic = Traffic()
        self._downloader: Downloader
        self._turns = _Turns()
        self._files = Batches("files")
        self._tasks: dict[int, asyncio.Task[_Message]] = {}
        self._hear: dict[str, Callable[..., None]] = {
            "begin": self._begin,
            "fetch": self._fetch,
            "cancel": self._cancel,
            "token": self._take_token,
        }

    async def listen(self, end: socket.socket) -> None:
        """Work, as long as the daemon is there."""
        await self._wire.connect(end)
        await self.ended.wait()

    def _begin(self, cache_dir: str, root: str, is_anonymous: bool, options: dict[str, Any]) -> None:
        self._directory = CacheDirectory.shared(Path(cache_dir), self._lock)
        self._folders = Folders(self._directory.objects, self._directory.check_ours)
        self._token = _Token(self._wire.send)
        self._downloader = Downloader(root, Sender(None if is_anonymous else self._token, self._traffic), **options)
        self._wire.send("ready")

    def _fetch(
        self, number: int, temporary: str, path: str, bucket: str, name: str, generation: int, size: int, crc32c: int | None
    ) -> None:
        version = ObjectVersion(ObjectName(bucket, name), generation, size, crc32c)
        task = self._tasks[number] = asyncio.create_task(self._bring(number, temporary, path, version))
        task.add_done_callback(partial(self._ended, number))

    def _cancel(self, number: int) -> None:
        if number in self._tasks:  # else its end is on its way
            self._tasks[number].cancel()

    def _take_token(self, value: str | None, reason: str, is_final: bool) -> None:
        self._token.take(value, reason, is_final)

    async def _bring(self, number: int, temporary: str, path: str, version: ObjectVersion) -> _Message:
        send = self._wire.send
        account = _Account(number, send)
        file = UnfinishedFile(self._directory, self._folders, temporary, version.name, path)
        sink = _Sink(file, self._files, lambda size_bytes: send("landed", number, size_bytes))
        outcome: _Message = ("failed", number, CANCELLED, "")
        try:
            came = await self._downloader.download(version.name, version, sink, account)
            assert came.crc32c is not None
            await self._turns.next()
            self._look_again()
            await sink.publish(Stamp(came.generation, came.size, came.crc32c))
        except PrefetchdError as exc:
            outcome = ("failed", number, type(exc).__name__, str(exc))
        except asyncio.CancelledError:
            pass  # it may have been published all the same
        await sink.discard()
        return outcome if file.published is None else ("done", number, file.published.crc32c)

    def _ended(self, number: int, task: asyncio.Task[_Message]) -> None:
        del self._tasks[number]
        if self._traffic.errors:
            self._wire.send("errors", dict(self._traffic.errors))
            self._traffic.errors.clear()
        if task.cancelled():
            self._wire.send("failed", number, CANCELLED, "")
        elif (error := task.exception()) is None:
            self._wire.send(*task.result())
        else:  # no error of GCS or the disk: the daemon had better begin another process
            traceback.print_exception(error)
            os._exit(1)

    def _look_again(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._looked_s >= LOOK_AGAIN_S:
            self._folders.forget()
            self._looked_s = now_s


def _end_with(daemon_pid: int) -> None:
    """Be killed when the daemon is: what it does not know of must not come into its cache."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != daemon_pid:  # it was killed before this
        os._exit(1)


def main() -> None:
    """The process."""
    end, lock, daemon_pid = map(int, sys.argv[1:])
    # The daemon ends us when it has ended its downloads; the terminal and systemd signal all processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with(daemon_pid)
    keep_freed_memory()

    async def work() -> None:
        await _FetchProcess(lock).listen(socket.socket(fileno=end))
        os._exit(0)  # nothing is left to tell anybody

    uvloop.run(work())


if __name__ == "__main__":
    main()
