"""Random and damaged input from outside: the result is a response or an error of our own, and everything continues.

Names, settings, messages, records and single pages are fuzzed in the tests of their modules; the tests here need a daemon, a
directory or a server.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.credentials import Access
from gcs_prefetchd.service.manifest_store import list_manifest, load_newest_manifest, remove_old_manifests
from gcs_prefetchd.shared.checked_read import ATTRIBUTE, read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.epoch_order import order_digest, plan_order
from gcs_prefetchd.shared.errors import DaemonUnavailableError, ManifestError, PrefetchdError, ProtocolError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, build_manifest, load_manifest
from gcs_prefetchd.shared.messages import PLAN_KINDS, Plan, pack_indices
from gcs_prefetchd.shared.objects import DataRoot, ObjectName
from gcs_prefetchd.shared.paths import cache_path
from gcs_prefetchd.testing import GCSServer, Kind, ServingGCS, Status, serving
from support.caches import IN_MEMORY, content, names_in, opened, path_of, put, stamp_of, version_of
from support.daemons import BUCKET, DATA_ROOT, jpeg, put_items
from support.faults import LINE, DaemonProcess, Tally, faulted_daemon

pytestmark = pytest.mark.xdist_group("fuzzing")  # in one process: they share a costly fixture

ITEMS = 4
RESPONSE_TIMEOUT_S = 10.0  # far more than any response needs; a hang never ends
STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})")
QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
THOROUGH = settings(settings.get_profile("torture"), suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- strategies


Edit = tuple[float, int, bytes]  # position, number of bytes, and their replacement
edits = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0, 1, 2, 8, 100, 4096, 10**6]), st.binary(max_size=16) | st.just(bytes(100))),
    min_size=1,
    max_size=4,
)


def edited(intact: bytes, changes: list[Edit]) -> bytes:
    """The bytes after overwriting, removing, inserting or truncating."""
    data = bytearray(intact)
    for position, length, replacement in changes:
        at = int(position * len(data))
        data[at : at + length] = replacement
    return bytes(data)


def damaged(intact: bytes) -> st.SearchStrategy[bytes]:
    """The bytes after random edits."""
    return edits.map(lambda changes: edited(intact, changes))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**64) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
uris = st.sampled_from([f"{DATA_ROOT}/images/00001.jpg", f"{DATA_ROOT}/none", "gs://other/x", "gs://", ""]) | st.text(
    max_size=30
).map(lambda name: f"{DATA_ROOT}/{name}")
numbers = st.integers(0, 3) | st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, -1, 0.5, float("inf")])
messages = st.fixed_dictionaries(
    {},
    optional={
        "objects": st.lists(uris, max_size=4) | json_values,
        "job": st.sampled_from(["job", ""]) | json_values,
        **dict.fromkeys(("hits", "misses", "fallbacks", "wait_s"), numbers | json_values),
        **dict.fromkeys(("concurrency", "min_concurrency", "max_requests_per_s", "max_bytes_per_s"), numbers | json_values),
    },
)
# Not /v1/stop, which would stop the daemon, nor /v1/lease, whose response ends only with the lease.
paths = st.sampled_from(
    [
        "/",
        "/stats",
        "/metrics",
        "/healthz",
        "/readyz",
        "/v1",
        "//",
        "*",
        "http://h/stats",
        "/../../etc/passwd",
        "/%2e%2e%2f",
        "/v1/status",
        "/v1/stats",
        "/v1/manifest",
        "/v1/fetch",
        "/v1/plan",
        "/v1/reads",
        "/v1/objects",
        "/v1/settings",
    ]
)
methods = st.sampled_from(["GET", "POST", "PATCH", "HEAD", "PUT", "OPTIONS", "DELETE", "CONNECT", "TRACE", "get", "X"])
printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30)
queries = st.just("") | st.builds("?{}={}".format, st.sampled_from(["data_root", "prefix", "job"]), printable)
fields = st.sampled_from(
    ["Host", "Origin", "Accept", "Range", "Expect", "Content-Type", "Content-Encoding", "Upgrade", "Cookie"]
)


@st.composite
def complete_requests(draw: st.DrawFn) -> bytes:
    """A complete request, valid or not, to which the server must respond."""
    body = draw(messages.map(json.dumps).map(str.encode) | json_values.map(json.dumps).map(str.encode) | st.binary(max_size=60))
    head = [f"{draw(methods)} {draw(paths)}{draw(queries)} HTTP/1.1", "Connection: close", f"Content-Length: {len(body)}"]
    head += [f"{draw(fields)}: {draw(printable)}" for _ in range(draw(st.integers(0, 3)))]
    return "\r\n".join([*head, "Host: localhost", "", ""]).encode() + body


REQUEST = b"POST /v1/reads HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[ServingGCS]:
    with serving() as server:
        put_items(server, ITEMS)
        yield server


@pytest.fixture(scope="module")
def daemon(server: ServingGCS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all requests, none of which may harm it."""
    with faulted_daemon(tmp_path_factory.mktemp("fuzzed") / "cache", server.url, ["--set", "deadline_s=1"]) as daemon:
        yield daemon
        assert daemon.process.poll() is None
        assert daemon.read(f"{DATA_ROOT}/images/00001.jpg") == jpeg(1)
        assert [line for line in daemon.lines() if not LINE.fullmatch(line) or " ERROR " in line] == []


def send(daemon: DaemonProcess, listener: str, sent: bytes, *, at_end: bool) -> list[int]:
    """Send bytes to one of the daemon's servers. Returns the statuses of its responses until it closes the connection."""
    host, port = daemon.http.removeprefix("http://").split(":")
    kind, address = (
        (socket.AF_INET, (host, int(port))) if listener == "tcp" else (socket.AF_UNIX, str(daemon.cache_dir / "daemon.sock"))
    )
    response = b""
    with socket.socket(kind) as connection, contextlib.suppress(ConnectionError):
        connection.settimeout(RESPONSE_TIMEOUT_S)
        connection.connect(address)
        connection.sendall(sent)
        if at_end:
            connection.shutdown(socket.SHUT_WR)
        while received := connection.recv(65536):
            response += received
    return [int(status) for status in STATUS_LINE.findall(response)]


def check_complete_request(daemon: DaemonProcess, listener: str, request: bytes) -> None:
    statuses = send(daemon, listener, request, at_end=False)
    assert statuses
    assert max(statuses) < 500
    assert daemon.stats()


def check_broken_request(daemon: DaemonProcess, listener: str, sent: bytes) -> None:
    assert max(send(daemon, listener, sent, at_end=True), default=0) < 500
    assert daemon.stats()


listeners = st.sampled_from(["tcp", "socket"])


@QUICK
@given(listeners, complete_requests())
def test_every_request_gets_a_response_below_500(daemon: DaemonProcess, listener: str, request: bytes) -> None:
    check_complete_request(daemon, listener, request)


@QUICK
@given(listeners, st.binary(max_size=200) | damaged(REQUEST) | complete_requests().flatmap(damaged))
@example("tcp", b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n")
@example("socket", b"POST /v1/plan HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nzz\r\n")
@example("tcp", b"GET /" + b"a" * 100_000)
def test_bytes_that_are_not_a_request_do_not_disturb_a_server(daemon: DaemonProcess, listener: str, sent: bytes) -> None:
    check_broken_request(daemon, listener, sent)


@pytest.mark.torture
def test_thousands_of_invalid_requests_do_not_disturb_a_server(daemon: DaemonProcess, tally: Tally) -> None:
    @THOROUGH
    @given(listeners, complete_requests())
    def complete(listener: str, request: bytes) -> None:
        tally.repetitions += 1
        check_complete_request(daemon, listener, request)

    @THOROUGH
    @given(listeners, st.binary(max_size=200) | damaged(REQUEST) | complete_requests().flatmap(damaged))
    def broken(listener: str, sent: bytes) -> None:
        tally.repetitions += 1
        check_broken_request(daemon, listener, sent)

    complete()
    broken()


field_numbers = st.integers(0, 5) | st.sampled_from([2**31 - 1, 2**32, 2**62, 2**63 - 1])


@QUICK
@given(st.data())
def test_a_plan_with_any_numbers_is_accepted_or_refused_by_its_field(daemon: DaemonProcess, data: st.DataObject) -> None:
    manifest = load_manifest(Path(daemon.client.manifest(DATA_ROOT).path))
    kind, stream = data.draw(st.sampled_from(PLAN_KINDS)), data.draw(st.sampled_from(["one", "other", ""]))
    seed, epoch, start, position = data.draw(st.tuples(*[field_numbers] * 4))
    world = data.draw(field_numbers.filter(bool))
    rank, drop_last = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, 1))
    is_valid: bool = data.draw(st.booleans())
    indices: list[int] = data.draw(st.lists(st.integers(0, ITEMS) | st.integers(0, 2**32 - 1), max_size=8))
    digest = "0" * 16
    if indices and is_valid:
        items = np.array(indices, dtype=np.uint32)
        own = plan_order(kind, seed, epoch, items, rank=rank, world=world, drop_last=bool(drop_last), start=start)
        digest = order_digest(own)
    plan = Plan(
        job="job", stream=stream, data_root=DATA_ROOT, manifest=manifest.digest, kind=kind, seed=seed, epoch=epoch,
        position=position, rank=rank, world=world, drop_last=drop_last, start=start, digest=digest,
    )  # fmt: skip
    try:
        daemon.client.send_plan(plan, pack_indices(indices))
    except ProtocolError as exc:
        assert str(exc).startswith("Plan: field '")  # noqa: PT017  # some plans are good
    assert daemon.stats()


# --- damaged files


@QUICK
@example(b"[" * 100_000)
@given(st.binary(max_size=200) | damaged(b'{"socket": "/x/daemon.sock", "pid": 1}'))
def test_with_any_content_of_the_daemon_file_readers_continue_without_a_daemon(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "daemon.json").write_bytes(data)
    client = DaemonClient(tmp_path)
    with pytest.raises(DaemonUnavailableError), contextlib.closing(client):
        client.status()


@pytest.fixture(scope="module")
def in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def left_cache(in_memory: Path) -> Path:
    """A cache directory as a stopped daemon leaves it."""
    path = in_memory / "cache"

    async def fill() -> None:
        async with opened(path) as cache:
            for number in range(5):
                await put(cache, f"{number}", content(number, 100 + number))

    asyncio.run(fill())
    return path


async def check_with_index(left_cache: Path, changes: list[Edit]) -> None:
    copy = left_cache.with_name("copy")
    shutil.copytree(left_cache, copy)
    try:
        index = copy / "index/cache.db"
        index.write_bytes(edited(index.read_bytes(), changes))
        async with opened(copy) as cache:
            for number in range(5):
                assert read_checked(cache.directory.objects, path_of(f"{number}")) == content(number, 100 + number)
            await cache.rescan()
            assert await cache.check() == []
            assert {name.name for name in names_in(cache)} == {f"{number}" for number in range(5)}
            await put(cache, "new", b"new")
    finally:
        shutil.rmtree(copy)


@QUICK
@given(edits)
def test_a_damaged_index_loses_no_object_and_returns_no_wrong_byte(left_cache: Path, changes: list[Edit]) -> None:
    asyncio.run(check_with_index(left_cache, changes))


@pytest.mark.torture
def test_an_index_damaged_anywhere_loses_no_object_and_returns_no_wrong_byte(left_cache: Path, tally: Tally) -> None:
    @settings(THOROUGH, max_examples=400)
    @given(edits)
    def check(changes: list[Edit]) -> None:
        tally.repetitions += 1
        asyncio.run(check_with_index(left_cache, changes))

    check()


STAMP = stamp_of(b"intact").to_bytes() + b" 00000000"


@QUICK
@given(st.binary(max_size=100) | damaged(STAMP))
def test_with_any_stamp_a_file_is_read_correctly_or_not_at_all(left_cache: Path, value: bytes) -> None:
    async def check(copy: Path) -> None:
        os.setxattr(copy / "objects" / path_of("1"), ATTRIBUTE, value)
        async with opened(copy) as cache:
            assert read_checked(cache.directory.objects, path_of("1")) in (None, content(1, 101))
            await cache.rescan()
            assert not await cache.verify(path_of("1"))
            assert await cache.check() == []
            assert read_checked(cache.directory.objects, path_of("2")) == content(2, 102)

    copy = left_cache.with_name("copy")
    shutil.copytree(left_cache, copy)
    try:
        asyncio.run(check(copy))
    finally:
        shutil.rmtree(copy)


ROOT = DataRoot.parse(DATA_ROOT)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    parts = [f"train/{part}" for item in "abc" for part in (f"images/{item}.jpg", f"labels/{item}.png")]
    return build_manifest(ROOT, ItemPatterns(), [version_of(name, name.encode()) for name in parts])


FILES = ["ids.npy", "ends.npy", "generation.npy", "size.npy", "crc32c.npy", "manifest.json"]


@settings(QUICK, max_examples=200)
@given(st.sampled_from(FILES), st.data())
def test_a_damaged_manifest_is_named_or_unchanged(tmp_path: Path, manifest: Manifest, file: str, data: st.DataObject) -> None:
    folder = manifest.save(tmp_path)
    (folder / file).write_bytes(data.draw(damaged((folder / file).read_bytes())))
    try:
        loaded = load_manifest(folder)
    except ManifestError as exc:
        assert str(folder) in str(exc)  # noqa: PT017  # some damage has no effect
        assert load_newest_manifest(tmp_path, ROOT, ItemPatterns()) is None
    else:
        assert [loaded.versions(item) for item in range(3)] == [manifest.versions(item) for item in range(3)]
    remove_old_manifests(tmp_path, ROOT)
    shutil.rmtree(folder, ignore_errors=True)


# --- responses of GCS


def page_of(*names: str) -> bytes:
    items = [{"name": name, "generation": "17", "size": "5", "crc32c": "AAAAAA=="} for name in names]
    return json.dumps({"kind": "storage#objects", "items": items}).encode()


PAGE = page_of("train/images/a.jpg", "train/labels/a.png")
pages = st.one_of(
    damaged(PAGE).map(lambda page: page.decode(errors="replace")),
    json_values.map(json.dumps),
    st.builds(lambda value: json.dumps({"items": value}), json_values),
    st.builds(lambda name: page_of(f"train/images/{name}.jpg", f"train/labels/{name}.png").decode(), st.text(max_size=9)),
    st.builds(lambda token, page: page.decode()[:-1] + f', "nextPageToken": {json.dumps(token)}}}', json_values, st.just(PAGE)),
)


@QUICK
@given(pages)
@example("[" * 100_000)
@example('{"items": ' + "[" * 100_000)
def test_any_page_is_listed_or_an_error_names_the_data_root(page: str) -> None:
    async def check() -> None:
        async with GCSServer() as gcs, GCSClient(Access(gcs.url, anonymous=True), deadline_s=0.05) as client:
            gcs.create_bucket(BUCKET)
            gcs.faults.add(Status(200, body=page, content_type="application/json"), kind=Kind.LIST)
            try:
                manifest = await list_manifest(client, ROOT, ItemPatterns())
            except PrefetchdError as exc:
                assert DATA_ROOT in str(exc)  # noqa: PT017  # some pages are good
                assert len(str(exc)) < 1500  # noqa: PT017
            else:
                for version in (version for item in range(len(manifest)) for version in manifest.versions(item)):
                    assert cache_path(BUCKET, version.name.name)

    asyncio.run(check())


@QUICK
@given(
    st.binary(max_size=100) | json_values.map(json.dumps).map(str.encode) | damaged(PAGE),
    st.sampled_from([200, 201, 206, 301, 308, 400, 404, 500]),
)
@example(b"[" * 100_000, 200)
@example(b'{"error": ' + b"[" * 100_000, 400)
def test_any_response_to_a_read_is_the_object_or_an_error_that_names_it(body: bytes, status: int) -> None:
    name = ObjectName(BUCKET, "train/x")
    fault = Status(status, body=body.decode(errors="replace"), content_type="application/json")

    async def check() -> None:
        async with GCSServer() as gcs, GCSClient(Access(gcs.url, anonymous=True), deadline_s=0.05) as client:
            gcs.put(BUCKET, name.name, b"right")
            for kind in (Kind.MEDIA, Kind.METADATA):
                gcs.faults.add(fault, kind=kind)
            with pytest.raises(PrefetchdError, match=re.escape(name.uri)) as caught:
                await client.read(name)
            assert len(str(caught.value)) < 1500
            gcs.faults.clear()
            async with GCSClient(Access(gcs.url, anonymous=True), deadline_s=10.0) as patient:
                assert (await patient.read(name))[1] == b"right"

    asyncio.run(check())
