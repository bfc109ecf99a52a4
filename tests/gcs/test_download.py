"""Downloads: of one generation, checked, retried after any fault, or an error that names the object."""

import asyncio
import gzip
from collections.abc import Callable

import pytest

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.errors import (
    AccessDeniedError,
    CredentialsError,
    ObjectChangedError,
    ObjectMissingError,
    OriginError,
)
from gcs_prefetchd.shared.objects import ObjectVersion
from gcs_prefetchd.testing import (
    Close,
    Cut,
    Drip,
    EmptyBody,
    Fault,
    FlippedByte,
    GCSServer,
    HtmlPage,
    Kind,
    LongBody,
    MalformedHash,
    MissingHash,
    Pace,
    Reset,
    Stall,
    Status,
    WrongGeneration,
)
from support.gcs_clients import BUCKET, DATA, KEY, NAME, fault_id, make_client, put

BROKEN = [
    Cut(100),
    Cut(100, "chunked"),
    Cut(100, "close"),
    Cut(0),
    FlippedByte(),
    FlippedByte(at=0),
    LongBody(),
    EmptyBody(),
    HtmlPage(),
    WrongGeneration(),
    Stall(None),
    Stall(100),
    Reset(),
    Reset(100),
    Close(),
    *(Status(status) for status in (204, 206, 302, 304, 408, 429, 500, 502, 503, 504)),
]


def refuse_with_401(gcs: GCSServer) -> None:
    gcs.require_token("a token that no client has")


def refuse_with_403(gcs: GCSServer) -> None:
    gcs.deny(BUCKET)


def refuse_with_404(gcs: GCSServer) -> None:
    gcs.delete(BUCKET, NAME.name)


REFUSALS = [(refuse_with_401, CredentialsError), (refuse_with_403, AccessDeniedError), (refuse_with_404, ObjectMissingError)]


@pytest.mark.parametrize(("refuse", "error"), REFUSALS)
async def test_a_refused_object_is_requested_once_and_named(
    gcs: GCSServer, client: GCSClient, refuse: Callable[[GCSServer], None], error: type[OriginError]
) -> None:
    put(gcs)
    refuse(gcs)
    with pytest.raises(error, match=f"fetch {NAME.uri}: GCS returned 40[134]"):
        await client.read(NAME)
    assert gcs.counts.total() == 1


async def test_a_download_pins_the_generation(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs)
    assert await client.read(NAME, version) == (version, DATA)
    assert f"generation={version.generation}" in gcs.seen[-1].raw_path


async def test_an_object_that_was_replaced_is_reported_as_changed(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs)
    put(gcs, b"relabelled")
    with pytest.raises(ObjectChangedError, match=NAME.uri):
        await client.read(NAME, version)
    assert gcs.counts.media[KEY] == 1


async def test_without_a_version_the_headers_name_the_live_one(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs)
    assert await client.read(NAME) == (version, DATA)
    assert gcs.counts.total() == 1


async def test_a_flipped_byte_is_detected_even_without_a_version(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs)
    gcs.faults.add(FlippedByte(), requests=1)
    assert await client.read(NAME) == (version, DATA)
    assert client.counters.errors == {"crc32c": 1}


async def test_a_version_without_a_hash_is_checked_against_the_hash_in_the_response(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs)
    gcs.faults.add(FlippedByte(), requests=1)
    unhashed = ObjectVersion(NAME, version.generation, version.size, None)
    assert await client.read(NAME, unhashed) == (version, DATA)
    assert client.counters.errors == {"crc32c": 1}


@pytest.mark.parametrize("fault", [MissingHash(), MalformedHash()], ids=fault_id)
async def test_without_a_hash_the_metadata_is_requested_even_over_a_single_connection(gcs: GCSServer, fault: Fault) -> None:
    data = DATA * 400  # more than fits into a buffer: an unread body keeps its connection in use
    version = put(gcs, data)
    gcs.faults.add(fault)
    async with make_client(gcs, connections=1, deadline_s=3.0) as client:
        assert await client.read(NAME) == (version, data)
    assert gcs.counts.metadata[KEY] == 1
    assert f"generation={version.generation}" in gcs.seen[-1].raw_path


async def test_without_a_hash_an_object_replaced_after_the_metadata_request_is_read_in_its_new_generation(
    gcs: GCSServer,
) -> None:
    put(gcs)
    gcs.faults.add(MissingHash())
    gcs.faults.add(Stall(None), kind=Kind.METADATA, requests=1)
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=10.0) as client:
        reading = asyncio.create_task(client.read(NAME))
        await gcs.wait_for(lambda counts: counts.metadata[KEY] == 1)
        version = put(gcs, b"relabelled")
        gcs.release()
        assert await reading == (version, b"relabelled")


async def test_without_a_hash_the_bytes_are_checked_against_the_metadata(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs)
    gcs.faults.add(MissingHash(), requests={1, 3})
    gcs.faults.add(FlippedByte(), requests=2)
    assert await client.read(NAME) == (version, DATA)
    assert client.counters.errors == {"crc32c": 1}


@pytest.mark.parametrize("fault", [MissingHash(), MalformedHash()], ids=fault_id)
async def test_a_pinned_version_needs_no_hash_in_the_response(gcs: GCSServer, client: GCSClient, fault: Fault) -> None:
    version = put(gcs)
    gcs.faults.add(fault)
    assert await client.read(NAME, version) == (version, DATA)
    assert gcs.counts.total() == 1


@pytest.mark.parametrize("fault", BROKEN, ids=fault_id)
async def test_after_a_fault_of_any_kind_the_right_bytes_are_read(gcs: GCSServer, client: GCSClient, fault: Fault) -> None:
    version = put(gcs)
    gcs.faults.add(fault, requests=1)
    assert await client.read(NAME, version) == (version, DATA)
    assert gcs.counts.media[KEY] == 2


async def test_a_body_far_longer_than_the_object_is_not_read_to_its_end(gcs: GCSServer, client: GCSClient) -> None:
    """Space was reserved for the object alone."""
    version = put(gcs)
    gcs.faults.add(LongBody(30_000_000), requests=1)
    assert await client.read(NAME, version) == (version, DATA)
    assert client.counters.received_bytes < 3_000_000


async def test_after_several_faults_in_a_row_the_right_bytes_are_read(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs)
    faults: list[Fault] = [Cut(700), FlippedByte(), Status(503)]
    for number, fault in enumerate(faults, start=1):
        gcs.faults.add(fault, requests=number)
    assert await client.read(NAME, version) == (version, DATA)
    assert gcs.counts.media[KEY] == 4


async def test_only_the_start_of_a_huge_error_body_is_read(gcs: GCSServer) -> None:
    put(gcs)
    gcs.pace = Pace(bytes_per_s=1e6)
    gcs.faults.add(Status(403, body="x" * 30_000_000))
    async with make_client(gcs, deadline_s=10.0) as client:
        with pytest.raises(AccessDeniedError) as caught:
            await client.read(NAME)
    assert len(str(caught.value)) < 500


async def test_an_object_with_content_encoding_gzip_is_read_as_stored(gcs: GCSServer, client: GCSClient) -> None:
    packed = gzip.compress(DATA)
    gcs.put(BUCKET, NAME.name, packed, content_encoding="gzip")
    version, data = await client.read(NAME)
    assert data == packed
    assert version.size == len(packed)
    assert gcs.seen[-1].headers["Accept-Encoding"] == "gzip"  # no other coding: GCS would not send the stored bytes


@pytest.mark.parametrize("size_bytes", [0, 1, 5_000_000])
async def test_an_object_of_any_size_is_read_completely(gcs: GCSServer, client: GCSClient, size_bytes: int) -> None:
    data = (DATA * (size_bytes // len(DATA) + 1))[:size_bytes]
    version = put(gcs, data)
    assert await client.read(NAME, version) == (version, data)
    assert await client.read(NAME) == (version, data)


@pytest.mark.parametrize(
    "fault", [Status(403, body="x" * 100_000), LongBody(1_000_000), Stall(100), Cut(10), Drip(1, 0.05)], ids=fault_id
)
async def test_a_failed_download_releases_its_connection(gcs: GCSServer, fault: Fault) -> None:
    """With one connection allowed, a leaked one would leave none for the next download."""
    version = put(gcs)
    gcs.faults.add(fault)
    async with make_client(gcs, connections=1, deadline_s=0.3) as client:
        for _ in range(2):
            with pytest.raises(OriginError):
                await client.read(NAME, version)
        gcs.faults.clear()
        assert await client.read(NAME, version) == (version, DATA)


@pytest.mark.parametrize("fault", [Stall(None), Stall(100)], ids=fault_id)
async def test_a_cancelled_download_releases_its_connection(gcs: GCSServer, fault: Fault) -> None:
    version = put(gcs)
    gcs.faults.add(fault, requests=1)
    async with GCSClient(Access(gcs.url, anonymous=True), connections=1, deadline_s=10.0) as client:
        reading = asyncio.create_task(client.read(NAME, version))
        await gcs.wait_for(lambda counts: counts.media[KEY] == 1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await client.read(NAME, version) == (version, DATA)
