"""The GCS client: lists data roots and downloads checked objects of one generation, or raises an error that names them.

gcloud-aio-storage lists and signs requests; downloads are made by `Downloader`.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Self

import aiohttp
from gcloud.aio.storage import Storage

from gcs_prefetchd.gcs.access_token import SharedToken
from gcs_prefetchd.gcs.authorization import Authorizer
from gcs_prefetchd.gcs.bounded_session import bounded_response_class, refuse_redirects
from gcs_prefetchd.gcs.connection_pool import CONNECT_TIMEOUT_S
from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.gcs.credentials import Access, create_token, token_from_key_file
from gcs_prefetchd.gcs.download import READ_TIMEOUT_S, Downloader, Sink
from gcs_prefetchd.gcs.parallel_listing import ParallelListing
from gcs_prefetchd.gcs.retry import MAX_ATTEMPT_SHARE, RequestObserver, Retrier
from gcs_prefetchd.shared.manifest import ObjectColumns
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = ["Access", "GCSClient"]

PUBLIC_ENDPOINT = "https://storage.googleapis.com"


class GCSClient:
    """Connected to GCS while its context is entered; leaving the context closes the connections.

    `connections` bounds the requests in flight, `deadline_s` one object or one page with all its attempts, and
    `read_timeout_s` the wait of an attempt for its next byte. `before_page` is awaited before each page of a listing. Requests,
    received bytes and failures are counted in `counters`.
    """

    def __init__(
        self,
        access: Access,
        *,
        connections: int = 128,
        deadline_s: float = 60.0,
        read_timeout_s: float = READ_TIMEOUT_S,
        before_page: Callable[[], Awaitable[RequestObserver]] | None = None,
        counters: RequestCounters | None = None,
    ) -> None:
        self.counters = counters or RequestCounters()
        self.endpoint = access.endpoint or PUBLIC_ENDPOINT
        self.token: SharedToken | None = None
        self._access = access
        self._max_connections = connections
        self._deadline_s = deadline_s
        self._read_timeout_s = min(read_timeout_s, deadline_s * MAX_ATTEMPT_SHARE)
        self._before_page = before_page
        self._exit_stack = AsyncExitStack()
        self._authorizer: Authorizer
        self._downloader: Downloader
        self._listing: ParallelListing

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(self._session())
            source = await create_token(self._access, session)
            if source is not None:
                self.token = SharedToken(source, partial(token_from_key_file, self._access, session))
                stack.push_async_callback(self.token.close)
            self._authorizer = Authorizer(self.token, self.counters)
            self._downloader = Downloader(
                self.endpoint,
                self._authorizer,
                user_project=self._access.user_project,
                connections=self._max_connections,
                deadline_s=self._deadline_s,
                read_timeout_s=self._read_timeout_s,
            )
            stack.push_async_callback(self._downloader.close)
            self._listing = ParallelListing(
                self._list_api(session),
                self._authorizer,
                Retrier(
                    self._deadline_s,
                    self.counters,
                    renews_token=self.token is not None,
                    transport_errors=(OSError, aiohttp.ClientError),
                ),
                connections=self._max_connections,
                user_project=self._access.user_project,
                before_page=self._before_page,
            )
            self._exit_stack = stack.pop_all()
        return self

    def _list_api(self, session: aiohttp.ClientSession) -> Storage:
        return Storage(
            session=session,  # type: ignore[arg-type]  # the library's type covers requests and aiohttp alike
            # Without a token it makes one from the key that the environment names, which may not even exist.
            token=self.token or _NO_TOKEN,  # type: ignore[arg-type]  # it calls nothing but `get`
            api_root=self.endpoint,
            api_is_dev=self.token is None,
        )

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections, ttl_dns_cache=300),
            # For each socket operation; a deadline over all attempts bounds the total.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=self._read_timeout_s),
            # Identity, because a compressed response could unpack to any length and so have no bound.
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
            response_class=bounded_response_class(),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[refuse_redirects()],
        )

    async def __aexit__(self, *exc_info: object) -> None:
        await self._exit_stack.aclose()

    async def list(self, bucket: str, prefix: str) -> AsyncGenerator[ObjectColumns, None]:
        """Yield every object below the prefix, a page (at most 1,000) at a time, unordered and without folder placeholders.

        Several pages are requested in parallel, in ranges of names that the first pages suggest. Wrap it in
        `contextlib.aclosing` to leave it early: that cancels the requests in flight.
        """
        async with aclosing(self._listing.list(bucket, prefix)) as pages:
            async for page in pages:
                yield page

    async def read(self, name: ObjectName, version: ObjectVersion | None = None) -> tuple[ObjectVersion, bytes]:
        """The object's stored bytes and their version, checked; `version` pins one, as in `download`."""
        sink = _MemorySink()
        version = await self.download(name, version, sink)
        return version, b"".join(sink.chunks)

    async def download(
        self, name: ObjectName, version: ObjectVersion | None, sink: Sink, observer: RequestObserver | None = None
    ) -> ObjectVersion:
        """See `Downloader.download`."""
        return await self._downloader.download(name, version, sink, observer)


# Never used: with api_is_dev the library sends no authorization.
_NO_TOKEN = object()


class _MemorySink:
    """A sink that keeps the bytes in memory."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    async def start(self, version: ObjectVersion) -> None:
        self.chunks.clear()

    async def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)
