"""The clients that people use work with the server as with GCS."""

import asyncio
import gc
import gzip
import json
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import requests
from aiohttp import ClientResponseError
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from gcloud.aio.auth import Token
from gcloud.aio.storage import Storage
from gcsfs.core import GCSFileSystem  # the package's own one uses gRPC, as the environment was at its import
from google.api_core.exceptions import Forbidden, NotFound, PreconditionFailed
from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import Request
from google.cloud import storage
from google.oauth2 import service_account

from gcs_prefetchd.testing import GCSServer, ServingGCS, Status, serving

DATA = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def _quiet_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the clients from sending requests that no test is about."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")


@pytest.fixture
def server() -> Iterator[ServingGCS]:
    with serving() as server:
        server.put("bucket", "images/1 é.jpg", DATA, content_type="image/jpeg")
        yield server


@pytest.fixture
def client(server: ServingGCS) -> Iterator[Any]:
    anonymous = AnonymousCredentials()  # type: ignore[no-untyped-call]
    client = storage.Client(project="test", credentials=anonymous, client_options={"api_endpoint": server.url})
    yield client
    client.close()
    # google-cloud-storage leaves the connection of a refused download to the garbage collector.
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


def test_google_cloud_storage_downloads_and_verifies(client: Any) -> None:
    blob = client.bucket("bucket").blob("images/1 é.jpg")
    assert blob.download_as_bytes(raw_download=True, checksum="crc32c") == DATA
    assert blob.download_as_bytes(start=10, end=19) == DATA[10:20]
    blob.reload()
    assert (blob.size, blob.content_type) == (len(DATA), "image/jpeg")


def test_google_cloud_storage_lists_more_than_a_page(client: Any, server: ServingGCS) -> None:
    names = [f"many/{number:05}" for number in range(2001)]
    for name in names:
        server.put("bucket", name, b"")
    assert [blob.name for blob in client.list_blobs("bucket", prefix="many/")] == names
    assert server.counts.list["bucket"] == 3
    assert [blob.name for blob in client.list_blobs("bucket", prefix="many/", page_size=7, max_results=20)] == names[:20]
    found = client.list_blobs("bucket", delimiter="/")
    assert list(found) == []
    assert found.prefixes == {"images/", "many/"}


def test_google_cloud_storage_uploads_and_deletes(client: Any, server: ServingGCS, tmp_path: Path) -> None:
    blob = client.bucket("bucket").blob("new")
    blob.metadata = {"kind": "test"}
    blob.upload_from_string(DATA, content_type="image/png", checksum="crc32c")
    first = blob.generation
    assert client.bucket("bucket").get_blob("new").metadata == {"kind": "test"}
    blob.upload_from_string(b"again")
    assert blob.generation > first
    with pytest.raises(PreconditionFailed):
        blob.upload_from_string(b"never", if_generation_match=first)
    blob.delete()
    assert not blob.exists()
    with pytest.raises(NotFound):
        blob.delete()


def test_google_cloud_storage_uploads_in_pieces(client: Any, server: ServingGCS) -> None:
    blob = client.bucket("bucket").blob("large", chunk_size=262_144)
    with blob.open("wb") as file:
        for _ in range(7):
            file.write(DATA)
    stored = server.get("bucket", "large")
    assert stored is not None
    assert stored.read(0, stored.size_bytes) == DATA * 7


def test_google_cloud_storage_pins_a_generation(client: Any, server: ServingGCS) -> None:
    first = server.put("bucket", "x", b"one").generation
    pinned = client.bucket("bucket").blob("x", generation=first)
    assert pinned.download_as_bytes() == b"one"
    server.put("bucket", "x", b"two")
    with pytest.raises(NotFound, match="No such object: bucket/x"):
        pinned.download_as_bytes()


def test_google_cloud_storage_gets_a_gzip_object_raw_or_unpacked(client: Any, server: ServingGCS) -> None:
    stored = gzip.compress(DATA)
    server.put("bucket", "z", stored, content_encoding="gzip")
    blob = client.bucket("bucket").blob("z")
    assert blob.download_as_bytes(raw_download=True) == stored
    assert blob.download_as_bytes() == DATA


def test_google_cloud_storage_raises_gcs_errors(client: Any, server: ServingGCS) -> None:
    with pytest.raises(NotFound, match="The specified bucket does not exist"):
        client.get_bucket("nonesuch")
    server.deny("bucket")
    with pytest.raises(Forbidden, match=r"does not have storage\.objects\.get access"):
        client.bucket("bucket").blob("x").download_as_bytes()


def test_google_cloud_storage_retries_after_a_503(client: Any, server: ServingGCS) -> None:
    server.faults.add(Status(503), "bucket/*", requests=1)
    assert client.bucket("bucket").blob("images/1 é.jpg").download_as_bytes() == DATA
    assert server.counts.media["bucket/images/1 é.jpg"] == 2


def key_file(url: str) -> dict[str, str]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    email = "reader@test.iam.gserviceaccount.com"
    return {
        "type": "service_account",
        "project_id": "test",
        "private_key_id": "1",
        "private_key": pem,
        "client_email": email,
        "client_id": "1",
        "token_uri": f"{url}/token",
    }


def test_a_key_file_whose_token_uri_is_the_server_gives_access(server: ServingGCS) -> None:
    server.require_token("secret-token")
    info = key_file(server.url)
    key = service_account.Credentials.from_service_account_info(info, scopes=["x"])  # type: ignore[no-untyped-call]
    # With this key a client would send requests to iamcredentials.googleapis.com from a thread.
    with requests.Session() as session:
        headers: dict[str, str] = {}
        key.refresh(Request(session))
        key.apply(headers)
        got = session.get(f"{server.url}/bucket/images/1 é.jpg", headers=headers, timeout=30)
        assert (got.status_code, got.content) == (200, DATA)
    assert server.counts.token == {"/token": 1}


@pytest_asyncio.fixture
async def async_server() -> AsyncIterator[GCSServer]:
    """A server in the loop of the test."""
    async with GCSServer() as server:
        server.put("bucket", "images/1 é.jpg", DATA, content_type="image/jpeg")
        yield server


@pytest_asyncio.fixture
async def aio(async_server: GCSServer) -> AsyncIterator[Storage]:
    async with Storage(api_root=async_server.url) as aio:
        yield aio


async def test_gcloud_aio_storage_downloads_objects_and_ranges(aio: Storage, async_server: GCSServer) -> None:
    assert await aio.download("bucket", "images/1 é.jpg") == DATA
    assert await aio.download("bucket", "images/1 é.jpg", headers={"Range": "bytes=10-19"}) == DATA[10:20]
    described = await aio.download_metadata("bucket", "images/1 é.jpg")
    assert described["size"] == str(len(DATA))
    assert async_server.counts.bytes["bucket/images/1 é.jpg"] == len(DATA) + 10


async def test_gcloud_aio_storage_lists_more_than_a_page(aio: Storage, async_server: GCSServer) -> None:
    names = [f"many/{number:05}" for number in range(1500)]
    for name in names:
        async_server.put("bucket", name, b"")
    found: list[str] = []
    token = ""
    while True:
        page = await aio.list_objects("bucket", params={"prefix": "many/", "pageToken": token})
        found += [item["name"] for item in page["items"]]
        token = page.get("nextPageToken", "")
        if not token:
            break
    assert found == names


@pytest.mark.parametrize("size_bytes", [0, 10, 3_000_000])
@pytest.mark.parametrize("metadata", [None, {"metadata": {"kind": "test"}}])
async def test_gcloud_aio_storage_uploads_in_each_way_and_deletes(
    aio: Storage, size_bytes: int, metadata: dict[str, Any] | None
) -> None:
    data = bytes(size_bytes)
    for force_resumable in (False, True):
        done = await aio.upload("bucket", "new", data, metadata=metadata, force_resumable_upload=force_resumable)
        assert done["size"] == str(size_bytes)
        assert await aio.download("bucket", "new") == data
    await aio.delete("bucket", "new")
    with pytest.raises(ClientResponseError) as caught:
        await aio.download("bucket", "new")
    assert caught.value.status == 404


async def test_gcloud_aio_storage_gets_a_gzip_object_as_stored(aio: Storage, async_server: GCSServer) -> None:
    async_server.put("bucket", "z", gzip.compress(DATA), content_encoding="gzip")
    assert await aio.download("bucket", "z") == DATA


async def test_gcloud_aio_storage_gets_its_token_from_the_server(async_server: GCSServer, tmp_path: Path) -> None:
    async_server.require_token("secret-token")
    path = tmp_path / "key.json"
    path.write_text(json.dumps(key_file(async_server.url)))
    scopes = ["https://www.googleapis.com/auth/devstorage.read_only"]
    async with Token(service_file=str(path), scopes=scopes) as token:
        assert await token.get() == "secret-token"


@pytest.fixture
def files(server: ServingGCS) -> Iterator[Any]:
    files = GCSFileSystem(token="anon", endpoint_url=server.url, skip_instance_cache=True)
    yield files
    session = files.session
    asyncio.run_coroutine_threadsafe(session.close(), files.loop).result()


def test_gcsfs_reads_objects_and_ranges(files: Any) -> None:
    assert files.cat_file("bucket/images/1 é.jpg") == DATA
    assert files.cat_file("bucket/images/1 é.jpg", start=10, end=20) == DATA[10:20]
    assert files.info("bucket/images/1 é.jpg")["size"] == len(DATA)
    with files.open("bucket/images/1 é.jpg", block_size=50_000) as file:
        file.seek(60_000)
        assert file.read(10) == DATA[60_000:60_010]
    with pytest.raises(FileNotFoundError):
        files.cat_file("bucket/nonesuch")


def test_gcsfs_lists_folders_and_more_than_a_page(files: Any, server: ServingGCS) -> None:
    names = [f"many/{number:05}" for number in range(1500)]
    for name in names:
        server.put("bucket", name, b"")
    assert sorted(files.ls("bucket", detail=False)) == ["bucket/images", "bucket/many"]
    assert files.find("bucket/many") == [f"bucket/{name}" for name in names]
    assert files.glob("bucket/many/0149*") == [f"bucket/many/0149{digit}" for digit in range(10)]


@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")  # gcsfs does
def test_gcsfs_uploads_and_deletes(files: Any, server: ServingGCS) -> None:
    for name, data in (("small", b"a\r\nb\r"), ("large", DATA * 70)):
        with files.open(f"bucket/{name}", "wb") as file:
            file.write(data)
        stored = server.get("bucket", name)
        assert stored is not None
        assert stored.read(0, stored.size_bytes) == data
        assert files.cat_file(f"bucket/{name}") == data
    files.pipe_file("bucket/piped", DATA)
    files.rm_file("bucket/small")
    files.rm(["bucket/large", "bucket/piped"])
    assert server.names("bucket") == ["images/1 é.jpg"]


def test_gcsfs_gets_a_gzip_object(files: Any, server: ServingGCS) -> None:
    server.put("bucket", "z", gzip.compress(DATA), content_encoding="gzip")
    assert files.cat_file("bucket/z") == DATA
