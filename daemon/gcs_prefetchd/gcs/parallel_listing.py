"""Lists everything below a prefix, several pages at a time, in the ranges of names that `list_ranges` chooses."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

import aiohttp
from gcloud.aio.storage import Storage

from gcs_prefetchd.gcs.authorization import Authorizer
from gcs_prefetchd.gcs.list_pages import FIELDS, parse_page, without_folder_placeholders
from gcs_prefetchd.gcs.list_ranges import ListingRanges, PageRequest
from gcs_prefetchd.gcs.responses import UnusableResponseError
from gcs_prefetchd.gcs.retry import Attempt, AttemptFunction, RequestObserver, Retrier
from gcs_prefetchd.shared.errors import OriginError
from gcs_prefetchd.shared.manifest import ObjectColumns

__all__ = ["ParallelListing"]

PAGE_TIMEOUT_S = 60.0
MAX_PARALLEL_PAGES = 10  # of one listing; with two folders at 30 ms a page, one core has no time for more

_Page = tuple[ObjectColumns, str]


class ParallelListing:
    """Lists by gcloud-aio-storage, at most `connections` pages at a time. `before_page` is awaited before each page."""

    def __init__(
        self,
        storage: Storage,
        authorizer: Authorizer,
        retrier: Retrier,
        *,
        connections: int,
        user_project: str | None = None,
        before_page: Callable[[], Awaitable[RequestObserver]] | None = None,
    ) -> None:
        self._storage = storage
        self._authorizer = authorizer
        self._retrier = retrier
        self._max_pages = min(MAX_PARALLEL_PAGES, connections)
        self._payer = {"userProject": user_project} if user_project else {}
        self._before_page = before_page

    async def list(self, bucket: str, prefix: str) -> AsyncGenerator[ObjectColumns, None]:
        """See `GCSClient.list`."""
        what, ranges = f"list gs://{bucket}/{prefix}", ListingRanges(prefix)
        in_flight: dict[asyncio.Task[_Page], PageRequest] = {}
        try:
            while True:
                for request in ranges.next_requests(self._max_pages - len(in_flight)):
                    page = self._fetch_page(what, partial(self._attempt_page, bucket, prefix, request))
                    in_flight[asyncio.create_task(page)] = request
                if not in_flight:
                    return
                done, _ = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield self._new_objects(what, ranges, in_flight.pop(task), *task.result())
                    await asyncio.sleep(0)  # pages arrive in bursts, and each takes a millisecond or two
        finally:
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)

    async def _fetch_page(self, what: str, attempt: AttemptFunction[_Page]) -> _Page:
        observer = await self._before_page() if self._before_page is not None else None  # this wait has no deadline
        return await self._retrier.run(what, attempt, observer)

    async def _attempt_page(self, bucket: str, prefix: str, request: PageRequest, current: Attempt) -> _Page:
        bounds = {"startOffset": request.start, "endOffset": request.end, "pageToken": request.token}
        params = {"prefix": prefix, "fields": FIELDS} | self._payer | {key: value for key, value in bounds.items() if value}
        headers = await self._authorizer.authorize(current)
        try:
            page = await self._storage.list_objects(
                bucket,
                params=params,
                timeout=PAGE_TIMEOUT_S,  # type: ignore[arg-type]  # typed int, used as aiohttp's
            )
        except aiohttp.ClientResponseError as exc:
            if exc.status == 400 and "{" not in exc.message:
                raise  # aiohttp's own status for a response that is not valid HTTP
            body = exc.message.partition(": ")[2].encode()
            raise self._authorizer.error_for(exc.status, exc.headers or {}, body, headers, pinned=False) from None
        except aiohttp.ClientError:
            raise  # before ValueError, because the error for a refused certificate is one
        except (ValueError, RecursionError):
            raise UnusableResponseError("listing", "the page is not JSON") from None
        return parse_page(page)

    def _new_objects(
        self, what: str, ranges: ListingRanges, request: PageRequest, objects: ObjectColumns, token: str
    ) -> ObjectColumns:
        try:
            return without_folder_placeholders(objects[ranges.add_page(request, objects.names, token)])
        except UnusableResponseError as exc:
            self._authorizer.counters.errors[exc.kind] += 1
            raise (exc.final or OriginError)(f"{what}: {exc}") from None
