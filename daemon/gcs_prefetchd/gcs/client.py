"""GCS: lists data roots and downloads objects, each of one generation and checked, or raises an error that names it.

gcloud-aio-storage lists and signs; the downloads are `downloader`'s.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Self

import aiohttp
from gcloud.aio.storage import Storage

from gcs_prefetchd.gcs.access_token import SharedToken
from gcs_prefetchd.gcs.bounded_session import bounded_response_class, refuse_redirects
from gcs_prefetchd.gcs.connection_pool import CONNECT_TIMEOUT_S
from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.gcs.credentials import Access, create_token, token_from_key_file
from gcs_prefetchd.gcs.download import READ_TIMEOUT_S, Authorizer, Downloader, Sink
from gcs_prefetchd.gcs.list_pages import FIELDS, parse_page, without_folders
from gcs_prefetchd.gcs.list_ranges import ListingRanges, PageRequest
from gcs_prefetchd.gcs.responses import UnusableResponseError
from gcs_prefetchd.gcs.retry import MAX_ATTEMPT_SHARE, Attempt, AttemptFunction, RequestObserver, Retrier
from gcs_prefetchd.shared.errors import OriginError
from gcs_prefetchd.shared.manifest import ObjectColumns
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = ["Access", "GCSClient"]

PUBLIC_ENDPOINT = "https://storage.googleapis.com"
LIST_TIMEOUT_S = 60.0
LISTED_AT_ONCE = 10  # pages of one listing; of two folders at 30 ms, one core has no time for more


class GCSClient:
    """GCS, for as long as the context is entered. Leaving it closes its connections.

    `connections` bounds how many requests are open at a time; `deadline_s` bounds one object or one page, all its tries
    included, `read_timeout_s` how long a try may wait for the next byte. `before_page` is awaited before each page of a
    listing. What it sends, receives and fails at is counted in `counters`.
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
        self.root = access.endpoint or PUBLIC_ENDPOINT
        self.token: SharedToken | None = None
        self._access = access
        self._most_connections = connections
        self._deadline_s = deadline_s
        self._read_timeout_s = min(read_timeout_s, deadline_s * MAX_ATTEMPT_SHARE)
        self._before_page = before_page
        self._closing = AsyncExitStack()
        self._storage: Storage
        self._authorizer: Authorizer
        self._downloader: Downloader
        self._page_retries: Retrier

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(self._session())
            source = await create_token(self._access, session)
            if source is not None:
                self.token = SharedToken(source, partial(token_from_key_file, self._access, session))
                stack.push_async_callback(self.token.close)
            self._authorizer = Authorizer(self.token, self.counters)
            self._downloader = Downloader(
                self.root,
                self._authorizer,
                user_project=self._access.user_project,
                connections=self._most_connections,
                deadline_s=self._deadline_s,
                read_timeout_s=self._read_timeout_s,
            )
            stack.push_async_callback(self._downloader.close)
            errors = (OSError, aiohttp.ClientError)
            self._page_retries = Retrier(
                self._deadline_s, self.counters, renews_token=self.token is not None, transport_errors=errors
            )
            self._storage = Storage(
                session=session,  # type: ignore[arg-type]  # the library types it for requests and aiohttp alike
                # Where it gets none it makes one of whatever key the environment names, which may not even exist.
                token=self.token or _NO_TOKEN,  # type: ignore[arg-type]  # it calls nothing but `get`
                api_root=self.root,
                api_is_dev=self.token is None,
            )
            self._closing = stack.pop_all()
        return self

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._most_connections, ttl_dns_cache=300),
            # Per socket operation; the whole is bounded by a deadline that covers every try.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=self._read_timeout_s),
            # Identity, for an answer that unpacks to any length could not be bounded.
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
            response_class=bounded_response_class(),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[refuse_redirects()],
        )

    async def __aexit__(self, *exc_info: object) -> None:
        await self._closing.aclose()

    async def list(self, bucket: str, prefix: str) -> AsyncGenerator[ObjectColumns, None]:
        """Every object below the prefix, a page (at most 1,000) at a time and in no order; folder placeholders are left out.

        Several pages are asked for at a time, in ranges of names that the first pages suggest. Leave it early through
        `contextlib.aclosing`, which ends the requests under way.
        """
        what, ranges = f"list gs://{bucket}/{prefix}", ListingRanges(prefix)
        asked: dict[asyncio.Task[tuple[ObjectColumns, str]], PageRequest] = {}
        try:
            while True:
                for ask in ranges.asks(min(LISTED_AT_ONCE, self._most_connections) - len(asked)):
                    page = self._asked_page(what, partial(self._page, bucket, prefix, ask))
                    asked[asyncio.create_task(page)] = ask
                if not asked:
                    return
                done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield self._new(what, ranges, asked.pop(task), *task.result())
                    await asyncio.sleep(0)  # pages come in bursts, and each takes a millisecond or two
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _asked_page(self, what: str, attempt: AttemptFunction[tuple[ObjectColumns, str]]) -> tuple[ObjectColumns, str]:
        observer = await self._before_page() if self._before_page is not None else None  # what that takes has no deadline
        return await self._page_retries.make(what, attempt, observer)

    def _new(self, what: str, ranges: ListingRanges, ask: PageRequest, objects: ObjectColumns, token: str) -> ObjectColumns:
        try:
            return without_folders(objects[ranges.take(ask, objects.names, token)])
        except UnusableResponseError as exc:
            self.counters.errors[exc.kind] += 1
            raise (exc.final or OriginError)(f"{what}: {exc}") from None

    async def read(self, name: ObjectName, version: ObjectVersion | None = None) -> tuple[ObjectVersion, bytes]:
        """The object's stored bytes and their version, checked; `version` pins one, as `download` says."""
        sink = _Memory()
        version = await self.download(name, version, sink)
        return version, b"".join(sink.chunks)

    async def download(
        self, name: ObjectName, version: ObjectVersion | None, sink: Sink, observer: RequestObserver | None = None
    ) -> ObjectVersion:
        """What `Downloader.download` does."""
        return await self._downloader.download(name, version, sink, observer)

    async def _page(self, bucket: str, prefix: str, ask: PageRequest, current: Attempt) -> tuple[ObjectColumns, str]:
        payer = {"userProject": self._access.user_project} if self._access.user_project else {}
        bounds = {"startOffset": ask.start, "endOffset": ask.end, "pageToken": ask.token}
        params = {"prefix": prefix, "fields": FIELDS} | payer | {key: value for key, value in bounds.items() if value}
        headers = await self._authorizer.headers(current)
        try:
            page = await self._storage.list_objects(
                bucket,
                params=params,
                timeout=LIST_TIMEOUT_S,  # type: ignore[arg-type]  # typed int, used as aiohttp's
            )
        except aiohttp.ClientResponseError as exc:
            if exc.status == 400 and "{" not in exc.message:
                raise  # aiohttp's own word for an answer that is no HTTP
            body = exc.message.partition(": ")[2].encode()
            raise self._authorizer.refusal(exc.status, exc.headers or {}, body, headers, pinned=False) from None
        except aiohttp.ClientError:
            raise  # before ValueError, of which a certificate that is refused is one
        except (ValueError, RecursionError):
            raise UnusableResponseError("listing", "the page is not JSON") from None
        return parse_page(page)


# Never asked: api_is_dev sends no authorization.
_NO_TOKEN = object()


class _Memory:
    """A sink that keeps the bytes."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    async def start(self, version: ObjectVersion) -> None:
        self.chunks.clear()

    async def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)
