"""Listing and downloading from GCS: what is checked, what is tried again, what is final."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.checksums import crc32c_of
from gcs_prefetchd.shared.errors import (
    AccessDeniedError,
    CredentialsError,
    ObjectChangedError,
    ObjectMissingError,
    OriginError,
    OriginUnavailableError,
)
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
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

BUCKET = "pictures"
DATA = bytes(range(256)) * 20
NAME = ObjectName(BUCKET, "train/images/00007.jpg")
KEY = f"{BUCKET}/{NAME.name}"

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
TRUNCATED_PAGE = Status(200, body='{"items": [{"name": "train/images/0', content_type="application/json")
PAGE_WITHOUT_SIZES = Status(200, body='{"items": [{"name": "train/images/0.jpg", "generation": "1"}]}')
PAGE_OF_SOMETHING_ELSE = Status(200, body='["items"]')
BROKEN_PAGES = [Status(503), Reset(), Close(), Cut(10), HtmlPage(), TRUNCATED_PAGE, PAGE_WITHOUT_SIZES, PAGE_OF_SOMETHING_ELSE]


def origin_of(
    gcs: GCSServer, *, deadline_s: float = 20.0, connections: int = 128, user_project: str | None = None
) -> GCSClient:
    """An anonymous origin whose tries give up on silence after 0.2 s."""
    access = Access(gcs.url, anonymous=True, user_project=user_project)
    return GCSClient(access, deadline_s=deadline_s, connections=connections, read_timeout_s=0.2)


@pytest.fixture
async def origin(gcs: GCSServer) -> AsyncIterator[GCSClient]:
    async with origin_of(gcs) as opened:
        yield opened


def put(gcs: GCSServer, data: bytes = DATA, name: ObjectName = NAME) -> ObjectVersion:
    """Store the object and return the version that a listing would name."""
    stored = gcs.put(name.bucket, name.name, data)
    return ObjectVersion(name, stored.generation, len(data), crc32c_of(data))


async def listed(origin: GCSClient, prefix: str = "train/") -> list[ObjectVersion]:
    async with contextlib.aclosing(origin.list(BUCKET, prefix)) as pages:
        versions = [version async for page in pages for version in page.versions(BUCKET)]
    return sorted(versions, key=lambda version: version.name)


def fault_id(fault: Fault) -> str:
    return repr(fault)[:60]


# Listing


async def test_a_listing_brings_every_page_and_no_folder_placeholder(gcs: GCSServer, origin: GCSClient) -> None:
    versions = [put(gcs, str(i).encode(), ObjectName(BUCKET, f"train/images/{i:05}.jpg")) for i in range(2500)]
    for placeholder in ("train/", "train/images/", "train/labels/"):
        gcs.put(BUCKET, placeholder, b"")
    gcs.put(BUCKET, "test/images/00000.jpg", b"of another prefix")
    assert await listed(origin) == versions


async def test_a_page_is_not_asked_for_compressed(gcs: GCSServer, origin: GCSClient) -> None:
    """The session unpacks nothing, so that objects come as they are stored."""
    put(gcs)
    await listed(origin)
    assert gcs.seen[-1].headers["Accept-Encoding"] == "identity"


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
async def test_a_listing_that_leads_nowhere_is_an_error_and_no_loop(gcs: GCSServer, pages: list[Status], reason: str) -> None:
    put(gcs)
    for request, page in enumerate(pages, 1):
        gcs.faults.add(page, kind=Kind.LIST, requests=request)
    async with origin_of(gcs, connections=1) as origin:
        with pytest.raises(OriginError, match=f"list gs://pictures/train/: .*{reason}"):
            await listed(origin)
    assert gcs.counts.list[BUCKET] == len(pages)


async def test_a_bucket_without_such_objects_lists_as_nothing(gcs: GCSServer, origin: GCSClient) -> None:
    gcs.create_bucket(BUCKET)
    assert await listed(origin) == []


async def test_a_listing_of_one_page_is_one_request(gcs: GCSServer, origin: GCSClient) -> None:
    versions = [put(gcs, b"", ObjectName(BUCKET, f"train/images/{i:05}.jpg")) for i in range(1000)]
    assert await listed(origin) == versions
    assert gcs.counts.list[BUCKET] == 1


async def test_a_long_listing_goes_on_beside_a_page_that_takes_long(gcs: GCSServer) -> None:
    versions = [put(gcs, b"", ObjectName(BUCKET, f"train/images/{i:05}.jpg")) for i in range(20_000)]
    gcs.faults.add(Stall(), BUCKET, kind=Kind.LIST, requests=5)
    found: list[ObjectVersion] = []
    async with GCSClient(Access(gcs.url, anonymous=True)) as origin:
        async for page in origin.list(BUCKET, "train/"):
            found += page.versions(BUCKET)
            if len(found) >= 10_000:
                gcs.release()
    assert sorted(found, key=lambda version: version.name) == versions
    assert gcs.counts.list[BUCKET] <= 20 + 24


async def test_a_cancelled_listing_leaves_no_request(gcs: GCSServer) -> None:
    for i in range(5000):
        put(gcs, b"", ObjectName(BUCKET, f"train/images/{i:05}.jpg"))
    gcs.faults.add(Stall(), BUCKET, kind=Kind.LIST, requests=range(2, 100))
    async with GCSClient(Access(gcs.url, anonymous=True)) as origin:
        listing = asyncio.create_task(listed(origin))
        await gcs.wait_for(lambda counts: counts.list[BUCKET] == 3)
        listing.cancel()
        await asyncio.wait([listing])
        assert [task for task in asyncio.all_tasks() if "_asked_page" in repr(task.get_coro())] == []


@pytest.mark.parametrize("fault", BROKEN_PAGES, ids=fault_id)
async def test_a_page_that_fails_is_asked_for_again(gcs: GCSServer, fault: Fault) -> None:
    versions = [put(gcs, b"", ObjectName(BUCKET, f"train/images/{i:05}.jpg")) for i in range(1001)]
    gcs.faults.add(fault, kind=Kind.LIST, requests=2)
    async with origin_of(gcs, connections=1) as origin:  # one page after another, so that the requests can be told
        assert await listed(origin) == versions
    assert gcs.counts.list[BUCKET] == 3


@pytest.mark.parametrize("fault", [Status(503), PAGE_WITHOUT_SIZES], ids=fault_id)
async def test_a_listing_that_never_succeeds_ends_at_the_deadline_and_is_named(gcs: GCSServer, fault: Fault) -> None:
    put(gcs)
    gcs.faults.add(fault, kind=Kind.LIST)
    async with origin_of(gcs, deadline_s=0.4) as origin:
        with pytest.raises(OriginUnavailableError, match=r"list gs://pictures/train/: gave up after 0.4 s .*(503|lacks)"):
            await listed(origin)


# What is final


def refuse_with_401(gcs: GCSServer) -> None:
    gcs.require_token("a token that nobody has")


def refuse_with_403(gcs: GCSServer) -> None:
    gcs.deny(BUCKET)


def refuse_with_404(gcs: GCSServer) -> None:
    gcs.delete(BUCKET, NAME.name)


REFUSALS = [(refuse_with_401, CredentialsError), (refuse_with_403, AccessDeniedError), (refuse_with_404, ObjectMissingError)]


@pytest.mark.parametrize(("refuse", "error"), REFUSALS)
async def test_an_object_that_gcs_refuses_is_asked_for_once_and_named(
    gcs: GCSServer, origin: GCSClient, refuse: Callable[[GCSServer], None], error: type[OriginError]
) -> None:
    put(gcs)
    refuse(gcs)
    with pytest.raises(error, match=f"fetch {NAME.uri}: GCS returned 40[134]"):
        await origin.read(NAME)
    assert gcs.counts.total() == 1


@pytest.mark.parametrize(("refuse", "error"), REFUSALS[:2])
async def test_a_listing_that_gcs_refuses_is_asked_for_once_and_named(
    gcs: GCSServer, origin: GCSClient, refuse: Callable[[GCSServer], None], error: type[OriginError]
) -> None:
    put(gcs)
    refuse(gcs)
    with pytest.raises(error, match=r"list gs://pictures/train/: GCS returned 40[13]"):
        await listed(origin)
    assert gcs.counts.total() == 1


async def test_a_data_root_in_a_missing_bucket_is_asked_for_once_and_named(gcs: GCSServer, origin: GCSClient) -> None:
    with pytest.raises(ObjectMissingError, match="list gs://pictures/train/: GCS returned 404"):
        await listed(origin)
    assert gcs.counts.total() == 1


# Versions


async def test_a_download_pins_the_generation(gcs: GCSServer, origin: GCSClient) -> None:
    version = put(gcs)
    assert await origin.read(NAME, version) == (version, DATA)
    assert f"generation={version.generation}" in gcs.seen[-1].raw_path


async def test_an_object_that_was_replaced_is_said_to_have_changed(gcs: GCSServer, origin: GCSClient) -> None:
    version = put(gcs)
    put(gcs, b"relabelled")
    with pytest.raises(ObjectChangedError, match=NAME.uri):
        await origin.read(NAME, version)
    assert gcs.counts.media[KEY] == 1


async def test_without_a_version_the_live_one_comes_from_the_headers(gcs: GCSServer, origin: GCSClient) -> None:
    version = put(gcs)
    assert await origin.read(NAME) == (version, DATA)
    assert gcs.counts.total() == 1


async def test_a_flipped_byte_is_noticed_without_a_version_too(gcs: GCSServer, origin: GCSClient) -> None:
    version = put(gcs)
    gcs.faults.add(FlippedByte(), requests=1)
    assert await origin.read(NAME) == (version, DATA)
    assert origin.counters.errors == {"crc32c": 1}


async def test_a_listing_without_hashes_leaves_the_check_to_the_answers_own_hash(gcs: GCSServer, origin: GCSClient) -> None:
    version = put(gcs)
    gcs.faults.add(FlippedByte(), requests=1)
    unhashed = ObjectVersion(NAME, version.generation, version.size, None)
    assert await origin.read(NAME, unhashed) == (version, DATA)
    assert origin.counters.errors == {"crc32c": 1}


@pytest.mark.parametrize("fault", [MissingHash(), MalformedHash()], ids=fault_id)
async def test_without_a_hash_the_metadata_is_asked_even_over_a_single_connection(gcs: GCSServer, fault: Fault) -> None:
    data = DATA * 400  # more than fits into a buffer: its connection is held for as long as it is not read
    version = put(gcs, data)
    gcs.faults.add(fault)
    async with origin_of(gcs, connections=1, deadline_s=3.0) as origin:
        assert await origin.read(NAME) == (version, data)
    assert gcs.counts.metadata[KEY] == 1
    assert f"generation={version.generation}" in gcs.seen[-1].raw_path


async def test_without_a_hash_an_object_replaced_after_its_metadata_was_asked_comes_in_its_new_generation(
    gcs: GCSServer,
) -> None:
    put(gcs)
    gcs.faults.add(MissingHash())
    gcs.faults.add(Stall(None), kind=Kind.METADATA, requests=1)
    async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=10.0) as origin:
        reading = asyncio.create_task(origin.read(NAME))
        await gcs.wait_for(lambda counts: counts.metadata[KEY] == 1)
        version = put(gcs, b"relabelled")
        gcs.release()
        assert await reading == (version, b"relabelled")


async def test_without_a_hash_the_bytes_are_checked_against_the_metadata(gcs: GCSServer, origin: GCSClient) -> None:
    version = put(gcs)
    gcs.faults.add(MissingHash(), requests={1, 3})
    gcs.faults.add(FlippedByte(), requests=2)
    assert await origin.read(NAME) == (version, DATA)
    assert origin.counters.errors == {"crc32c": 1}


@pytest.mark.parametrize("fault", [MissingHash(), MalformedHash()], ids=fault_id)
async def test_a_pinned_version_needs_no_hash_in_the_answer(gcs: GCSServer, origin: GCSClient, fault: Fault) -> None:
    version = put(gcs)
    gcs.faults.add(fault)
    assert await origin.read(NAME, version) == (version, DATA)
    assert gcs.counts.total() == 1


# Faults


@pytest.mark.parametrize("fault", BROKEN, ids=fault_id)
async def test_after_a_fault_of_any_kind_the_right_bytes_come(gcs: GCSServer, origin: GCSClient, fault: Fault) -> None:
    version = put(gcs)
    gcs.faults.add(fault, requests=1)
    assert await origin.read(NAME, version) == (version, DATA)
    assert gcs.counts.media[KEY] == 2


async def test_a_body_far_longer_than_the_object_is_not_read_to_its_end(gcs: GCSServer, origin: GCSClient) -> None:
    """Room was set aside for the object alone."""
    version = put(gcs)
    gcs.faults.add(LongBody(30_000_000), requests=1)
    assert await origin.read(NAME, version) == (version, DATA)
    assert origin.counters.received_bytes < 3_000_000


async def test_after_several_faults_in_a_row_the_right_bytes_come(gcs: GCSServer, origin: GCSClient) -> None:
    version = put(gcs)
    faults: list[Fault] = [Cut(700), FlippedByte(), Status(503)]
    for number, fault in enumerate(faults, start=1):
        gcs.faults.add(fault, requests=number)
    assert await origin.read(NAME, version) == (version, DATA)
    assert gcs.counts.media[KEY] == 4


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Status(503), "GCS returned 503"),
        (FlippedByte(), "crc32c .*, expected "),
        (Cut(100), "the connection was lost after 100 bytes of a body"),
        (Stall(None), "no response|Timeout"),
        (Drip(1, 0.05), "of 5120 bytes received"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_fault_that_never_ends_is_given_up_at_the_deadline_with_its_cause(
    gcs: GCSServer, fault: Fault, cause: str
) -> None:
    version = put(gcs)
    gcs.faults.add(fault)
    async with origin_of(gcs, deadline_s=0.5) as origin:
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(OriginUnavailableError, match=f"fetch {NAME.uri}: gave up after 0.5 s .*; last: .*({cause})"):
            await origin.read(NAME, version)
        assert 0.5 <= asyncio.get_running_loop().time() - began_s < 3.0
        assert origin.counters.errors["deadline"] == 1
        assert origin.counters.in_flight == 0


async def test_nobody_at_the_other_end_is_given_up_at_the_deadline() -> None:
    async with GCSServer() as gone:
        origin = origin_of(gone, deadline_s=0.3)
    async with origin:
        with pytest.raises(OriginUnavailableError, match=f"fetch {NAME.uri}: .*no connection to 127.0.0.1:[0-9]+: "):
            await origin.read(NAME)
    assert origin.counters.errors["connection"] >= 1


async def test_gcs_is_not_asked_again_before_the_retry_after_it_named(gcs: GCSServer, origin: GCSClient) -> None:
    version = put(gcs)
    gcs.faults.add(Status(429, retry_after="1"), requests=1)
    began_s = asyncio.get_running_loop().time()
    assert await origin.read(NAME, version) == (version, DATA)
    assert 1.0 <= asyncio.get_running_loop().time() - began_s < 5.0


async def test_a_retry_after_of_thirty_years_leaves_time_for_another_try(gcs: GCSServer) -> None:
    version = put(gcs)
    gcs.faults.add(Status(503, retry_after="1000000000"), requests=1)
    async with origin_of(gcs, deadline_s=2.0) as origin:
        assert await origin.read(NAME, version) == (version, DATA)


async def test_a_retry_after_of_thirty_years_does_not_outlast_the_deadline(gcs: GCSServer) -> None:
    put(gcs)
    gcs.faults.add(Status(503, retry_after="1000000000"))
    async with origin_of(gcs, deadline_s=0.3) as origin:
        with pytest.raises(OriginUnavailableError, match=r"gave up after 0\.3 s and [12] attempts?; last: GCS returned 503"):
            await origin.read(NAME)


async def test_a_huge_error_body_is_not_read_whole(gcs: GCSServer) -> None:
    put(gcs)
    gcs.pace = Pace(bytes_per_s=1e6)
    gcs.faults.add(Status(403, body="x" * 30_000_000))
    async with origin_of(gcs, deadline_s=10.0) as origin:
        with pytest.raises(AccessDeniedError) as caught:
            await origin.read(NAME)
    assert len(str(caught.value)) < 500


async def test_a_long_error_message_is_cut(gcs: GCSServer, origin: GCSClient) -> None:
    put(gcs)
    body = json.dumps({"error": {"message": "Why?\n" * 2000}})
    for kind in (Kind.MEDIA, Kind.LIST):
        gcs.faults.add(Status(400, body=body, content_type="application/json"), kind=kind)
    with pytest.raises(OriginError, match=r"fetch .*: GCS returned 400 \(Why\? Why\?") as fetching:
        await origin.read(NAME)
    with pytest.raises(OriginError, match=r"list .*: GCS returned 400 \(Why\? Why\?") as listing:
        await listed(origin)
    assert len(str(fetching.value)) < 500
    assert len(str(listing.value)) < 500


# Bytes and names


async def test_an_object_with_content_encoding_gzip_arrives_as_it_is_stored(gcs: GCSServer, origin: GCSClient) -> None:
    packed = gzip.compress(DATA)
    gcs.put(BUCKET, NAME.name, packed, content_encoding="gzip")
    version, data = await origin.read(NAME)
    assert data == packed
    assert version.size == len(packed)
    assert gcs.seen[-1].headers["Accept-Encoding"] == "gzip"  # no other coding: GCS would send what is not stored


@pytest.mark.parametrize("size_bytes", [0, 1, 5_000_000])
async def test_an_object_of_any_size_arrives_whole(gcs: GCSServer, origin: GCSClient, size_bytes: int) -> None:
    data = (DATA * (size_bytes // len(DATA) + 1))[:size_bytes]
    version = put(gcs, data)
    assert await origin.read(NAME, version) == (version, data)
    assert await origin.read(NAME) == (version, data)


@pytest.mark.parametrize(
    "name",
    [
        "a b.jpg",
        "a#b?c=d&e+f.jpg",
        "100%.jpg",
        "a%2Fb.jpg",
        "%2e%2e/%2e.jpg",
        "straße/猫 🐈.jpg",
        "a//b///c.jpg",
        "/leading.jpg",
        "a/./b/../c.jpg",
        "...",
        "a\\b;c,d'\"e.jpg",
        "x" * 1000,
    ],
)
async def test_an_object_of_any_name_is_listed_and_read(gcs: GCSServer, origin: GCSClient, name: str) -> None:
    version = put(gcs, name.encode(), ObjectName(BUCKET, name))
    assert await listed(origin, prefix=name) == [version]
    assert await origin.read(version.name, version) == (version, name.encode())


# Where and as whom


async def test_the_endpoint_comes_from_the_settings_alone(
    gcs: GCSServer, monkeypatch: pytest.MonkeyPatch, key_file: Path
) -> None:
    version = put(gcs)
    gcs.require_token("right")
    async with GCSServer() as elsewhere:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", elsewhere.url)
        async with GCSClient(Access(gcs.url, credentials=key_file)) as origin:
            assert await listed(origin) == [version]
            assert await origin.read(NAME) == (version, DATA)
        assert elsewhere.counts.total() == 0


async def test_anonymous_requests_carry_no_authorization_whatever_the_environment_names(
    gcs: GCSServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = put(gcs)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "there is no such key"))
    gcs.faults.add(MissingHash(), requests=2)
    async with origin_of(gcs) as origin:
        await listed(origin)
        await origin.read(NAME, version)
        await origin.read(NAME)
    assert {seen.kind for seen in gcs.seen} == {Kind.LIST, Kind.MEDIA, Kind.METADATA}
    assert not any("Authorization" in seen.headers for seen in gcs.seen)


async def test_the_project_that_pays_is_named_in_every_request(gcs: GCSServer) -> None:
    version = put(gcs)
    gcs.requester_pays(BUCKET)
    gcs.faults.add(MissingHash(), requests=2)
    async with origin_of(gcs, user_project="our project") as origin:
        assert await listed(origin) == [version]
        assert await origin.read(NAME, version) == (version, DATA)
        assert await origin.read(NAME) == (version, DATA)
    assert {seen.kind for seen in gcs.seen} == {Kind.LIST, Kind.MEDIA, Kind.METADATA}
    assert all("userProject=our" in seen.raw_path for seen in gcs.seen)


async def test_a_requester_pays_bucket_without_a_project_is_refused_once_with_gcs_own_words(
    gcs: GCSServer, origin: GCSClient
) -> None:
    put(gcs)
    gcs.requester_pays(BUCKET)
    with pytest.raises(OriginError, match=f"fetch {NAME.uri}: GCS returned 400 .*requester pays"):
        await origin.read(NAME)
    with pytest.raises(OriginError, match=r"list gs://pictures/train/: GCS returned 400 .*requester pays"):
        await listed(origin)
    assert gcs.counts.total() == 2


# Tokens


@pytest.fixture(scope="module")
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@pytest.fixture
def key_file(gcs: GCSServer, private_key: str, tmp_path: Path) -> Path:
    """A service account's key whose tokens come from the server."""
    path = tmp_path / "key.json"
    key = {"type": "service_account", "client_email": "reader@example.com", "private_key": private_key}
    path.write_text(json.dumps(key | {"token_uri": f"{gcs.url}/token"}))
    return path


@pytest.fixture
async def signed(gcs: GCSServer, key_file: Path) -> AsyncIterator[GCSClient]:
    """An origin with a service account's key; the server demands its token."""
    gcs.require_token("first")
    async with GCSClient(Access(gcs.url, credentials=key_file), deadline_s=20.0, connections=16) as opened:
        yield opened


async def test_one_token_serves_many_requests(gcs: GCSServer, signed: GCSClient) -> None:
    version = put(gcs)
    assert await asyncio.gather(*(signed.read(NAME) for _ in range(20))) == [(version, DATA)] * 20
    assert await listed(signed) == [version]
    assert gcs.counts.total(Kind.TOKEN) == 1


async def test_a_refused_token_is_renewed_once_for_all_that_were_refused(gcs: GCSServer, signed: GCSClient) -> None:
    version = put(gcs)
    await signed.read(NAME)
    gcs.require_token("second")
    # The refusals come at different times: a late one must not throw away the token that an early one has brought.
    gcs.faults.add(Stall(0), requests=3, together=True)
    reads = asyncio.gather(*(signed.read(NAME) for _ in range(10)))
    await gcs.wait_for(lambda counts: counts.total(Kind.TOKEN) == 2 and counts.media[KEY] >= 20)
    gcs.release()
    assert await reads == [(version, DATA)] * 10
    assert gcs.counts.total(Kind.TOKEN) == 2


class Then:
    """A sink that keeps nothing, and does something when the first byte is about to come."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    async def start(self, version: ObjectVersion) -> None:
        self._then()

    async def write(self, chunk: bytes) -> None:
        pass


async def test_a_token_that_runs_out_during_a_download_is_renewed_and_what_came_is_kept(
    gcs: GCSServer, signed: GCSClient
) -> None:
    version = put(gcs)
    gcs.faults.add(Cut(1000), requests=1)
    sink = Then(lambda: gcs.require_token("second"))
    assert await signed.download(NAME, version, sink) == version
    assert [seen.headers.get("Range") for seen in gcs.seen if seen.headers.get("Authorization")][1:] == ["bytes=1000-"] * 2


async def test_a_listing_whose_token_was_refused_goes_on_with_a_new_one(gcs: GCSServer, signed: GCSClient) -> None:
    version = put(gcs)
    assert await listed(signed) == [version]
    gcs.require_token("second")
    assert await listed(signed) == [version]
    assert gcs.counts.list[BUCKET] == 3
    assert gcs.counts.total(Kind.TOKEN) == 2


async def test_credentials_that_stay_refused_are_final_after_one_renewal(gcs: GCSServer, signed: GCSClient) -> None:
    put(gcs)
    gcs.require_token("of somebody else", BUCKET)
    with pytest.raises(CredentialsError, match=f"fetch {NAME.uri}: GCS returned 401"):
        await signed.read(NAME)
    assert gcs.counts.media[KEY] == 2
    assert gcs.counts.total(Kind.TOKEN) == 2


@pytest.mark.parametrize("kind", [Kind.MEDIA, Kind.METADATA])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_token_and_no_question_follows_a_redirect_to_another_host(
    gcs: GCSServer, signed: GCSClient, kind: Kind, status: int
) -> None:
    version = put(gcs)
    async with GCSServer() as elsewhere:
        elsewhere.put(BUCKET, NAME.name, b"of somebody else")
        path = f"/storage/v1/b/{BUCKET}/o/{NAME.name.replace('/', '%2F')}{'?alt=media' if kind is Kind.MEDIA else ''}"
        gcs.faults.add(Status(status, location=elsewhere.url + path), kind=kind, requests=1)
        gcs.faults.add(MissingHash())  # so that the metadata is asked for
        assert await signed.read(NAME) == (version, DATA)
        assert list(elsewhere.seen) == []


async def test_no_listing_comes_from_a_redirect_to_another_host(gcs: GCSServer, signed: GCSClient) -> None:
    put(gcs)
    async with GCSServer() as elsewhere:
        elsewhere.create_bucket(BUCKET)
        gcs.faults.add(Status(302, location=f"{elsewhere.url}/storage/v1/b/{BUCKET}/o"), kind=Kind.LIST, requests=1)
        await listed(signed)
        assert list(elsewhere.seen) == []


def json_answer(body: str, status: int = 200) -> Status:
    return Status(status, body=body, content_type="application/json")


@pytest.mark.parametrize(
    "fault",
    [
        Status(503),
        Reset(),
        HtmlPage(),
        Status(200, body="{}"),
        Status(400, body="no answer of a token endpoint"),
        Status(503, body="x" * 5_000_000),
        Status(200, body="{}", content_type="application/json; charset=hex"),
        json_answer("[" * 100_000),
        json_answer('{"access_token": "' + "x" * 20_000_000),
        json_answer('{"access_token": "two\\nlines", "expires_in": 3600}'),
        json_answer('{"access_token": "", "expires_in": 3600}'),
        json_answer('{"access_token": "token", "expires_in": 1e400}'),
        json_answer('{"access_token": "token", "expires_in": ' + "9" * 400 + "}"),
    ],
    ids=fault_id,
)
async def test_a_token_endpoint_that_fails_is_asked_again(gcs: GCSServer, signed: GCSClient, fault: Fault) -> None:
    version = put(gcs)
    gcs.faults.add(fault, "*", kind=Kind.TOKEN, requests={1, 2})
    assert await signed.read(NAME) == (version, DATA)
    assert signed.counters.errors == {"token": 2}


async def test_a_key_that_the_token_endpoint_refuses_is_final_at_once(gcs: GCSServer, signed: GCSClient) -> None:
    put(gcs)
    gcs.faults.add(Status(400, body='{"error": "invalid_grant"}'), "*", kind=Kind.TOKEN)
    for _ in range(5):
        with pytest.raises(CredentialsError, match=f"fetch {NAME.uri}: no access token: .*400 .invalid_grant"):
            await signed.read(NAME)
    assert gcs.counts.total() == 1  # not one for each object that is wanted


async def test_cancelling_one_of_two_that_wait_for_a_token_leaves_the_other_its_bytes(
    gcs: GCSServer, signed: GCSClient
) -> None:
    version = put(gcs)
    gcs.faults.add(Stall(None), "*", kind=Kind.TOKEN, requests=1)
    leaving, staying = asyncio.create_task(signed.read(NAME)), asyncio.create_task(signed.read(NAME))
    listing = asyncio.create_task(listed(signed))
    await gcs.wait_for(lambda counts: counts.total(Kind.TOKEN) == 1)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gcs.release()
    assert await staying == (version, DATA)
    assert await listing == [version]
    assert gcs.counts.total(Kind.TOKEN) == 1


async def test_an_origin_can_be_left_while_a_token_is_awaited(gcs: GCSServer, key_file: Path) -> None:
    gcs.faults.add(Stall(None), "*", kind=Kind.TOKEN)
    async with GCSClient(Access(gcs.url, credentials=key_file)) as origin:
        reading = asyncio.create_task(origin.read(NAME))
        await gcs.wait_for(lambda counts: counts.total(Kind.TOKEN) == 1)
        reading.cancel()
    assert {task.get_name() for task in asyncio.all_tasks()} & {"access token"} == set()


# What is counted and what is left behind


async def test_traffic_counts_requests_bytes_and_errors_by_kind(gcs: GCSServer, origin: GCSClient) -> None:
    version = put(gcs)
    faults: list[Fault] = [Status(503), FlippedByte(), Reset(0), Stall(None), HtmlPage()]
    await listed(origin)
    for fault in faults:
        gcs.faults.add(fault, requests=1)
        await origin.read(NAME, version)
    assert origin.counters.requests == gcs.counts.total() == 11
    assert origin.counters.errors == {"503": 1, "crc32c": 1, "connection": 1, "timeout": 1, "size": 1}
    assert origin.counters.received_bytes == 6 * len(DATA) + len(HtmlPage().body)


async def test_in_flight_counts_what_is_under_way(gcs: GCSServer) -> None:
    put(gcs)
    gcs.faults.add(Stall(10))
    async with GCSClient(Access(gcs.url, anonymous=True)) as origin:
        reads = [asyncio.create_task(origin.read(NAME)) for _ in range(3)]
        await gcs.wait_for(lambda counts: counts.open_media == 3)
        assert origin.counters.in_flight == 3
        reads[0].cancel()
        gcs.release()
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert [isinstance(result, BaseException) for result in results] == [True, False, False]
        assert origin.counters.in_flight == 0


@pytest.mark.parametrize(
    "fault", [Status(403, body="x" * 100_000), LongBody(1_000_000), Stall(100), Cut(10), Drip(1, 0.05)], ids=fault_id
)
async def test_no_connection_is_kept_by_a_download_that_failed(gcs: GCSServer, fault: Fault) -> None:
    """With room for one connection, a lost one would leave the next download none."""
    version = put(gcs)
    gcs.faults.add(fault)
    async with origin_of(gcs, connections=1, deadline_s=0.3) as origin:
        for _ in range(2):
            with pytest.raises(OriginError):
                await origin.read(NAME, version)
        gcs.faults.clear()
        assert await origin.read(NAME, version) == (version, DATA)


@pytest.mark.parametrize("fault", [Stall(None), Stall(100)], ids=fault_id)
async def test_no_connection_is_kept_by_a_download_that_was_cancelled(gcs: GCSServer, fault: Fault) -> None:
    version = put(gcs)
    gcs.faults.add(fault, requests=1)
    async with GCSClient(Access(gcs.url, anonymous=True), connections=1, deadline_s=10.0) as origin:
        reading = asyncio.create_task(origin.read(NAME, version))
        await gcs.wait_for(lambda counts: counts.media[KEY] == 1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await origin.read(NAME, version) == (version, DATA)


async def test_a_start_without_usable_credentials_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(CredentialsError, match="not JSON"):
        async with GCSClient(Access(credentials=tmp_path / "key.json")):
            pass
