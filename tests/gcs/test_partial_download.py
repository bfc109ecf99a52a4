"""A broken download resumes where it broke, with bytes of the same generation, or starts again."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.checked_read import crc32c_of
from gcs_prefetchd.shared.errors import ObjectChangedError
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.testing import (
    Cut,
    Drip,
    Fault,
    FlippedByte,
    GCSServer,
    HtmlPage,
    LongBody,
    Partial,
    Stall,
    Status,
    WrongGeneration,
)
from support.caches import BUCKET, content

NAME = ObjectName(BUCKET, "images/a.jpg")
KEY = f"{BUCKET}/{NAME.name}"
DATA = content(1, 3_000_000)
CHUNK_BYTES = 65_536
BREAK = Cut(2_000_000)


@pytest.fixture
async def client(gcs: GCSServer) -> AsyncIterator[GCSClient]:
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=10.0, read_timeout_s=0.5) as opened:
        yield opened


def put(gcs: GCSServer, data: bytes = DATA, generation: int | None = None) -> ObjectVersion:
    stored = gcs.put(BUCKET, NAME.name, data, generation=generation)
    return ObjectVersion(NAME, stored.generation, len(data), crc32c_of(data))


def inject(gcs: GCSServer, *faults: Fault) -> None:
    """Let the first requests hit these faults, one after another."""
    for request, fault in enumerate(faults, 1):
        gcs.faults.add(fault, KEY, requests=request)


def starts(gcs: GCSServer) -> list[int]:
    """The first byte of each request's range."""
    return [int(seen.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")) for seen in gcs.seen]


@pytest.mark.parametrize("size_bytes", [100_000, 3_000_000])
async def test_a_stalled_download_resumes_where_it_stalled(gcs: GCSServer, client: GCSClient, size_bytes: int) -> None:
    data = DATA[:size_bytes]
    version = put(gcs, data)
    inject(gcs, Stall(CHUNK_BYTES))
    assert await client.read(NAME) == (version, data)
    assert starts(gcs) == [0, CHUNK_BYTES]
    assert f"generation={version.generation}" in gcs.seen[-1].raw_path
    assert client.counters.received_bytes == size_bytes


@pytest.mark.parametrize("fault", [Cut(1_000_000), Cut(1_000_000, "chunked")], ids=str)
async def test_a_large_download_resumes_after_a_broken_connection(gcs: GCSServer, client: GCSClient, fault: Fault) -> None:
    version = put(gcs)
    inject(gcs, fault, fault)
    assert await client.read(NAME, version) == (version, DATA)
    first, second, third = starts(gcs)
    assert first == 0 < second < third


async def test_a_dripping_body_resumes_over_another_connection(gcs: GCSServer) -> None:
    data = DATA[:100_000]
    version = put(gcs, data)
    inject(gcs, Drip(1, 0.1))
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=4.0) as client:
        assert await client.read(NAME, version) == (version, data)
    assert starts(gcs)[1] >= 10
    assert client.counters.errors == {"timeout": 1}


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_received_bytes_are_kept_while_gcs_refuses_the_rest(gcs: GCSServer, client: GCSClient, status: int) -> None:
    version = put(gcs)
    inject(gcs, BREAK, Status(status), Status(status))
    assert await client.read(NAME, version) == (version, DATA)
    first, *others = starts(gcs)
    assert first == 0
    assert len(others) == 3
    assert min(others) > 0


@pytest.mark.parametrize(
    "fault",
    [
        HtmlPage(),
        Partial(0, 9),
        Status(204),
        Status(302),
        Status(416),
        Status(206),
        WrongGeneration(),
        LongBody(),
        FlippedByte(),
    ],
    ids=str,
)
async def test_after_a_response_that_is_not_the_rest_the_download_starts_again(
    gcs: GCSServer, client: GCSClient, fault: Fault
) -> None:
    version = put(gcs)
    inject(gcs, BREAK, fault)
    assert await client.read(NAME, version) == (version, DATA)
    first, second, third = starts(gcs)
    assert (first, third) == (0, 0)
    assert second > 0


@pytest.mark.parametrize("fault", [FlippedByte(), Cut(100, "close")], ids=str)
async def test_a_wrong_body_that_ended_normally_is_not_resumed(gcs: GCSServer, client: GCSClient, fault: Fault) -> None:
    version = put(gcs)
    inject(gcs, fault)
    assert await client.read(NAME, version) == (version, DATA)
    assert starts(gcs) == [0, 0]


async def test_parts_of_two_objects_are_never_combined(gcs: GCSServer, client: GCSClient) -> None:
    """Not even if both claim the same generation."""
    put(gcs, DATA[::-1], generation=7)
    version, data = await read_while_replaced(gcs, client, None, generation=7)
    assert (version, data) == (ObjectVersion(NAME, 7, len(DATA), crc32c_of(DATA)), DATA)
    assert client.counters.errors == {"timeout": 1, "crc32c": 1}
    assert starts(gcs) == [0, CHUNK_BYTES, 0]


async def test_an_object_replaced_during_a_read_is_read_in_its_new_generation(gcs: GCSServer, client: GCSClient) -> None:
    put(gcs, DATA[::-1], generation=7)
    version, data = await read_while_replaced(gcs, client, None, generation=8)
    assert (version.generation, data) == (8, DATA)


async def test_a_pinned_generation_replaced_during_a_read_is_reported_as_changed(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs, DATA[::-1], generation=7)
    with pytest.raises(ObjectChangedError, match=NAME.uri):
        await read_while_replaced(gcs, client, version, generation=8)


async def read_while_replaced(
    gcs: GCSServer, client: GCSClient, version: ObjectVersion | None, generation: int
) -> tuple[ObjectVersion, bytes]:
    """Read the object and replace it after the first chunk."""
    inject(gcs, Stall(CHUNK_BYTES))
    reading = asyncio.create_task(client.read(NAME, version))
    await gcs.wait_for(lambda counts: counts.bytes[KEY] == CHUNK_BYTES)
    put(gcs, generation=generation)
    return await reading
