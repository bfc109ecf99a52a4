"""The server responds over HTTP as GCS does: dialects, ranges, generations, conditions, encodings, refusals, counts."""

import asyncio
import base64
import gzip
import hashlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import aiohttp
import google_crc32c
import pytest
import pytest_asyncio
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from gcs_prefetchd.shared.errors import InvalidNameError, SettingsError, StartError
from gcs_prefetchd.testing import GCSServer, Stall, Status, serving

DATA = bytes(range(256)) * 4
JSON = "/storage/v1/b/bucket/o/images%2F1.jpg?alt=media"
DOWNLOAD = "/download/storage/v1/b/bucket/o/images%2F1.jpg?alt=media"
XML = "/bucket/images/1.jpg"


@dataclass(frozen=True, slots=True)
class Got:
    """A complete response."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Web:
    """Sends requests to the server; adds no header of its own and decompresses nothing."""

    def __init__(self, server: GCSServer, session: aiohttp.ClientSession) -> None:
        self._server = server
        self._session = session

    async def __call__(self, path: str, method: str = "GET", data: bytes | None = None, **headers: str) -> Got:
        named = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
        url = self._server.url + path
        skipped = ("Accept-Encoding", "Content-Type") if data is None else ("Accept-Encoding",)
        request = self._session.request(
            method, URL(url, encoded=True), data=data, headers=named, skip_auto_headers=skipped, allow_redirects=False
        )
        async with request as response:
            return Got(response.status, response.headers, await response.read())


@pytest_asyncio.fixture
async def server() -> AsyncIterator[GCSServer]:
    async with GCSServer() as server:
        server.put("bucket", "images/1.jpg", DATA, content_type="image/jpeg", generation=1700000000000001)
        yield server


@pytest_asyncio.fixture
async def web(server: GCSServer) -> AsyncIterator[Web]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield Web(server, session)


@pytest.mark.parametrize("path", [JSON, DOWNLOAD, XML, "/bucket/images%2F1.jpg"])
async def test_every_dialect_serves_the_bytes_with_their_size_hashes_and_generation(web: Web, path: str) -> None:
    got = await web(path)
    hashes = ",".join(got.headers.getall("x-goog-hash"))
    md5 = base64.b64encode(hashlib.md5(DATA).digest()).decode()
    crc32c = base64.b64encode(google_crc32c.value(DATA).to_bytes(4, "big")).decode()
    assert (got.status, got.body) == (200, DATA)
    assert hashes == f"crc32c={crc32c},md5={md5}"
    assert got.headers["x-goog-generation"] == "1700000000000001"
    assert got.headers["x-goog-metageneration"] == "1"
    assert got.headers["x-goog-stored-content-length"] == "1024"
    assert got.headers["x-goog-stored-content-encoding"] == "identity"
    assert got.headers["Content-Type"] == "image/jpeg"
    assert got.headers["ETag"]
    assert got.headers["Last-Modified"].endswith(" GMT")


@pytest.mark.parametrize(
    ("range_header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=1000-", 1000, 1024),
        ("bytes=1000-9999", 1000, 1024),
        ("bytes=-10", 1014, 1024),
        ("bytes=-9999", 0, 1024),
        ("bytes=0-", 0, 1024),
    ],
)
async def test_a_range_is_a_206_with_just_those_bytes(web: Web, range_header: str, start: int, stop: int) -> None:
    for path in (JSON, XML):
        got = await web(path, Range=range_header)
        assert (got.status, got.body) == (206, DATA[start:stop])
        assert got.headers["Content-Range"] == f"bytes {start}-{stop - 1}/1024"
        assert got.headers["Content-Length"] == str(stop - start)


@pytest.mark.parametrize("range_header", ["bytes=1024-", "bytes=5000-6000", "bytes=-0"])
async def test_a_range_past_the_end_is_a_416_that_names_the_size(web: Web, range_header: str) -> None:
    got = await web(JSON, Range=range_header)
    assert (got.status, got.headers["Content-Range"]) == (416, "bytes */1024")


@pytest.mark.parametrize("range_header", ["bytes=-", "bytes=5-2", "items=0-1", "bytes=0-1,5-6", "nonsense"])
async def test_an_invalid_range_is_ignored(web: Web, range_header: str) -> None:
    got = await web(JSON, Range=range_header)
    assert (got.status, got.body) == (200, DATA)


async def test_an_empty_object_has_no_range_at_all(web: Web, server: GCSServer) -> None:
    server.put("bucket", "empty", b"")
    complete = await web("/bucket/empty")
    assert (complete.status, complete.body, complete.headers["Content-Length"]) == (200, b"", "0")
    assert (await web("/bucket/empty", Range="bytes=0-")).status == 416


async def test_each_upload_is_a_new_generation_and_the_old_one_is_gone(web: Web, server: GCSServer) -> None:
    first = server.put("bucket", "x", b"one").generation
    second = server.put("bucket", "x", b"two").generation
    assert second > first
    live = await web(f"/storage/v1/b/bucket/o/x?alt=media&generation={second}")
    gone = await web(f"/storage/v1/b/bucket/o/x?alt=media&generation={first}")
    assert (live.status, live.body) == (200, b"two")
    assert (gone.status, gone.body) == (404, f"No such object: bucket/x#{first}".encode())


async def test_generation_conditions_decide_between_200_304_and_412(web: Web) -> None:
    right, wrong = "1700000000000001", "1700000000000002"
    assert (await web(f"{JSON}&ifGenerationMatch={right}")).status == 200
    assert (await web(f"{JSON}&ifGenerationMatch={wrong}")).status == 412
    assert (await web(f"{JSON}&ifGenerationMatch=0")).status == 412
    assert (await web(f"{JSON}&ifGenerationNotMatch={wrong}")).status == 200
    unchanged = await web(f"{JSON}&ifGenerationNotMatch={right}")
    assert (unchanged.status, unchanged.body) == (304, b"")
    assert (await web(XML, x_goog_if_generation_match=right)).status == 200
    assert (await web(XML, x_goog_if_generation_match=wrong)).status == 412
    assert (await web(f"{JSON}&ifMetagenerationMatch=1")).status == 200
    assert (await web(f"{JSON}&ifMetagenerationMatch=2")).status == 412


@pytest.mark.parametrize("condition", ["generation=x", "ifGenerationMatch=", "ifGenerationNotMatch=-1"])
async def test_a_generation_that_is_not_a_number_is_a_400(web: Web, condition: str) -> None:
    got = await web(f"/storage/v1/b/bucket/o/images%2F1.jpg?{condition}")
    assert (got.status, got.json["error"]["errors"][0]["reason"]) == (400, "invalidParameter")


async def test_etags_decide_as_generations_do(web: Web) -> None:
    for path in (JSON, XML):
        etag = (await web(path)).headers["ETag"]
        assert (await web(path, If_None_Match=etag)).status == 304
        assert (await web(path, If_None_Match='"other"')).status == 200
        assert (await web(path, If_Match=etag)).status == 200
        assert (await web(path, If_Match='"other"')).status == 412


async def test_a_gzip_object_is_sent_as_stored_to_clients_that_accept_gzip(web: Web, server: GCSServer) -> None:
    stored = gzip.compress(DATA)
    server.put("bucket", "z", stored, content_encoding="gzip")
    got = await web("/storage/v1/b/bucket/o/z?alt=media", Accept_Encoding="deflate, gzip;q=0.5")
    assert (got.body, got.headers["Content-Encoding"]) == (stored, "gzip")
    assert got.headers["Content-Length"] == got.headers["x-goog-stored-content-length"] == str(len(stored))


async def test_a_gzip_object_is_unpacked_for_other_clients_but_keeps_the_stored_hash(web: Web, server: GCSServer) -> None:
    """The trap of decompressive transcoding: no Content-Length, and a hash that is not that of the bytes."""
    stored = server.put("bucket", "z", gzip.compress(DATA), content_encoding="gzip")
    for accepted in ("", "identity", "gzip;q=0"):
        got = await web("/storage/v1/b/bucket/o/z?alt=media", Range="bytes=0-1", Accept_Encoding=accepted)
        assert (got.status, got.body) == (200, DATA)
        assert "Content-Length" not in got.headers
        assert "Content-Encoding" not in got.headers
        assert got.headers["x-goog-stored-content-encoding"] == "gzip"
        assert got.headers["x-goog-stored-content-length"] == str(stored.size_bytes)
        assert f"crc32c={stored.crc32c}" in got.headers["x-goog-hash"]


async def test_a_gzip_bomb_and_several_gzip_members_are_unpacked_completely(web: Web, server: GCSServer) -> None:
    server.put("bucket", "z", gzip.compress(b"\0" * 5_000_000) + gzip.compress(b"end"), content_encoding="gzip")
    got = await web("/storage/v1/b/bucket/o/z?alt=media")
    assert got.body == b"\0" * 5_000_000 + b"end"


async def test_the_response_breaks_off_if_an_object_labelled_gzip_is_not_gzip(web: Web, server: GCSServer) -> None:
    server.put("bucket", "z", b"not gzip at all", content_encoding="gzip")
    with pytest.raises(aiohttp.ClientPayloadError):
        await web("/storage/v1/b/bucket/o/z?alt=media")


async def test_no_transform_keeps_a_gzip_object_as_stored(web: Web, server: GCSServer) -> None:
    stored = gzip.compress(DATA)
    server.put("bucket", "z", stored, content_encoding="gzip", cache_control="no-transform")
    assert (await web("/storage/v1/b/bucket/o/z?alt=media")).body == stored


async def test_a_composite_object_has_a_crc32c_and_no_md5(web: Web, server: GCSServer) -> None:
    server.put("bucket", "c", DATA, composite=True)
    assert "md5" not in ",".join((await web("/bucket/c")).headers.getall("x-goog-hash"))
    described = (await web("/storage/v1/b/bucket/o/c")).json
    assert "md5Hash" not in described
    assert described["crc32c"]


async def test_metadata_describes_the_object_as_the_media_headers_do(web: Web) -> None:
    described = (await web("/storage/v1/b/bucket/o/images%2F1.jpg")).json
    got = await web(JSON)
    assert described["kind"] == "storage#object"
    assert described["name"] == "images/1.jpg"
    assert described["size"] == "1024"
    assert described["generation"] == got.headers["x-goog-generation"]
    assert described["etag"] == got.headers["ETag"]
    assert f"crc32c={described['crc32c']},md5={described['md5Hash']}" == got.headers["x-goog-hash"]


@pytest.mark.parametrize("path", [XML, DOWNLOAD])
async def test_head_returns_the_size_and_no_body(web: Web, path: str) -> None:
    got = await web(path, method="HEAD")
    assert (got.status, got.headers["Content-Length"], got.body) == (200, "1024", b"")


async def test_a_missing_object_is_a_404_in_the_words_of_each_dialect(web: Web) -> None:
    described = await web("/storage/v1/b/bucket/o/nope")
    media = await web("/download/storage/v1/b/bucket/o/nope?alt=media")
    xml = await web("/bucket/nope")
    assert (described.status, media.status, xml.status) == (404, 404, 404)
    assert described.json["error"]["message"] == "No such object: bucket/nope"
    assert described.json["error"]["errors"][0]["reason"] == "notFound"
    assert media.body == b"No such object: bucket/nope"
    assert b"<Code>NoSuchKey</Code>" in xml.body


@pytest.mark.parametrize("path", ["/storage/v1/b/nope", "/storage/v1/b/nope/o", "/storage/v1/b/nope/o/x"])
async def test_a_missing_bucket_is_a_404_with_the_message_of_gcs(web: Web, path: str) -> None:
    got = await web(path)
    assert (got.status, got.json["error"]["message"]) == (404, "The specified bucket does not exist.")


async def test_a_bucket_that_exists_is_described(web: Web) -> None:
    got = await web("/storage/v1/b/bucket?projection=noAcl")
    assert (got.status, got.json["kind"], got.json["name"]) == (200, "storage#bucket", "bucket")


@pytest.mark.parametrize("name", ["a/../b", "./x", "//", "a%2Fb", "a%252Fb", "%", "a?b#c", "é\U0001f600", "a b+c", "d/"])
async def test_names_are_percent_decoded_exactly_once(web: Web, server: GCSServer, name: str) -> None:
    server.put("bucket", name, name.encode())
    for path in ("/storage/v1/b/bucket/o/{}?alt=media", "/bucket/{}"):
        got = await web(path.format(quote(name, safe="")))
        assert (got.status, got.body) == (200, name.encode())


@pytest.mark.parametrize("quoted", ["a%ff", "a%zz", "a%", "a/b"])
async def test_an_invalid_json_path_names_nothing(web: Web, server: GCSServer, quoted: str) -> None:
    """Invalid UTF-8, a stray % or a plain slash must not become some other object's name."""
    for name in ("a%ff", "a%zz", "a%", "a/b", "a�", "aÿ"):
        server.put("bucket", name, b"wrong")
    assert (await web(f"/storage/v1/b/bucket/o/{quoted}?alt=media")).status == 404


async def test_a_listing_of_more_than_a_page_continues_with_its_token(web: Web, server: GCSServer) -> None:
    for number in range(2500):
        server.put("many", f"{number:05}", b"")
    names, sizes, token = [], [], ""
    while token is not None:
        page = (await web(f"/storage/v1/b/many/o?pageToken={token}")).json
        sizes.append(len(page["items"]))
        names += [item["name"] for item in page["items"]]
        token = page.get("nextPageToken")
    assert sizes == [1000, 1000, 500]
    assert names == [f"{number:05}" for number in range(2500)]


async def test_a_listing_is_bounded_by_prefix_delimiter_and_offsets(web: Web, server: GCSServer) -> None:
    for name in ("a/1", "a/2", "b/1", "c"):
        server.put("lists", name, b"")

    async def listed(query: str) -> tuple[list[str], list[str]]:
        page = (await web(f"/storage/v1/b/lists/o?{query}")).json
        return [item["name"] for item in page.get("items", [])], page.get("prefixes", [])

    assert await listed("prefix=a%2F") == (["a/1", "a/2"], [])
    assert await listed("delimiter=/") == (["c"], ["a/", "b/"])
    assert await listed("startOffset=a/2&endOffset=c") == (["a/2", "b/1"], [])
    assert await listed("prefix=zzz") == ([], [])


async def test_an_empty_listing_has_no_items_at_all(web: Web, server: GCSServer) -> None:
    server.create_bucket("empty")
    assert (await web("/storage/v1/b/empty/o")).json == {"kind": "storage#objects"}


@pytest.mark.parametrize("query", ["maxResults=x", "maxResults=-1", "pageToken=?"])
async def test_an_invalid_listing_request_is_refused(web: Web, query: str) -> None:
    assert (await web(f"/storage/v1/b/bucket/o?{query}")).status == 400


async def test_the_xml_listing_continues_with_its_token_too(web: Web, server: GCSServer) -> None:
    for name in ("a/1", "b&c", "d"):
        server.put("lists", name, b"12")
    first = await web("/lists?list-type=2&max-keys=2&delimiter=/")
    assert b"<Prefix>a/</Prefix>" in first.body
    assert b"<Key>b&amp;c</Key>" in first.body
    token = first.body.split(b"<NextContinuationToken>")[1].split(b"<")[0].decode()
    second = await web(f"/lists?list-type=2&max-keys=2&delimiter=/&continuation-token={token}")
    assert second.body.count(b"<Key>") == 1
    assert b"<Key>d</Key>" in second.body
    after = await web("/lists?list-type=2&start-after=b%26c")
    assert after.body.count(b"<Key>") == 1


async def test_a_simple_upload_can_be_read_back(web: Web, server: GCSServer) -> None:
    got = await web(
        "/upload/storage/v1/b/bucket/o?uploadType=media&name=new%2F1", method="POST", data=DATA, Content_Type="image/png"
    )
    assert (got.status, got.json["name"], got.json["contentType"]) == (200, "new/1", "image/png")
    assert (await web("/bucket/new/1")).body == DATA
    assert server.counts.upload["bucket/new/1"] == 1


async def test_a_resumable_upload_is_assembled_from_its_pieces(web: Web) -> None:
    started = await web("/upload/storage/v1/b/bucket/o?uploadType=resumable&name=big", method="POST", data=b"{}")
    path = started.headers["Location"].partition("://")[2].partition("/")[2]
    first = await web("/" + path, method="PUT", data=DATA[:600], Content_Range="bytes 0-599/*")
    queried = await web("/" + path, method="PUT", data=b"", Content_Range="bytes */1024")
    last = await web("/" + path, method="PUT", data=DATA[600:], Content_Range="bytes 600-1023/1024")
    assert (first.status, first.headers["Range"]) == (308, "bytes=0-599")
    assert (queried.status, queried.headers["Range"]) == (308, "bytes=0-599")
    assert (last.status, last.json["size"]) == (200, "1024")
    assert (await web("/bucket/big")).body == DATA
    assert (await web("/" + path, method="PUT", data=b"")).status == 404


async def test_an_upload_whose_hash_does_not_match_is_refused(web: Web) -> None:
    got = await web("/bucket/broken", method="PUT", data=DATA, x_goog_hash="crc32c=AAAAAA==")
    assert (got.status, (await web("/bucket/broken")).status) == (400, 404)


async def test_an_upload_may_name_the_generation_that_it_replaces(web: Web) -> None:
    path = "/upload/storage/v1/b/bucket/o?uploadType=media&name=once&ifGenerationMatch={}"
    first = await web(path.format(0), method="POST", data=b"1")
    assert first.status == 200
    assert (await web(path.format(0), method="POST", data=b"2")).status == 412
    assert (await web(path.format(first.json["generation"]), method="POST", data=b"3")).status == 200


@pytest.mark.parametrize("name", ["", ".", "..", "a%0Ab", "x" * 1025])
async def test_an_upload_under_a_name_that_gcs_does_not_allow_is_refused(web: Web, name: str) -> None:
    got = await web(f"/upload/storage/v1/b/bucket/o?uploadType=media&name={name}", method="POST", data=b"")
    assert got.status == 400


async def test_a_name_that_gcs_does_not_allow_cannot_be_put(server: GCSServer) -> None:
    with pytest.raises(InvalidNameError):
        server.put("bucket", "a\nb", b"")


async def test_a_deleted_object_is_gone(web: Web) -> None:
    path = "/storage/v1/b/bucket/o/images%2F1.jpg"
    assert (await web(path, method="DELETE")).status == 204
    assert (await web(path, method="DELETE")).status == 404
    assert (await web(path)).status == 404


async def test_a_required_token_is_a_401_without_it(web: Web, server: GCSServer) -> None:
    server.require_token("secret-token")
    anonymous = await web("/storage/v1/b/bucket/o")
    assert (anonymous.status, anonymous.json["error"]["errors"][0]["reason"]) == (401, "required")
    assert "Anonymous caller does not have storage.objects.list access" in anonymous.json["error"]["message"]
    wrong = await web(JSON, Authorization="Bearer other")
    assert (wrong.status, wrong.body) == (401, b"Invalid Credentials")
    assert (await web(JSON, Authorization="Bearer secret-token")).status == 200


async def test_a_token_may_be_required_of_one_bucket_only(web: Web, server: GCSServer) -> None:
    server.put("open", "x", b"")
    server.require_token("secret-token", bucket="bucket")
    assert (await web("/open/x")).status == 200
    assert (await web(XML)).status == 401


async def test_a_denied_bucket_is_a_403_until_it_is_allowed(web: Web, server: GCSServer) -> None:
    server.deny("bucket")
    got = await web(JSON)
    assert got.status == 403
    assert b"does not have storage.objects.get access" in got.body
    server.allow("bucket")
    assert (await web(JSON)).status == 200


async def test_a_requester_pays_bucket_demands_a_project(web: Web, server: GCSServer) -> None:
    server.requester_pays("bucket")
    got = await web("/storage/v1/b/bucket/o/images%2F1.jpg")
    assert (got.status, got.json["error"]["errors"][0]["reason"]) == (400, "required")
    assert got.json["error"]["message"] == "Bucket is a requester pays bucket but no user project provided."
    assert (await web(f"{JSON}&userProject=mine")).status == 200


async def test_the_token_endpoints_issue_the_required_token(web: Web, server: GCSServer) -> None:
    server.require_token("secret-token")
    expected = {"access_token": "secret-token", "expires_in": 3600, "token_type": "Bearer"}
    assert (await web("/token", method="POST", data=b"grant_type=x")).json == expected
    metadata = "/computeMetadata/v1/instance/service-accounts/default/token"
    assert (await web(metadata, Metadata_Flavor="Google")).json == expected
    assert (await web(metadata)).status == 403
    assert server.counts.token == {"/token": 1, metadata: 2}


async def test_requests_and_bytes_are_counted_by_kind_and_object(web: Web, server: GCSServer) -> None:
    await web(JSON)
    await web(XML, Range="bytes=0-9")
    await web("/storage/v1/b/bucket/o/images%2F1.jpg")
    await web("/storage/v1/b/bucket/o")
    await web("/storage/v1/b/bucket")
    await web("/bucket/nope")
    counts = server.counts
    assert counts.media == {"bucket/images/1.jpg": 2, "bucket/nope": 1}
    assert counts.metadata == {"bucket/images/1.jpg": 1}
    assert (counts.list, counts.bucket) == ({"bucket": 1}, {"bucket": 1})
    assert counts.bytes == {"bucket/images/1.jpg": 1034}
    assert (counts.total(), counts.total("media")) == (6, 3)
    assert (counts.open_media, counts.peak_open_media) == (0, 1)
    assert [seen.headers.get("Range") for seen in server.seen if seen.kind == "media"] == [None, "bytes=0-9", None]
    server.reset()
    assert (counts.total(), counts.total_bytes, len(server.seen)) == (0, 0, 0)


async def test_a_waiter_wakes_as_soon_as_its_condition_holds(web: Web, server: GCSServer) -> None:
    waiting = asyncio.create_task(server.wait_for(lambda counts: counts.media["bucket/images/1.jpg"] == 2))
    await web(JSON)
    assert not waiting.done()
    await web(JSON)
    await asyncio.wait_for(waiting, 5)


async def test_latency_passes_before_each_response(server: GCSServer) -> None:
    async with GCSServer(latency_s=0.05, latency_sigma=0.1) as slow, aiohttp.ClientSession() as session:
        started = asyncio.get_running_loop().time()
        await Web(slow, session)("/storage/v1/b")
        assert asyncio.get_running_loop().time() - started > 0.02


async def test_a_bounded_rate_spreads_a_body_over_time() -> None:
    async with GCSServer(bytes_per_s=2_000_000) as slow, aiohttp.ClientSession() as session:
        slow.put("bucket", "x", bytes(200_000))
        started = asyncio.get_running_loop().time()
        assert (await Web(slow, session)("/bucket/x")).body == bytes(200_000)
        assert asyncio.get_running_loop().time() - started > 0.09


async def test_control_over_http_counts_resets_and_adds_faults(web: Web, server: GCSServer) -> None:
    rule = {"fault": "Status", "status": 503, "retry_after": "2", "object": "bucket/*", "requests": [1]}
    assert (await web("/_faults", method="POST", data=json.dumps([rule]).encode())).status == 204
    failed = await web(JSON)
    assert (failed.status, failed.headers["Retry-After"], (await web(JSON)).status) == (503, "2", 200)
    counts = (await web("/_counts")).json
    assert (counts["requests"]["media"], counts["total"], counts["bytes"]) == (2, 2, 1024)
    assert counts["objects"]["media"] == {"bucket/images/1.jpg": 2}
    assert "objects" not in (await web("/_counts?objects=false")).json
    assert (await web("/_reset", method="POST")).status == 204
    assert (await web("/_counts")).json["total"] == 0
    refused = await web("/_faults", method="POST", data=b'{"fault": "Nonesuch"}')
    assert (refused.status, "Nonesuch" in refused.json["error"] or "one of" in refused.json["error"]) == (400, True)


def test_a_server_in_a_thread_has_the_same_methods() -> None:
    with serving(latency_s=0.001) as server:
        server.put("bucket", "x", b"1", content_type="text/plain")
        server.faults.add(Status(200, body="fault"), "bucket/x", requests=1)
        with urlopen(f"{server.url}/bucket/x") as first, urlopen(f"{server.url}/bucket/x") as second:
            assert (first.read(), second.read()) == (b"fault", b"1")
        server.wait_for(lambda counts: counts.total_bytes == 6)
        assert server.counts.media == {"bucket/x": 2}
        assert [seen.key for seen in server.seen] == ["bucket/x", "bucket/x"]
        assert server.names("bucket") == ["x"]
        assert server.delete("bucket", "x")
        with pytest.raises(TimeoutError):
            server.wait_for(lambda counts: counts.total() == 100, timeout_s=0.01)


def test_a_server_in_a_thread_that_cannot_start_raises_in_the_callers_thread(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nope"), serving(root=tmp_path / "nope"):
        pass
    with serving() as server, pytest.raises(StartError, match="Address already in use"), serving(port=server.port):
        pass


def test_a_server_in_a_thread_stops_at_once_whatever_is_stalled() -> None:
    with serving() as server:
        server.put("bucket", "x", DATA)
        server.faults.add(Stall(10))
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(b"GET /bucket/x HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for(lambda counts: counts.bytes["bucket/x"] == 10)
    with connection, connection.makefile("rb") as file:
        assert file.read().endswith(b"\r\n\r\n" + DATA[:10])
    with pytest.raises(RuntimeError):
        server.reset()
