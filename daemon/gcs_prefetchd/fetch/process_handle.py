"""The daemon's side of one fetch process: gives it downloads, and receives their results."""

import asyncio
import itertools
import socket
import time
from dataclasses import dataclass

from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.fetch.message_channel import MessageChannel
from gcs_prefetchd.fetch.process_launcher import LaunchedProcess
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
from gcs_prefetchd.gcs.authorization import TokenSource
from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.gcs.responses import UnusableResponseError, one_line
from gcs_prefetchd.gcs.retry import Outcome, RequestObserver
from gcs_prefetchd.shared import errors
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["FetchProcess", "ProcessDownload", "ProcessLostError"]


class ProcessLostError(Exception):
    """The fetch process has stopped. Only the disk shows what became of the download."""


@dataclass(slots=True, eq=False)
class ProcessDownload:
    """A download of a fetch process, until its `result` is done.

    By then the reservation is committed or released, unless the result is ProcessLostError.
    """

    process: "FetchProcess"
    number: int
    version: ObjectVersion
    reservation: Reservation
    observer: RequestObserver
    started_s: float
    result: asyncio.Future[None]


class FetchProcess:
    """One process. The owner calls `start`, then `connect`, and `close` at last.

    `ready` is done when the process accepts downloads, and cancelled if it stops before. `stopped` is its exit status.
    """

    def __init__(self, options: ProcessOptions, lock: int, token: TokenSource | None, counters: RequestCounters) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.stopped: asyncio.Future[int] = loop.create_future()
        self._options = options
        self._token = token
        self._counters = counters
        self._process = LaunchedProcess(lock, self._exited)
        self._socket: socket.socket
        self._channel = MessageChannel(self._receive, self.kill)
        self._numbers = itertools.count()
        self._downloads: dict[int, ProcessDownload] = {}
        self._token_requests: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int:
        """The process id, once it has started."""
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether the process accepts downloads."""
        return self.ready.done() and not self.ready.cancelled() and not self.stopped.done()

    @property
    def active_downloads(self) -> int:
        """How many downloads the process has not finished."""
        return len(self._downloads)

    @property
    def longest_download_s(self) -> float:
        """The age of the oldest download that the process has not finished; 0 if it has none."""
        oldest = next(iter(self._downloads.values()), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.started_s

    def start(self) -> None:
        """Start the process. Raises OSError if the system cannot."""
        self._socket = self._process.start()

    async def connect(self) -> None:
        """Send the options; the process reports later that it is ready."""
        await self._channel.connect(self._socket)
        self._channel.send(self._options)

    def kill(self) -> None:
        """Kill the process, if it is running."""
        self._process.kill()

    async def close(self) -> None:
        """Stop the process. It must have no download."""
        self.kill()
        await asyncio.wait([self.stopped])

    def start_download(self, version: ObjectVersion, reservation: Reservation, observer: RequestObserver) -> ProcessDownload:
        """Start to download an object into reserved space. The process must be ready.

        The result raises what `GCSClient.download` and `ObjectWriter` raise, or ProcessLostError.
        """
        result: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        download = ProcessDownload(self, number, version, reservation, observer, time.monotonic(), result)
        self._downloads[number] = download
        self._counters.in_flight += 1
        name, path, temporary = version.name, reservation.path, reservation.temp_path
        self._channel.send(
            StartDownload(number, temporary, path, name.bucket, name.name, version.generation, version.size, version.crc32c)
        )
        return download

    def cancel(self, download: ProcessDownload) -> None:
        """Cancel a download. Its object may be published all the same."""
        if not download.result.done():
            self._channel.send(CancelDownload(download.number))

    # --- Messages of the process

    def _receive(self, message: Message) -> None:
        match message:
            case AttemptEnded():
                self._report_attempt(message)
            case DownloadPublished():
                self._complete(message)
            case BytesWritten():
                self._downloads[message.number].reservation.set_written(message.written_bytes)
            case DownloadFailed() | DownloadCancelled():
                self._fail(message)
            case ErrorsCounted():
                self._counters.errors.update(message.counts)
            case TokenRequest():
                self._request_token()
            case TokenRefused():
                assert self._token is not None
                self._token.discard(message.token)
            case ProcessReady():
                self.ready.set_result(None)
            case _:
                raise TypeError(f"{message!r}: not a message of a fetch process")

    def _report_attempt(self, attempt: AttemptEnded) -> None:
        self._counters.requests += attempt.requests
        self._counters.received_bytes += attempt.received_bytes
        observer = self._downloads[attempt.number].observer
        for _ in range(attempt.requests):
            observer.request_sent()
        observer.attempt_ended(Outcome(attempt.duration_s, attempt.received_bytes, attempt.is_throttled, attempt.is_success))

    def _complete(self, message: DownloadPublished) -> None:
        download = self._remove(message.number)
        version = download.version
        try:
            download.reservation.commit(Stamp(version.generation, version.size, message.crc32c))
        except Exception as exc:  # such as no memory for the entry: only this download fails
            download.reservation.release()
            download.result.set_exception(exc)
        else:
            download.result.set_result(None)

    def _fail(self, message: DownloadFailed | DownloadCancelled) -> None:
        download = self._remove(message.number)
        download.reservation.release()
        if isinstance(message, DownloadCancelled):
            download.result.cancel()
        else:
            download.result.set_exception(getattr(errors, message.error, errors.OriginError)(message.text))

    def _remove(self, number: int) -> ProcessDownload:
        download = self._downloads.pop(number)
        self._counters.in_flight -= 1
        return download

    def _request_token(self) -> None:
        task = asyncio.create_task(self._send_token())
        self._token_requests.add(task)
        task.add_done_callback(self._token_requests.discard)

    async def _send_token(self) -> None:
        assert self._token is not None
        try:
            response: Message = TokenGranted(await self._token.get())
        except UnusableResponseError as exc:
            response = TokenUnavailable(str(exc), exc.final is not None)
        except Exception as exc:  # any error at all: the process waits for a response
            response = TokenUnavailable(f"no access token: {one_line(exc)}", is_final=False)
        self._channel.send(response)

    def _exited(self, status: int) -> None:
        for task in self._token_requests:
            task.cancel()
        for number in list(self._downloads):
            self._remove(number).result.set_exception(ProcessLostError())
        self.stopped.set_result(status)
        if not self.ready.done():
            self.ready.cancel()
