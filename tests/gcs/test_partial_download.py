"""A download that breaks off goes on where it broke off, with bytes of the same generation, or begins again."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.checksums import crc32c_of
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
PIECE = 65_536
BREAK = Cut(2_000_000)


@pytest.fixture
async def origin(gcs: GCSServer) -> AsyncIterator[GCSClient]:
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=10.0, read_timeout_s=0.5) as opened:
        yield opened


def put(gcs: GCSServer, data: bytes = DATA, generation: int | None = None) -> ObjectVersion:
    stored = gcs.put(BUCKET, NAME.name, data, generation=generation)
    return ObjectVersion(NAME, stored.generation, len(data), crc32c_of(data))


def meet(gcs: GCSServer, *faults: Fault) -> None:
    """Have the first requests meet these, one after another."""
    for request, fault in enumerate(faults, 1):
        gcs.faults.add(fault, KEY, requests=request)


def starts(gcs: GCSServer) -> list[int]:
    """At which byte each request began to ask."""
    return [int(seen.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")) for seen in gcs.seen]


@pytest.mark.parametrize("size_bytes", [100_000, 3_000_000])
async def test_a_download_that_stalls_goes_on_where_it_stalled(gcs: GCSServer, origin: GCSClient, size_bytes: int) -> None:
    data = DATA[:size_bytes]
    version = put(gcs, data)
    meet(gcs, Stall(PIECE))
    assert await origin.read(NAME) == (version, data)
    assert starts(gcs) == [0, PIECE]
    assert f"generation={version.generation}" in gcs.seen[-1].raw_path
    assert origin.counters.received_bytes == size_bytes


@pytest.mark.parametrize("fault", [Cut(1_000_000), Cut(1_000_000, "chunked")], ids=str)
async def test_a_large_download_whose_connection_breaks_goes_on(gcs: GCSServer, origin: GCSClient, fault: Fault) -> None:
    version = put(gcs)
    meet(gcs, fault, fault)
    assert await origin.read(NAME, version) == (version, DATA)
    first, second, third = starts(gcs)
    assert first == 0 < second < third


async def test_a_body_that_drips_goes_on_over_another_connection(gcs: GCSServer) -> None:
    data = DATA[:100_000]
    version = put(gcs, data)
    meet(gcs, Drip(1, 0.1))
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=4.0) as origin:
        assert await origin.read(NAME, version) == (version, data)
    assert starts(gcs)[1] >= 10
    assert origin.counters.errors == {"timeout": 1}


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_what_came_is_kept_while_gcs_refuses_the_rest_for_now(gcs: GCSServer, origin: GCSClient, status: int) -> None:
    version = put(gcs)
    meet(gcs, BREAK, Status(status), Status(status))
    assert await origin.read(NAME, version) == (version, DATA)
    first, *others = starts(gcs)
    assert first == 0
    assert len(others) == 3
    assert min(others) > 0


@pytest.mark.parametrize(
    "answer",
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
async def test_an_answer_that_is_not_the_rest_has_the_download_begin_again(
    gcs: GCSServer, origin: GCSClient, answer: Fault
) -> None:
    version = put(gcs)
    meet(gcs, BREAK, answer)
    assert await origin.read(NAME, version) == (version, DATA)
    first, second, third = starts(gcs)
    assert (first, third) == (0, 0)
    assert second > 0


@pytest.mark.parametrize("fault", [FlippedByte(), Cut(100, "close")], ids=str)
async def test_a_body_that_ended_in_order_and_is_wrong_is_not_gone_on_with(
    gcs: GCSServer, origin: GCSClient, fault: Fault
) -> None:
    version = put(gcs)
    meet(gcs, fault)
    assert await origin.read(NAME, version) == (version, DATA)
    assert starts(gcs) == [0, 0]


async def test_parts_of_two_objects_are_never_put_together(gcs: GCSServer, origin: GCSClient) -> None:
    """Not even if both are said to be of one generation."""
    put(gcs, DATA[::-1], generation=7)
    version, data = await read_while_replaced(gcs, origin, None, generation=7)
    assert (version, data) == (ObjectVersion(NAME, 7, len(DATA), crc32c_of(DATA)), DATA)
    assert origin.counters.errors == {"timeout": 1, "crc32c": 1}
    assert starts(gcs) == [0, PIECE, 0]


async def test_an_object_that_is_replaced_in_the_middle_comes_in_its_new_generation(gcs: GCSServer, origin: GCSClient) -> None:
    put(gcs, DATA[::-1], generation=7)
    version, data = await read_while_replaced(gcs, origin, None, generation=8)
    assert (version.generation, data) == (8, DATA)


async def test_a_generation_that_was_asked_for_and_is_replaced_in_the_middle_is_said_to_have_changed(
    gcs: GCSServer, origin: GCSClient
) -> None:
    version = put(gcs, DATA[::-1], generation=7)
    with pytest.raises(ObjectChangedError, match=NAME.uri):
        await read_while_replaced(gcs, origin, version, generation=8)


async def read_while_replaced(
    gcs: GCSServer, origin: GCSClient, version: ObjectVersion | None, generation: int
) -> tuple[ObjectVersion, bytes]:
    """Read the object, of which a first piece comes before it is replaced."""
    meet(gcs, Stall(PIECE))
    reading = asyncio.create_task(origin.read(NAME, version))
    await gcs.wait_for(lambda counts: counts.bytes[KEY] == PIECE)
    put(gcs, generation=generation)
    return await reading
