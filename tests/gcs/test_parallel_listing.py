"""Listings through a GCS client: every object, retried pages, and errors that name the data root."""

import asyncio
import json
from collections.abc import Callable

import pytest

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.errors import (
    AccessDeniedError,
    CredentialsError,
    ObjectMissingError,
    OriginError,
    OriginUnavailableError,
)
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.testing import (
    Close,
    Cut,
    Fault,
    GCSServer,
    HtmlPage,
    Kind,
    Reset,
    Stall,
    Status,
)
from support.gcs_clients import BUCKET, NAME, fault_id, list_all, make_client, put

TRUNCATED_PAGE = Status(200, body='{"items": [{"name": "train/images/0', content_type="application/json")


PAGE_WITHOUT_SIZES = Status(200, body='{"items": [{"name": "train/images/0.jpg", "generation": "1"}]}')


PAGE_OF_SOMETHING_ELSE = Status(200, body='["items"]')


BROKEN_PAGES = [Status(503), Reset(), Close(), Cut(10), HtmlPage(), TRUNCATED_PAGE, PAGE_WITHOUT_SIZES, PAGE_OF_SOMETHING_ELSE]


async def test_a_listing_returns_every_page_and_no_folder_placeholder(gcs: GCSServer, client: GCSClient) -> None:
    versions = [put(gcs, str(i).encode(), ObjectName(BUCKET, f"train/images/{i:05}.jpg")) for i in range(2500)]
    for placeholder in ("train/", "train/images/", "train/labels/"):
        gcs.put(BUCKET, placeholder, b"")
    gcs.put(BUCKET, "test/images/00000.jpg", b"of another prefix")
    assert await list_all(client) == versions


def page_of(*names: str, token: str = "") -> Status:
    items = [{"name": name, "generation": "1", "size": "1", "crc32c": "AAAAAA=="} for name in names]
    return Status(200, body=json.dumps({"items": items, "nextPageToken": token}), content_type="application/json")


@pytest.mark.parametrize(
    ("pages", "reason"),
    [
        ([page_of("train/a", token="1"), page_of("train/a", token="1")], "goes back to 'train/a'"),
        ([page_of("train/b", token="1"), page_of("train/a", token="2")], "the page after 'train/b' goes back to 'train/a'"),
        ([page_of(token="1"), page_of(token="2"), page_of(token="1")], "continue without a name"),
        ([page_of("train/b", "train/a")], "not sorted"),
    ],
)
async def test_a_listing_without_progress_is_an_error_and_not_a_loop(gcs: GCSServer, pages: list[Status], reason: str) -> None:
    put(gcs)
    for request, page in enumerate(pages, 1):
        gcs.faults.add(page, kind=Kind.LIST, requests=request)
    async with make_client(gcs, connections=1) as client:
        with pytest.raises(OriginError, match=f"list gs://pictures/train/: .*{reason}"):
            await list_all(client)
    assert gcs.counts.list[BUCKET] == len(pages)


async def test_a_bucket_without_matching_objects_has_an_empty_listing(gcs: GCSServer, client: GCSClient) -> None:
    gcs.create_bucket(BUCKET)
    assert await list_all(client) == []


async def test_a_listing_of_one_page_takes_one_request(gcs: GCSServer, client: GCSClient) -> None:
    versions = [put(gcs, b"", ObjectName(BUCKET, f"train/images/{i:05}.jpg")) for i in range(1000)]
    assert await list_all(client) == versions
    assert gcs.counts.list[BUCKET] == 1


async def test_a_long_listing_continues_while_one_page_is_slow(gcs: GCSServer) -> None:
    versions = [put(gcs, b"", ObjectName(BUCKET, f"train/images/{i:05}.jpg")) for i in range(20_000)]
    gcs.faults.add(Stall(), BUCKET, kind=Kind.LIST, requests=5)
    found: list[ObjectVersion] = []
    async with GCSClient(Access(gcs.url, anonymous=True)) as client:
        async for page in client.list(BUCKET, "train/"):
            found += page.versions(BUCKET)
            if len(found) >= 10_000:
                gcs.release()
    assert sorted(found, key=lambda version: version.name) == versions
    assert gcs.counts.list[BUCKET] <= 20 + 24


async def test_a_cancelled_listing_leaves_no_request_in_flight(gcs: GCSServer) -> None:
    for i in range(5000):
        put(gcs, b"", ObjectName(BUCKET, f"train/images/{i:05}.jpg"))
    gcs.faults.add(Stall(), BUCKET, kind=Kind.LIST, requests=range(2, 100))
    async with GCSClient(Access(gcs.url, anonymous=True)) as client:
        listing = asyncio.create_task(list_all(client))
        await gcs.wait_for(lambda counts: counts.list[BUCKET] == 3)
        listing.cancel()
        await asyncio.wait([listing])
        assert [task for task in asyncio.all_tasks() if "_fetch_page" in repr(task.get_coro())] == []


@pytest.mark.parametrize("fault", BROKEN_PAGES, ids=fault_id)
async def test_a_failed_page_is_retried(gcs: GCSServer, fault: Fault) -> None:
    versions = [put(gcs, b"", ObjectName(BUCKET, f"train/images/{i:05}.jpg")) for i in range(1001)]
    gcs.faults.add(fault, kind=Kind.LIST, requests=2)
    async with make_client(gcs, connections=1) as client:  # one page after another, so that the second request is known
        assert await list_all(client) == versions
    assert gcs.counts.list[BUCKET] == 3


@pytest.mark.parametrize("fault", [Status(503), PAGE_WITHOUT_SIZES], ids=fault_id)
async def test_a_listing_that_never_succeeds_fails_at_the_deadline_and_is_named(gcs: GCSServer, fault: Fault) -> None:
    put(gcs)
    gcs.faults.add(fault, kind=Kind.LIST)
    async with make_client(gcs, deadline_s=0.4) as client:
        with pytest.raises(OriginUnavailableError, match=r"list gs://pictures/train/: gave up after 0.4 s .*(503|lacks)"):
            await list_all(client)


def refuse_with_401(gcs: GCSServer) -> None:
    gcs.require_token("a token that no client has")


def refuse_with_403(gcs: GCSServer) -> None:
    gcs.deny(BUCKET)


def refuse_with_404(gcs: GCSServer) -> None:
    gcs.delete(BUCKET, NAME.name)


REFUSALS = [(refuse_with_401, CredentialsError), (refuse_with_403, AccessDeniedError), (refuse_with_404, ObjectMissingError)]


@pytest.mark.parametrize(("refuse", "error"), REFUSALS[:2])
async def test_a_refused_listing_is_requested_once_and_named(
    gcs: GCSServer, client: GCSClient, refuse: Callable[[GCSServer], None], error: type[OriginError]
) -> None:
    put(gcs)
    refuse(gcs)
    with pytest.raises(error, match=r"list gs://pictures/train/: GCS returned 40[13]"):
        await list_all(client)
    assert gcs.counts.total() == 1


async def test_a_data_root_in_a_missing_bucket_is_requested_once_and_named(gcs: GCSServer, client: GCSClient) -> None:
    with pytest.raises(ObjectMissingError, match="list gs://pictures/train/: GCS returned 404"):
        await list_all(client)
    assert gcs.counts.total() == 1
