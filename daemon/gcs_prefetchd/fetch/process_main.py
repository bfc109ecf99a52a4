"""A fetch process, which downloads for the daemon: `python -m gcs_prefetchd.fetch.process_main SOCKET LOCK DAEMON_PID`.

It does what needs no knowledge of plans, for many objects at a time: it sends a GET, checks the bytes, writes them, stamps
the file and renames it. The thread that received a small body also writes it: the bytes go to the disk while the processor's
cache still holds them, and no reader waits for that thread. The daemon decides what to fetch, reserves the space for it and
handles what fails.

The process stops with the daemon: when its socket is closed, or at once if the daemon is killed. Until then it also holds the
cache directory's lock, so that no other daemon starts before the last file was published.
"""

import asyncio
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

import uvloop

from gcs_prefetchd.cache.batch_thread import BatchThread
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.cache.object_writer import ObjectWriter
from gcs_prefetchd.cache.safe_folders import SafeFolders
from gcs_prefetchd.cache.temp_file import TempFile
from gcs_prefetchd.fetch.message_channel import MessageChannel
from gcs_prefetchd.fetch.process_messages import (
    AttemptEnded,
    BytesWritten,
    CancelDownload,
    DownloadCancelled,
    DownloadFailed,
    DownloadPublished,
    ErrorsCounted,
    Message,
    ProcessOptions,
    ProcessReady,
    StartDownload,
    TokenGranted,
    TokenRefused,
    TokenRequest,
    TokenUnavailable,
)
from gcs_prefetchd.gcs.authorization import Authorizer
from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.gcs.download import Downloader
from gcs_prefetchd.gcs.responses import UnusableResponseError
from gcs_prefetchd.gcs.retry import Outcome
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.errors import CredentialsError, PrefetchdError
from gcs_prefetchd.shared.malloc import keep_freed_memory
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__: list[str] = []

INLINE_BELOW_BYTES = 1 << 18  # writing more takes longer than other objects should wait: responses pile up in the kernel
TOKEN_LIFETIME_S = 30.0  # the daemon knows when a token is too old; after this long the process requests it again
FOLDER_CHECK_LIFETIME_S = 0.01  # then the folders of the cache are checked again: another program may have moved them
_PR_SET_PDEATHSIG = 1

Send = Callable[[Message], None]


class _DaemonToken:
    """The daemon's access token."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._token: str | None = None
        self._fresh_until_s = 0.0
        self._requested: asyncio.Future[str] | None = None

    async def get(self) -> str:
        """Return the token. Raises UnusableResponseError if the daemon has none."""
        loop = asyncio.get_running_loop()
        if self._token is not None and loop.time() < self._fresh_until_s:
            return self._token
        if self._requested is None:
            self._requested = loop.create_future()
            self._send(TokenRequest())
        return await asyncio.shield(self._requested)

    def discard(self, refused: str) -> None:
        """Discard this token: GCS refused it."""
        if self._token == refused:
            self._token = None
            self._send(TokenRefused(refused))

    def receive(self, response: TokenGranted | TokenUnavailable) -> None:
        """Pass the daemon's response on to the downloads that wait for it."""
        requested, self._requested = self._requested, None
        assert requested is not None
        if isinstance(response, TokenGranted):
            self._token, self._fresh_until_s = response.token, asyncio.get_running_loop().time() + TOKEN_LIFETIME_S
            requested.set_result(response.token)
        else:
            final = CredentialsError if response.is_final else None
            requested.set_exception(UnusableResponseError("token", response.reason, final=final))
            requested.exception()  # the download that requested it may have been cancelled


class _AttemptReporter:
    """Reports the attempts of one download to the daemon."""

    def __init__(self, number: int, send: Send) -> None:
        self._number = number
        self._send = send
        self._requests = 0

    def request_sent(self) -> None:
        """Count a request."""
        self._requests += 1

    def attempt_ended(self, outcome: Outcome) -> None:
        """Report that an attempt has ended."""
        requests, self._requests = self._requests, 0
        self._send(
            AttemptEnded(
                self._number, requests, outcome.duration_s, outcome.received_bytes, outcome.is_throttled, outcome.is_success
            )
        )


class _Turns:
    """Lets one download at a time publish its file, with a turn of the event loop between two.

    Responses arrive many at a time. Writing all of them first would delay the requests that are next.
    """

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


class _DaemonSpace:
    """The `Space` of one object, which the daemon accounts for: it has reserved the bytes and claimed the path before it sends
    `StartDownload`, and it commits or releases them when it receives the message that reports the download's end."""

    def __init__(self, number: int, send: Send) -> None:
        self._number = number
        self._send = send

    async def reserve(self, size_bytes: int) -> None: ...

    def set_written(self, size_bytes: int) -> None:
        self._send(BytesWritten(self._number, size_bytes))

    def commit(self, stamp: Stamp) -> None: ...

    def release(self) -> None: ...


class _FetchProcess:
    """Handles the daemon's messages. `disconnected` is set when the daemon has closed the socket."""

    def __init__(self, lock: int) -> None:
        self.disconnected = asyncio.Event()
        self._lock = lock
        self._channel = MessageChannel(self._receive, self.disconnected.set)
        self._directory: CacheDirectory
        self._folders: SafeFolders
        self._folders_checked_s = 0.0
        self._token: _DaemonToken
        self._counters = RequestCounters()
        self._downloader: Downloader
        self._turns = _Turns()
        self._file_thread = BatchThread("files")
        self._tasks: dict[int, asyncio.Task[Message]] = {}

    async def serve(self, end: socket.socket) -> None:
        """Work for as long as the daemon is connected."""
        await self._channel.connect(end)
        await self.disconnected.wait()

    def _receive(self, message: Message) -> None:
        match message:
            case StartDownload():
                self._start_download(message)
            case CancelDownload():
                self._cancel_download(message.number)
            case TokenGranted() | TokenUnavailable():
                self._token.receive(message)
            case ProcessOptions():
                self._configure(message)
            case _:
                raise TypeError(f"{message!r}: not a message for a fetch process")

    def _configure(self, options: ProcessOptions) -> None:
        self._directory = CacheDirectory.with_inherited_lock(Path(options.cache_dir), self._lock)
        self._folders = SafeFolders(self._directory.objects, self._directory.check_ours)
        self._token = _DaemonToken(self._channel.send)
        self._downloader = Downloader(
            options.endpoint,
            Authorizer(None if options.is_anonymous else self._token, self._counters),
            user_project=options.user_project,
            connections=options.connections,
            deadline_s=options.deadline_s,
        )
        self._channel.send(ProcessReady())

    def _start_download(self, message: StartDownload) -> None:
        task = self._tasks[message.number] = asyncio.create_task(self._download(message))
        task.add_done_callback(partial(self._report_end, message.number))

    def _cancel_download(self, number: int) -> None:
        if number in self._tasks:  # otherwise the message that reports its end is on its way
            self._tasks[number].cancel()

    async def _download(self, message: StartDownload) -> Message:
        """Download and publish one object; returns the message that reports how that ended."""
        number, send = message.number, self._channel.send
        name = ObjectName(message.bucket, message.name)
        version = ObjectVersion(name, message.generation, message.size, message.crc32c)
        file = TempFile(self._directory, self._folders, message.temporary_path, name, message.path)
        space = _DaemonSpace(number, send)
        writer = ObjectWriter(file, space, self._file_thread, inline_below_bytes=INLINE_BELOW_BYTES)
        failure: Message = DownloadCancelled(number)
        try:
            async with writer:
                received = await self._downloader.download(name, version, writer, _AttemptReporter(number, send))
                await self._turns.next()
                self._check_folders_again()
                await writer.publish(received)
        except PrefetchdError as exc:
            failure = DownloadFailed(number, type(exc).__name__, str(exc))
        except asyncio.CancelledError:
            pass  # it may have been published all the same
        return failure if writer.published is None else DownloadPublished(number, writer.published.crc32c)

    def _report_end(self, number: int, task: asyncio.Task[Message]) -> None:
        del self._tasks[number]
        if self._counters.errors:
            self._channel.send(ErrorsCounted(dict(self._counters.errors)))
            self._counters.errors.clear()
        if task.cancelled():
            self._channel.send(DownloadCancelled(number))
        elif (error := task.exception()) is None:
            self._channel.send(task.result())
        else:  # neither GCS nor the disk failed, but this program: the daemon should start another process
            traceback.print_exception(error)
            os._exit(1)

    def _check_folders_again(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._folders_checked_s >= FOLDER_CHECK_LIFETIME_S:
            self._folders.forget()
            self._folders_checked_s = now_s


def _stop_with(daemon_pid: int) -> None:
    """Have the kernel kill this process when the daemon is killed: no file may enter the cache of the next daemon unseen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != daemon_pid:  # the daemon was killed before the call
        os._exit(1)


def main() -> None:
    """Run the process."""
    end, lock, daemon_pid = map(int, sys.argv[1:])
    # A terminal and systemd signal all processes. This one is stopped by the daemon, after its downloads.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _stop_with(daemon_pid)
    keep_freed_memory()

    async def serve() -> None:
        await _FetchProcess(lock).serve(socket.socket(fileno=end))
        os._exit(0)  # at once: no process waits for a report any more

    uvloop.run(serve())


if __name__ == "__main__":
    main()
