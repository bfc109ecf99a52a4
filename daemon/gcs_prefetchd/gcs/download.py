"""Downloads: each object's stored bytes, of one generation and checked, into a sink, or an error that names the object.

Made directly over `connections`: gcloud-aio-storage's own `download` pins no generation and checks nothing (it returns a
truncated body, a flipped byte or a login page without an error), and takes twice the CPU.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol
from urllib.parse import quote, urlencode, urlsplit

from gcs_prefetchd.gcs.backoff import parse_retry_after
from gcs_prefetchd.gcs.connection_pool import ConnectionPool
from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.gcs.http_connection import Response
from gcs_prefetchd.gcs.partial_download import PartialDownload
from gcs_prefetchd.gcs.responses import UnusableResponseError, error_for_status, version_from_headers, version_from_metadata
from gcs_prefetchd.gcs.retry import MAX_ATTEMPT_SHARE, Attempt, RequestObserver, Retrier
from gcs_prefetchd.shared.errors import ObjectChangedError
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = ["LARGEST_ERROR_BODY", "READ_TIMEOUT_S", "Authorizer", "Downloader", "Sink", "TokenSource"]

READ_TIMEOUT_S = 20.0
LARGEST_ERROR_BODY = 16_384
LARGEST_METADATA = 1 << 20  # GCS allows 8 KB of a user's own
LARGEST_WHOLE = 1 << 20  # larger bodies are passed on piece by piece


class Sink(Protocol):
    """Where a download goes."""

    async def start(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0: forget what was written before."""

    async def write(self, chunk: bytes) -> None:
        """The next bytes."""


class TokenSource(Protocol):
    """Where access tokens come from."""

    async def get(self) -> str:
        """The token; raises UnusableResponseError where there is none."""

    def forget(self, refused: str) -> None:
        """GCS refused this token."""


class Authorizer:
    """What every request to GCS has in common: its authorization, its place in the counts, and what a refusal means.

    Without a `token` requests are anonymous.
    """

    def __init__(self, token: TokenSource | None, counters: RequestCounters) -> None:
        self.counters = counters
        self._token = token

    @property
    def is_anonymous(self) -> bool:
        """Whether nothing is sent with them."""
        return self._token is None

    async def headers(self, current: Attempt) -> dict[str, str]:
        """What authorizes a request that goes out now, and is counted."""
        headers = {}
        if self._token is not None:
            current.awaits_token = True
            headers["Authorization"] = f"Bearer {await self._token.get()}"
            current.awaits_token = False
        self.counters.requests += 1
        if current.observer is not None:
            current.observer.request_sent()
        return headers

    def refusal(
        self, status: int, headers: Mapping[str, str], body: bytes, sent: Mapping[str, str], *, pinned: bool
    ) -> UnusableResponseError:
        """The error that an answer of this status is, to a request with the headers `sent`."""
        if self._token is not None:
            token = sent["Authorization"].removeprefix("Bearer ")
            body = body.replace(token.encode(), b"(token)")  # proxies repeat what they were sent, and the log shows it
            if status == 401:
                self._token.forget(token)
        return error_for_status(status, headers, body, pinned=pinned)


class Downloader:
    """Downloads from the server of `root`, over `connections` at most. The owner closes it.

    `deadline_s` bounds one object, all its tries included, `read_timeout_s` how long a try may wait for the next byte. What it
    sends, receives and fails at is counted in the authorizer's `counters`.
    """

    def __init__(
        self,
        root: str,
        authorizer: Authorizer,
        *,
        user_project: str | None = None,
        connections: int = 128,
        deadline_s: float = 60.0,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self._authorizer = authorizer
        self._counters = authorizer.counters
        self._path = urlsplit(root).path.rstrip("/")
        self._payer = f"?{urlencode({'userProject': user_project})}" if user_project else ""
        self._connections = ConnectionPool(root, connections, min(read_timeout_s, deadline_s * MAX_ATTEMPT_SHARE))
        self._retries = Retrier(deadline_s, authorizer.counters, renews_token=not authorizer.is_anonymous)

    async def close(self) -> None:
        """Close the connections."""
        await self._connections.close()

    async def download(
        self, name: ObjectName, version: ObjectVersion | None, sink: Sink, observer: RequestObserver | None = None
    ) -> ObjectVersion:
        """Bring the object's stored bytes into the sink and return what they were checked to be.

        With a `version` it is that generation, size and crc32c or an error (ObjectChangedError where the bucket no longer has
        it); without one it is the live generation, whose size and hash the answer must name.
        """
        self._counters.in_flight += 1
        try:
            attempt = partial(self._attempt, name, version, sink, PartialDownload())
            return await self._retries.make(f"fetch {name.uri}", attempt, observer)
        finally:
            self._counters.in_flight -= 1

    async def _attempt(
        self, name: ObjectName, version: ObjectVersion | None, sink: Sink, received: PartialDownload, current: Attempt
    ) -> ObjectVersion:
        if (started := received.started()) is not None:
            return await self._attempt_rest(started, sink, received, current)
        target = self._bytes_of(name, version.generation if version else None)
        headers = await self._authorizer.headers(current)
        async with self._connections.get(target, headers) as answer:
            await self._check_status(answer, headers, pinned=version is not None)
            expected = _expected(version, version_from_headers(name, answer.headers))
            if expected is not None:
                await sink.start(expected)
                received.start(expected)
                return await self._receive(answer, expected, sink, received, current)
        # Left before the metadata is asked for: with every connection held by a download that asks, all would wait.
        return await self._attempt_described(name, sink, received, current)

    async def _attempt_rest(
        self, started: ObjectVersion, sink: Sink, received: PartialDownload, current: Attempt
    ) -> ObjectVersion:
        """Bring what is missing of a download that broke off.

        Any other answer than that has the next try begin at byte 0, which finds out what it means; unless it may pass.
        """
        target = self._bytes_of(started.name, started.generation)
        headers = await self._authorizer.headers(current)
        asked = headers | {"Range": f"bytes={received.bytes}-"}
        async with self._connections.get(target, asked) as answer:
            if answer.status == 206 and received.is_followed_by(answer.headers):
                return await self._receive(answer, started, sink, received, current)
            if answer.status == 401:  # the token ran out meanwhile: with another one it goes on
                await self._check_status(answer, headers, pinned=True)
            text = f"GCS returned {answer.status} to a request for the bytes from {received.bytes} on"
            if answer.status < 500 and answer.status not in (408, 429):
                received.start(None)
            wait_s = parse_retry_after(answer.headers.get("Retry-After"))
            raise UnusableResponseError(str(answer.status), text, retry_after_s=wait_s)

    async def _attempt_described(
        self, name: ObjectName, sink: Sink, received: PartialDownload, current: Attempt
    ) -> ObjectVersion:
        """Bring the generation that the metadata names, for an answer that named no hash or no generation."""
        described = await self._describe(name, current)
        try:
            return await self._attempt(name, described, sink, received, current)
        except UnusableResponseError as exc:
            if exc.final is ObjectChangedError:
                raise UnusableResponseError("generation", "replaced while it was being read") from None
            raise

    async def _receive(
        self, answer: Response, expected: ObjectVersion, sink: Sink, received: PartialDownload, current: Attempt
    ) -> ObjectVersion:
        current.size_bytes, current.before_bytes = expected.size, received.bytes
        left_bytes = expected.size - received.bytes
        is_small = left_bytes <= LARGEST_WHOLE and answer.headers.get("Content-Length") == str(left_bytes)
        try:
            while pieces := await answer.pieces(together=is_small):
                for piece in pieces:
                    received.add(piece)
                    await sink.write(piece)
                current.received_bytes = answer.received_bytes
                current.check_pace()
        finally:
            current.received_bytes = answer.received_bytes
            self._counters.received_bytes += answer.received_bytes
        return received.whole()

    async def _describe(self, name: ObjectName, current: Attempt) -> ObjectVersion:
        headers = await self._authorizer.headers(current)
        async with self._connections.get(self._about(name), headers) as answer:
            await self._check_status(answer, headers, pinned=False)
            return version_from_metadata(name, await answer.first(LARGEST_METADATA))

    async def _check_status(self, answer: Response, sent: Mapping[str, str], *, pinned: bool) -> None:
        if answer.status != 200:
            body = await answer.first(LARGEST_ERROR_BODY)  # the rest of a large error is not worth its bytes
            raise self._authorizer.refusal(answer.status, answer.headers, body, sent, pinned=pinned)

    def _bytes_of(self, name: ObjectName, generation: int | None) -> str:
        """Where the bytes of an object are, of this generation or of the live one."""
        pinned = "" if generation is None else f"&generation={generation}"
        return f"{self._about(name)}{'&' if self._payer else '?'}alt=media{pinned}"

    def _about(self, name: ObjectName) -> str:
        """Where its metadata are."""
        return f"{self._path}/storage/v1/b/{name.bucket}/o/{quote(name.name, safe='')}{self._payer}"


def _expected(wanted: ObjectVersion | None, named: ObjectVersion | None) -> ObjectVersion | None:
    """What the body must turn out to be: what was asked for, completed by what the answer says it is."""
    if wanted is None or named is None:
        return wanted or named
    if named.generation != wanted.generation:
        raise UnusableResponseError("generation", f"received generation {named.generation}, expected {wanted.generation}")
    return wanted if wanted.crc32c is not None else replace(wanted, crc32c=named.crc32c)
