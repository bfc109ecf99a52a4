"""A GCS client: any object name, the endpoint, the project to bill, and a start without credentials."""

import json
from pathlib import Path

import pytest

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.shared.errors import (
    CredentialsError,
    OriginError,
)
from gcs_prefetchd.shared.objects import ObjectName
from gcs_prefetchd.testing import (
    GCSServer,
    Kind,
    MissingHash,
    Status,
)
from support.gcs_clients import BUCKET, DATA, NAME, list_all, make_client, put


async def test_a_long_error_message_is_shortened(gcs: GCSServer, client: GCSClient) -> None:
    put(gcs)
    body = json.dumps({"error": {"message": "Why?\n" * 2000}})
    for kind in (Kind.MEDIA, Kind.LIST):
        gcs.faults.add(Status(400, body=body, content_type="application/json"), kind=kind)
    with pytest.raises(OriginError, match=r"fetch .*: GCS returned 400 \(Why\? Why\?") as fetching:
        await client.read(NAME)
    with pytest.raises(OriginError, match=r"list .*: GCS returned 400 \(Why\? Why\?") as listing:
        await list_all(client)
    assert len(str(fetching.value)) < 500
    assert len(str(listing.value)) < 500


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
async def test_an_object_with_any_name_is_listed_and_read(gcs: GCSServer, client: GCSClient, name: str) -> None:
    version = put(gcs, name.encode(), ObjectName(BUCKET, name))
    assert await list_all(client, prefix=name) == [version]
    assert await client.read(version.name, version) == (version, name.encode())


async def test_only_the_settings_choose_the_endpoint(gcs: GCSServer, monkeypatch: pytest.MonkeyPatch, key_file: Path) -> None:
    version = put(gcs)
    gcs.require_token("right")
    async with GCSServer() as elsewhere:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", elsewhere.url)
        async with GCSClient(Access(gcs.url, credentials=key_file)) as client:
            assert await list_all(client) == [version]
            assert await client.read(NAME) == (version, DATA)
        assert elsewhere.counts.total() == 0


async def test_every_request_names_the_project_to_bill(gcs: GCSServer) -> None:
    version = put(gcs)
    gcs.requester_pays(BUCKET)
    gcs.faults.add(MissingHash(), requests=2)
    async with make_client(gcs, user_project="our project") as client:
        assert await list_all(client) == [version]
        assert await client.read(NAME, version) == (version, DATA)
        assert await client.read(NAME) == (version, DATA)
    assert {seen.kind for seen in gcs.seen} == {Kind.LIST, Kind.MEDIA, Kind.METADATA}
    assert all("userProject=our" in seen.raw_path for seen in gcs.seen)


async def test_a_requester_pays_bucket_without_a_project_fails_once_with_the_message_of_gcs(
    gcs: GCSServer, client: GCSClient
) -> None:
    put(gcs)
    gcs.requester_pays(BUCKET)
    with pytest.raises(OriginError, match=f"fetch {NAME.uri}: GCS returned 400 .*requester pays"):
        await client.read(NAME)
    with pytest.raises(OriginError, match=r"list gs://pictures/train/: GCS returned 400 .*requester pays"):
        await list_all(client)
    assert gcs.counts.total() == 2


async def test_a_start_without_usable_credentials_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(CredentialsError, match="not JSON"):
        async with GCSClient(Access(credentials=tmp_path / "key.json")):
            pass
