"""Shared by the tests of gcs_dataset: a bucket of small pairs, cache files without a daemon, a daemon that records requests."""

import io
import json
import logging
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from gcs_prefetchd.shared.checked_read import Stamp, crc32c_of, write_stamp
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, build_manifest
from gcs_prefetchd.shared.messages import FetchRequest, Plan, ReadReport, Status
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion, parse_object_uri
from gcs_prefetchd.shared.paths import cache_path
from gcs_prefetchd.testing import ServingGCS, serving

ROOT = "gs://pictures/set"
SIZE = 16  # pixels a side


def image_bytes(number: int) -> bytes:
    """A JPEG whose pixels hold its number."""
    pixels = np.full((SIZE, SIZE, 3), number % 250, dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def label_bytes(number: int) -> bytes:
    """A PNG of class indices (mode P), all of them `number % 7`."""
    label = Image.new("P", (SIZE, SIZE), number % 7)
    label.putpalette([value for index in range(256) for value in (index, 2 * index % 256, 255 - index)])
    return encoded(label, "PNG")


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def item_ids(count: int) -> list[str]:
    return [f"{number:04d}" for number in range(count)]


def pair_of(number: int) -> dict[str, bytes]:
    """The objects of one item, by name below the data root."""
    return {f"images/{number:04d}.jpg": image_bytes(number), f"labels/{number:04d}.png": label_bytes(number)}


def fill(server: ServingGCS, count: int, bucket: str = "pictures", prefix: str = "set/") -> list[str]:
    """Put `count` items into the bucket; returns their ids."""
    for number in range(count):
        for name, data in pair_of(number).items():
            server.put(bucket, prefix + name, data)
    return item_ids(count)


def manifest_of(count: int, generation: int = 1) -> Manifest:
    """The manifest of `count` items, as `cache_file` writes their objects if `generation` is 1."""
    versions = [
        ObjectVersion(ObjectName("pictures", f"set/{name}"), generation, len(data), crc32c_of(data))
        for number in range(count)
        for name, data in pair_of(number).items()
    ]
    return build_manifest(DataRoot.parse(ROOT), ItemPatterns(), versions)


def write_local(folder: Path, count: int) -> list[str]:
    """The same items in a local folder."""
    for number in range(count):
        for name, data in pair_of(number).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return item_ids(count)


def cache_file(cache_dir: Path, uri: str, data: bytes, generation: int = 1) -> Path:
    """Put an object into a cache directory as the daemon does."""
    name = parse_object_uri(uri)
    where = cache_path(name.bucket, name.name)
    path = cache_dir / "objects" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        write_stamp(file.fileno(), Stamp(generation, len(data), crc32c_of(data)), where)
    return path


def number_of(image: Image.Image) -> int:
    """The number of an image of `image_bytes`; JPEG keeps a flat grey to within 1."""
    return round(float(np.asarray(image).mean()))


@contextmanager
def gcs(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[ServingGCS]:
    """A GCS-speaking server, with its URL in the environment's STORAGE_EMULATOR_HOST."""
    with serving(**settings) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def read_all(loader: DataLoader[Any]) -> list[Any]:
    """Every batch; stops the workers at once if one raises.

    The garbage collector, for which they are in a cycle with the error's traceback, would need 5 s for each.
    """
    iterator: Any = iter(loader)
    try:
        return list(iterator)
    finally:
        iterator._shutdown_workers()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class RecordingDaemon:
    """A fake daemon on a Unix socket, which fetches from a dict of objects and records its requests."""

    def __init__(self, cache_dir: Path, instance_id: str = "first") -> None:
        self.cache_dir = cache_dir
        self.objects: dict[str, bytes] = {}
        self.fetches: list[list[str]] = []
        self.reports: list[ReadReport] = []
        self.plans: list[tuple[Plan, bytes]] = []
        self.leases: list[str] = []  # the jobs that acquired one
        self.streams: set[str] = set()  # those that it knows; a test may remove one
        self.refuses: dict[str, tuple[int, str]] = {}  # by path: the status and text of the response
        self.loses: set[str] = set()  # paths whose responses never arrive
        self.manifest_folder: Path | None = None
        self.refused = 0
        self._changed = threading.Condition()
        self._responding = threading.Event()
        self._responding.set()
        # A Unix socket's path may have 107 bytes, and pytest's folders are longer.
        self._folder = tempfile.TemporaryDirectory()
        socket_path = f"{self._folder.name}/s"
        self._server = _Server(socket_path, self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        cache_dir.mkdir(parents=True, exist_ok=True)
        (cache_dir / "daemon.json").write_text(json.dumps({"socket": socket_path, "instance_id": instance_id}))

    def stop(self) -> None:
        """Stop like a killed daemon: daemon.json stays."""
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()

    def __enter__(self) -> "RecordingDaemon":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait_for(self, condition: Callable[["RecordingDaemon"], bool], timeout_s: float = 20.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), timeout_s), "the daemon did not get the request in time"

    def reads(self) -> tuple[int, int, int]:
        """Hits, misses and fallbacks reported so far."""
        return (
            sum(report.hits for report in self.reports),
            sum(report.misses for report in self.reports),
            sum(report.fallbacks for report in self.reports),
        )

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Send no response meanwhile."""
        self._responding.clear()
        try:
            yield
        finally:
            self._responding.set()

    def respond(self, path: str, body: bytes) -> tuple[int, str]:
        self._responding.wait()
        with self._changed:
            self._changed.notify_all()
            if path in self.refuses:
                self.refused += 1
                return self.refuses[path]
            if path == "/v1/fetch":
                return 200, json.dumps({"errors": self._fetch(FetchRequest.from_json(body).objects)})
            if path == "/v1/reads":
                self.reports.append(ReadReport.from_json(body))
            if path == "/v1/plan":
                self.plans.append(Plan.from_body(body))
                self.streams.add(self.plans[-1][0].stream)
            if path.startswith("/v1/lease"):
                self.leases.append(path.partition("job=")[2])
            if path == "/v1/status":
                return 200, Status(1, "recording", "0", [ROOT], sorted(self.streams)).to_json()
            if path.startswith("/v1/manifest") and self.manifest_folder is not None:
                return 200, json.dumps({"digest": self.manifest_folder.name, "path": str(self.manifest_folder), "items": 0})
            return 200, "{}"

    def _fetch(self, uris: list[str]) -> list[str]:
        self.fetches.append(uris)
        for uri in uris:
            if uri in self.objects:
                cache_file(self.cache_dir, uri, self.objects[uri])
        return ["" if uri in self.objects else "not found" for uri in uris]


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, recorder: RecordingDaemon) -> None:
        super().__init__(path, _Handler)
        self.recorder = recorder
        self._connections: list[Any] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is not an error."""

    def close_connections(self) -> None:
        for connection in self._connections:
            with suppress(OSError):  # its client has closed it already
                connection.shutdown(2)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, text = self.server.recorder.respond(self.path, body)
        if self.path in self.server.recorder.loses:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        with suppress(OSError):  # the client may have hung up
            self.end_headers()
            self.wfile.write(text.encode())

    do_GET = do_POST = _respond  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        pass
