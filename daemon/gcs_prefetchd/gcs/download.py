"""Downloads: each object's stored bytes, of one generation and checked, into a sink, or an error that names the object.

Made directly over `connection_pool`: gcloud-aio-storage's own `download` pins no generation and checks nothing (it returns a
truncated body, a flipped byte or a login page without an error), and takes twice the CPU.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol
from urllib.parse import quote, urlencode, urlsplit

from gcs_prefetchd.gcs.authorization import Authorizer
from gcs_prefetchd.gcs.connection_pool import ConnectionPool
from gcs_prefetchd.gcs.http_connection import Response
from gcs_prefetchd.gcs.partial_download import PartialDownload
from gcs_prefetchd.gcs.responses import (
    MAX_ERROR_BODY_BYTES,
    UnusableResponseError,
    parse_retry_after,
    version_from_headers,
    version_from_metadata,
)
from gcs_prefetchd.gcs.retry import MAX_ATTEMPT_SHARE, Attempt, RequestObserver, Retrier
from gcs_prefetchd.shared.errors import ObjectChangedError
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = ["READ_TIMEOUT_S", "Downloader", "Sink"]

READ_TIMEOUT_S = 20.0
MAX_METADATA_BYTES = 1 << 20  # GCS allows 8 KB of custom metadata
MAX_SMALL_BODY_BYTES = 1 << 20  # larger bodies are written to the sink chunk by chunk


class Sink(Protocol):
    """The destination of a download."""

    async def start(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0: discard anything written before."""

    async def write(self, chunk: bytes) -> None:
        """Write the next bytes."""


class Downloader:
    """Downloads from the server of `endpoint`, over at most `connections`. The owner closes it.

    `deadline_s` bounds one object with all its attempts, `read_timeout_s` the wait of an attempt for its next byte. Requests,
    received bytes and failures are counted in the authorizer's `counters`.
    """

    def __init__(
        self,
        endpoint: str,
        authorizer: Authorizer,
        *,
        user_project: str | None = None,
        connections: int = 128,
        deadline_s: float = 60.0,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self._authorizer = authorizer
        self._counters = authorizer.counters
        self._path = urlsplit(endpoint).path.rstrip("/")
        self._payer = f"?{urlencode({'userProject': user_project})}" if user_project else ""
        self._connections = ConnectionPool(endpoint, connections, min(read_timeout_s, deadline_s * MAX_ATTEMPT_SHARE))
        self._retrier = Retrier(deadline_s, authorizer.counters, renews_token=not authorizer.is_anonymous)

    async def close(self) -> None:
        """Close the connections."""
        await self._connections.close()

    async def download(
        self, name: ObjectName, version: ObjectVersion | None, sink: Sink, observer: RequestObserver | None = None
    ) -> ObjectVersion:
        """Write the object's stored bytes to the sink and return their checked version.

        A given `version` pins generation, size and crc32c: they match, or an error is raised (ObjectChangedError if the bucket
        no longer has that generation). Without one it is the live generation, whose size and hash the response must name.
        """
        self._counters.in_flight += 1
        try:
            attempt = partial(self._attempt, name, version, sink, PartialDownload())
            return await self._retrier.run(f"fetch {name.uri}", attempt, observer)
        finally:
            self._counters.in_flight -= 1

    async def _attempt(
        self, name: ObjectName, version: ObjectVersion | None, sink: Sink, received: PartialDownload, current: Attempt
    ) -> ObjectVersion:
        if (resumable := received.resumable_version()) is not None:
            return await self._resume(resumable, sink, received, current)
        target = self._media_target(name, version.generation if version else None)
        headers = await self._authorizer.authorize(current)
        async with self._connections.get(target, headers) as response:
            await self._check_status(response, headers, pinned=version is not None)
            expected = _expected_version(version, version_from_headers(name, response.headers))
            if expected is not None:
                await sink.start(expected)
                received.start(expected)
                return await self._receive(response, expected, sink, received, current)
        # The connection is released before the metadata is requested: if downloads that wait for metadata held every
        # connection, none could proceed.
        return await self._download_by_metadata(name, sink, received, current)

    async def _resume(self, version: ObjectVersion, sink: Sink, received: PartialDownload, current: Attempt) -> ObjectVersion:
        target = self._media_target(version.name, version.generation)
        headers = await self._authorizer.authorize(current)
        ranged = headers | {"Range": received.range_header}
        async with self._connections.get(target, ranged) as response:
            if response.status == 206 and received.is_continued_by(response.headers):
                return await self._receive(response, version, sink, received, current)
            if response.status == 401:  # the token expired meanwhile: the next attempt resumes with a new one
                await self._check_status(response, headers, pinned=True)
            text = f"GCS returned {response.status} to a request for the bytes from {received.received_bytes} on"
            if response.status < 500 and response.status not in (408, 429):
                received.start(None)
            wait_s = parse_retry_after(response.headers.get("Retry-After"))
            raise UnusableResponseError(str(response.status), text, retry_after_s=wait_s)

    async def _download_by_metadata(
        self, name: ObjectName, sink: Sink, received: PartialDownload, current: Attempt
    ) -> ObjectVersion:
        """Download the generation named by the metadata, after a response without hash or generation."""
        described = await self._request_metadata(name, current)
        try:
            return await self._attempt(name, described, sink, received, current)
        except UnusableResponseError as exc:
            if exc.final is ObjectChangedError:
                raise UnusableResponseError("generation", "replaced while it was being read") from None
            raise

    async def _receive(
        self, response: Response, expected: ObjectVersion, sink: Sink, received: PartialDownload, current: Attempt
    ) -> ObjectVersion:
        current.size_bytes, current.earlier_bytes = expected.size, received.received_bytes
        left_bytes = expected.size - received.received_bytes
        is_small = left_bytes <= MAX_SMALL_BODY_BYTES and response.headers.get("Content-Length") == str(left_bytes)
        try:
            while chunks := await response.read_chunks(until_complete=is_small):
                for chunk in chunks:
                    received.add(chunk)
                    await sink.write(chunk)
                current.received_bytes = response.received_bytes
                current.check_duration()
        finally:
            current.received_bytes = response.received_bytes
            self._counters.received_bytes += response.received_bytes
        return received.finish()

    async def _request_metadata(self, name: ObjectName, current: Attempt) -> ObjectVersion:
        headers = await self._authorizer.authorize(current)
        async with self._connections.get(self._metadata_target(name), headers) as response:
            await self._check_status(response, headers, pinned=False)
            return version_from_metadata(name, await response.read_first(MAX_METADATA_BYTES))

    async def _check_status(self, response: Response, sent: Mapping[str, str], *, pinned: bool) -> None:
        if response.status != 200:
            body = await response.read_first(MAX_ERROR_BODY_BYTES)
            raise self._authorizer.error_for(response.status, response.headers, body, sent, pinned=pinned)

    def _media_target(self, name: ObjectName, generation: int | None) -> str:
        """The target of a request for an object's bytes, of this generation or of the live one."""
        pinned = "" if generation is None else f"&generation={generation}"
        return f"{self._metadata_target(name)}{'&' if self._payer else '?'}alt=media{pinned}"

    def _metadata_target(self, name: ObjectName) -> str:
        return f"{self._path}/storage/v1/b/{name.bucket}/o/{quote(name.name, safe='')}{self._payer}"


def _expected_version(requested: ObjectVersion | None, named: ObjectVersion | None) -> ObjectVersion | None:
    """The version that the body must be: the requested one, completed by what the response's headers name."""
    if requested is None or named is None:
        return requested or named
    if named.generation != requested.generation:
        raise UnusableResponseError("generation", f"received generation {named.generation}, expected {requested.generation}")
    return requested if requested.crc32c is not None else replace(requested, crc32c=named.crc32c)
