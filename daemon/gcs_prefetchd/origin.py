"""GCS: lists data roots and downloads objects, each of one generation and checked, or raises an error that names it.

gcloud-aio-storage lists and signs; the downloads go through its session, because its own `download` pins no generation and
checks nothing (it returns a truncated body, a flipped byte or a login page without an error).
"""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import quote

import aiohttp
import google_crc32c
from gcloud.aio.auth import Token
from gcloud.aio.storage import Storage

from gcs_prefetchd.answers import UnfitAnswerError, answer_error, named_version
from gcs_prefetchd.backoff import delay_s
from gcs_prefetchd.credentials import Access, make_token
from gcs_prefetchd.errors import CredentialsError, OriginUnavailableError
from gcs_prefetchd.manifest import ObjectVersion
from gcs_prefetchd.names import ObjectName
from gcs_prefetchd.traffic import Traffic

__all__ = ["Access", "Origin", "Sink"]

PUBLIC_ENDPOINT = "https://storage.googleapis.com"
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0
LIST_TIMEOUT_S = 60.0
LARGEST_ERROR_BODY = 16_384

T = TypeVar("T")


class Sink(Protocol):
    """Where a download goes."""

    async def begin(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0: forget what was written before."""

    async def write(self, chunk: bytes) -> None:
        """The next bytes."""


class Origin:
    """GCS, for as long as the context is entered. Leaving it closes its connections.

    `connections` bounds how many requests are open at a time; `deadline_s` bounds one object or one page, all its tries
    included. What it sends, receives and fails at is counted in `traffic`.
    """

    def __init__(
        self, access: Access, *, connections: int = 128, deadline_s: float = 60.0, traffic: Traffic | None = None
    ) -> None:
        self.traffic = traffic or Traffic()
        self._access = access
        self._connections = connections
        self._deadline_s = deadline_s
        self._root = access.endpoint or PUBLIC_ENDPOINT
        self._closing = AsyncExitStack()
        self._session: aiohttp.ClientSession
        self._storage: Storage
        self._token: Token | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            # The timeouts are per socket operation; the whole is bounded by a deadline that covers every try.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
            connector = aiohttp.TCPConnector(limit=self._connections, ttl_dns_cache=300)
            self._session = await stack.enter_async_context(
                aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
            )
            self._token = await make_token(self._access, self._session)
            self._storage = Storage(
                session=self._session,  # type: ignore[arg-type]  # the library types it for requests and aiohttp alike
                token=self._token or Token(service_file=None, session=self._session),  # type: ignore[arg-type]
                api_root=self._root,
                api_is_dev=self._token is None,
            )
            self._closing = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._closing.aclose()

    async def list(self, bucket: str, prefix: str) -> AsyncIterator[list[ObjectVersion]]:
        """Every object below the prefix, a page (at most 1,000) at a time; folder placeholders are left out."""
        token = ""
        while True:
            page = await self._retrying(f"list gs://{bucket}/{prefix}", lambda: self._page(bucket, prefix, token))  # noqa: B023
            yield [_version_of(bucket, item) for item in page.get("items", []) if not item["name"].endswith("/")]
            token = page.get("nextPageToken", "")
            if not token:
                return

    async def read(self, name: ObjectName, version: ObjectVersion | None = None) -> tuple[ObjectVersion, bytes]:
        """The object's stored bytes and their version, checked; `version` pins one, as `download` says."""
        sink = _Memory()
        version = await self.download(name, version, sink)
        return version, b"".join(sink.chunks)

    async def download(self, name: ObjectName, version: ObjectVersion | None, sink: Sink) -> ObjectVersion:
        """Bring the object's stored bytes into the sink and return what they were checked to be.

        With a `version` it is that generation, size and crc32c or an error (ObjectChangedError where the bucket no longer has
        it); without one it is the live generation, whose size and hash the answer must name.
        """
        self.traffic.in_flight += 1
        try:
            return await self._retrying(f"fetch {name.uri}", lambda: self._attempt(name, version, sink))
        finally:
            self.traffic.in_flight -= 1

    async def _retrying(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        tries, last = 0, "no answer"
        try:
            async with asyncio.timeout(self._deadline_s):
                refreshed = False
                while True:
                    tries += 1
                    try:
                        return await attempt()
                    except UnfitAnswerError as exc:
                        self.traffic.errors[exc.kind] += 1
                        last, wait_s = str(exc), exc.retry_after_s
                        if exc.final is not None and not (exc.kind == "401" and self._token is not None and not refreshed):
                            raise exc.final(f"{what}: {last}") from None
                        if exc.kind == "401":
                            refreshed = self._forget_token()
                    except (aiohttp.ClientError, TimeoutError, OSError) as exc:
                        self.traffic.errors[_kind_of(exc)] += 1
                        last, wait_s = _short(exc), None
                    await asyncio.sleep(delay_s(tries, wait_s))
        except TimeoutError:
            raise OriginUnavailableError(
                f"{what}: gave up after {self._deadline_s:g} s and {tries} tries; last: {last}"
            ) from None

    async def _attempt(self, name: ObjectName, version: ObjectVersion | None, sink: Sink) -> ObjectVersion:
        url = f"{self._root}/storage/v1/b/{name.bucket}/o/{quote(name.name, safe='')}"
        params = {"alt": "media"} | ({"generation": str(version.generation)} if version else {}) | self._payer()
        # gzip is accepted so that GCS sends stored bytes: decompressed ones match neither hash nor length.
        headers = {"Accept-Encoding": "gzip"} | await self._authorization()
        self.traffic.requests += 1
        async with self._session.get(url, params=params, headers=headers, allow_redirects=False) as response:
            await self._check_status(response, pinned=version is not None)
            expected = named_version(name, response.headers)
            if version is not None:
                if expected is not None and expected.generation != version.generation:
                    raise UnfitAnswerError("generation", f"generation {expected.generation} came for {version.generation}")
                expected = version
            elif expected is None:
                expected = await self._describe(name)
            return await self._receive(response, expected, sink)

    async def _receive(self, response: aiohttp.ClientResponse, expected: ObjectVersion, sink: Sink) -> ObjectVersion:
        await sink.begin(expected)
        received, crc32c = 0, 0
        async for chunk in response.content.iter_any():
            received += len(chunk)
            self.traffic.received_bytes += len(chunk)
            if received > expected.size:
                response.close()
                raise UnfitAnswerError("size", f"more than the {expected.size} bytes of the object came")
            crc32c = google_crc32c.extend(crc32c, chunk)
            await sink.write(chunk)
        if received != expected.size:
            raise UnfitAnswerError("size", f"{received} of {expected.size} bytes came")
        if expected.crc32c is not None and crc32c != expected.crc32c:
            raise UnfitAnswerError("crc32c", f"crc32c {crc32c:08x} came for {expected.crc32c:08x}")
        return ObjectVersion(expected.name, expected.generation, expected.size, crc32c)

    async def _describe(self, name: ObjectName) -> ObjectVersion:
        """Ask for the metadata of an object whose download named no hash or no generation."""
        url = f"{self._root}/storage/v1/b/{name.bucket}/o/{quote(name.name, safe='')}"
        headers = await self._authorization()
        self.traffic.requests += 1
        async with self._session.get(url, params=self._payer(), headers=headers, allow_redirects=False) as response:
            await self._check_status(response, pinned=False)
            try:
                return _version_of(name.bucket, json.loads(await response.read()))
            except ValueError:
                raise UnfitAnswerError("metadata", "its metadata is not JSON") from None

    async def _page(self, bucket: str, prefix: str, token: str) -> dict[str, Any]:
        params = {"prefix": prefix, "fields": "nextPageToken,items(name,generation,size,crc32c)"} | self._payer()
        self.traffic.requests += 1
        await self._authorization()
        try:
            page = await self._storage.list_objects(
                bucket,
                params=params | ({"pageToken": token} if token else {}),
                timeout=LIST_TIMEOUT_S,  # type: ignore[arg-type]  # typed int, used as aiohttp's
            )
        except aiohttp.ClientResponseError as exc:
            if exc.status == 400 and "{" not in exc.message:
                raise  # aiohttp's own word for an answer that is no HTTP
            body = exc.message.partition(": ")[2][:LARGEST_ERROR_BODY].encode()
            raise answer_error(exc.status, exc.headers or {}, body, pinned=False) from None
        except ValueError:
            raise UnfitAnswerError("listing", "the page is not JSON") from None
        if not isinstance(page, dict):
            raise UnfitAnswerError("listing", "the page is not a JSON object")
        return page

    async def _check_status(self, response: aiohttp.ClientResponse, *, pinned: bool) -> None:
        if response.status != 200:
            body = await response.content.read(LARGEST_ERROR_BODY)
            response.close()  # the rest of a large error is not worth its bytes
            raise answer_error(response.status, response.headers, body, pinned=pinned)

    async def _authorization(self) -> dict[str, str]:
        if self._token is None:
            return {}
        try:
            # Shielded: the library's waiters share one refresh, and cancelling one of them would cancel it for all.
            token = await asyncio.shield(asyncio.ensure_future(self._token.get()))
        except (aiohttp.ClientResponseError, KeyError, ValueError) as exc:
            raise CredentialsError(f"no access token: {_short(exc)}") from None
        return {"Authorization": f"Bearer {token}"}

    def _forget_token(self) -> bool:
        if self._token is not None:
            self._token.access_token = None
        return True

    def _payer(self) -> dict[str, str]:
        return {"userProject": self._access.user_project} if self._access.user_project else {}


class _Memory:
    """A sink that keeps the bytes."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    async def begin(self, version: ObjectVersion) -> None:
        self.chunks.clear()

    async def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)


def _version_of(bucket: str, item: dict[str, Any]) -> ObjectVersion:
    try:
        crc32c = item.get("crc32c")
        return ObjectVersion(
            ObjectName(bucket, item["name"]),
            int(item["generation"]),
            int(item["size"]),
            None if crc32c is None else int.from_bytes(base64.b64decode(crc32c, validate=True)),
        )
    except (KeyError, ValueError, TypeError, binascii.Error):
        raise UnfitAnswerError("listing", f"an entry lacks name, generation or size: {str(item)[:200]}") from None


def _kind_of(exc: BaseException) -> str:
    return "timeout" if isinstance(exc, TimeoutError) else "connection"


def _short(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"[:300] if str(exc) else type(exc).__name__
