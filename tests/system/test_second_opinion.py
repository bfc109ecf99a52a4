"""The daemon against PyPI's `gcp-storage-emulator`, so that our idea of GCS is not only our own.

It knows no generations (`generation=` is ignored and no response names one) and no pages, and is filled by Google's own client.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.service.daemon import Daemon
from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.errors import ObjectMissingError
from gcs_prefetchd.shared.objects import ObjectName, parse_object_uri
from gcs_prefetchd.shared.paths import cache_path
from support.daemons import BUCKET, DATA_ROOT, daemon_process, jpeg, make_settings, put_items, running

ITEMS = 40


class _Server(ThreadingHTTPServer):
    """The emulator's own server serves one connection at a time, and resets what its queue of five cannot hold."""

    request_queue_size = 256
    daemon_threads = True


class _KeepAlive(RequestHandler):  # type: ignore[misc]  # the emulator has no types
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are sent separately: 40 ms a response with it


class Emulator:
    """The emulator, and Google's client to fill it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": url})  # type: ignore[no-untyped-call]
        self._bucket = self._client.create_bucket(BUCKET)

    def put(self, bucket: str, name: str, data: bytes) -> None:
        assert bucket == BUCKET
        self._bucket.blob(name).upload_from_string(data)

    def delete(self, name: str) -> None:
        self._bucket.blob(name).delete()

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with _Server(("127.0.0.1", 0), partial(_KeepAlive, Storage(use_memory_fs=True))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with closing(Emulator(f"http://127.0.0.1:{server.server_port}")) as opened:
            yield opened
        server.shutdown()
        thread.join()


@pytest.fixture
def objects(emulator: Emulator) -> dict[str, bytes]:
    return put_items(emulator, ITEMS)


@pytest.fixture
async def daemon(emulator: Emulator, objects: dict[str, bytes], tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(make_settings(tmp_path / "cache", emulator.url)) as started:
        yield started


def file_of(daemon: Daemon, uri: str) -> Path:
    name = parse_object_uri(uri)
    return daemon.directory.objects / cache_path(name.bucket, name.name)


async def test_a_data_root_is_listed_and_prefetched_with_the_bytes_that_were_uploaded(
    daemon: Daemon, objects: dict[str, bytes]
) -> None:
    manifest = daemon.registry.catalog.newest_manifest(DATA_ROOT)
    assert manifest is not None
    assert list(manifest.ids) == [f"{i:05}" for i in range(ITEMS)]
    await daemon.prefetcher.settled()
    assert {uri: read_checked(daemon.directory.objects, uri.removeprefix("gs://")) for uri in objects} == objects


async def test_a_demanded_object_has_the_bytes_that_were_uploaded(
    daemon: Daemon, emulator: Emulator, objects: dict[str, bytes]
) -> None:
    """One was prefetched and deleted by hand, one was uploaded after the listing: no response names its generation."""
    await daemon.prefetcher.settled()
    listed, new = f"{DATA_ROOT}/images/00003.jpg", f"{DATA_ROOT}/images/new.jpg"
    file_of(daemon, listed).unlink()
    await asyncio.to_thread(emulator.put, BUCKET, "train/images/new.jpg", jpeg(999))
    with closing(DaemonClient(daemon.directory.path)) as client:
        assert await asyncio.to_thread(client.fetch, [listed, new]) == ["", ""]
    assert read_checked(daemon.directory.objects, listed.removeprefix("gs://")) == objects[listed]
    assert read_checked(daemon.directory.objects, new.removeprefix("gs://")) == jpeg(999)


async def test_a_demand_for_an_object_that_does_not_exist_reports_a_404(daemon: Daemon) -> None:
    uri = f"{DATA_ROOT}/images/missing.jpg"
    with closing(DaemonClient(daemon.directory.path)) as client:
        (error,) = await asyncio.to_thread(client.fetch, [uri])
    assert uri in error
    assert "404" in error


@pytest.mark.parametrize("name", ["a b.jpg", "a#b?c=d&e.jpg", "100%.jpg", "straße/猫.jpg", "a//b.jpg"])
async def test_an_object_of_any_name_is_listed_and_read(emulator: Emulator, name: str) -> None:
    await asyncio.to_thread(emulator.put, BUCKET, name, name.encode())
    async with GCSClient(Access(emulator.url, anonymous=True), deadline_s=10.0) as origin:
        (version,) = [version async for page in origin.list(BUCKET, name[:1]) for version in page.versions(BUCKET)]
        assert version.name == ObjectName(BUCKET, name)
        assert (await origin.read(version.name, version))[1] == name.encode()
        assert (await origin.read(version.name)) == (version, name.encode())


async def test_a_missing_bucket_is_final(emulator: Emulator) -> None:
    async with GCSClient(Access(emulator.url, anonymous=True)) as origin:
        with pytest.raises(ObjectMissingError, match="list gs://no-such-bucket/"):
            [page async for page in origin.list("no-such-bucket", "")]


def test_the_command_line_serves_a_bucket_of_the_emulator(
    emulator: Emulator, objects: dict[str, bytes], tmp_path: Path
) -> None:
    with daemon_process(tmp_path / "cache", emulator.url) as client:
        assert client.fetch(list(objects)) == [""] * len(objects)
        assert sorted(client.cached_objects()) == sorted(objects)
        cached = tmp_path / "cache" / "objects" / BUCKET / "train" / "images" / "00000.jpg"
        assert cached.read_bytes() == objects[f"{DATA_ROOT}/images/00000.jpg"]
