"""What a hostile process on the node can do to the daemon: any user over TCP, the daemon's group over the socket."""

import contextlib
import json
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gcs_prefetchd.service.listeners import STATISTICS_LIMITS
from gcs_prefetchd.shared.daemon_client import short_address
from gcs_prefetchd.testing import Fault, HtmlPage, Kind, ServingGCS, Status, serving
from support.caches import run_script
from support.daemons import BUCKET, DATA_ROOT, put_items
from support.faults import DATA, DaemonProcess, cached_items, faulted_daemon, promises

pytestmark = pytest.mark.xdist_group("attack_surface")  # in one process: they share a costly fixture

DEADLINE_S = 15.0
OVER = ("TCP", "the socket")


@pytest.fixture(scope="module")
def server(server: ServingGCS) -> ServingGCS:
    """A server that also has objects outside every data root."""
    server.put(BUCKET, "private/key", b"not for the cache")
    server.put("another-bucket", "train/images/1.jpg", b"not for the cache")
    return server


@pytest.fixture(scope="module")
def daemon(server: ServingGCS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with all items in its cache."""
    with faulted_daemon(tmp_path_factory.mktemp("surface") / "cache", server.url) as daemon:
        cached_items(daemon)
        yield daemon


@contextmanager
def connected(daemon: DaemonProcess, over: str = "TCP") -> Iterator[socket.socket]:
    """A connection that sends raw bytes."""
    if over == "TCP":
        host, port = daemon.http.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), DEADLINE_S)
    else:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(DEADLINE_S)
        with short_address(daemon.cache_dir / "daemon.sock") as address:
            connection.connect(address)
    with connection:
        yield connection


def receive_all(connection: socket.socket) -> bytes:
    """Everything that arrives until the daemon closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while some := connection.recv(65_536):
            received += some
    return received


def exchange(daemon: DaemonProcess, request: bytes, over: str = "TCP") -> tuple[int, bytes]:
    """Send these bytes. Return the status and the complete response; the daemon closes the connection."""
    with connected(daemon, over) as connection:
        with contextlib.suppress(ConnectionError):  # the daemon has refused the rest
            connection.sendall(request)
        response = receive_all(connection)
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", response)
    assert found, response
    return int(found[1]), response


def get(target: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    """A request as raw bytes."""
    lines = [f"{method} {target} HTTP/1.1", *(headers or ("Host: localhost",)), "Connection: close"]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


# Which clients are served


@pytest.mark.parametrize(
    "headers",
    [
        ["Host: evil.example"],
        ["Host: localhost.evil.example"],
        ["Host: 127.0.0.1.evil.example"],
        ["Host: evil.example@127.0.0.1"],
        ["Host: "],
        ["Host: localhost", "Origin: http://localhost"],
        ["Host: localhost", "Origin: null"],
        ["Host: localhost", "Host: evil.example"],
        ["Accept: */*"],
    ],
    ids=", ".join,
)
def test_a_request_of_a_web_page_is_refused_for_every_path(daemon: DaemonProcess, headers: list[str]) -> None:
    for target in ("/", "/stats", "/metrics", "/healthz", "/nothing"):
        status, response = exchange(daemon, get(target, *headers))
        assert status in (400, 403)
        assert BUCKET.encode() not in response
    assert exchange(daemon, get("http://evil.example/stats", "Host: localhost"))[0] == 403


@pytest.mark.parametrize(
    ("target", "status"), [("/", 200), ("/stats", 200), ("/nothing", 404), ("/stats", 403), ("/stats", 405)]
)
def test_every_response_forbids_browsers_to_store_or_frame_it(daemon: DaemonProcess, target: str, status: int) -> None:
    headers = ["Host: evil.example"] if status == 403 else ["Host: localhost"]
    found, response = exchange(daemon, get(target, *headers, method="POST" if status == 405 else "GET"))
    assert found == status
    assert {b"Cache-Control: no-store", b"X-Content-Type-Options: nosniff", b"X-Frame-Options: DENY"} <= set(
        response.split(b"\r\n")
    )


# Requests that are too large or not valid HTTP


INVALID_REQUESTS = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"x%d: 1\r\n" % i for i in range(5000)) + b"\r\n",
    "a header without end": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000,
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a negative length": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    "a huge chunk": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    "an invalid chunk": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a later invalid chunk": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\nzz\r\n",
    "NUL in the path": b"GET /stats\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a folded header": b"GET /stats HTTP/1.1\r\nHost: localhost\r\nX: 1\r\n 2\r\n\r\n",
}


@pytest.mark.parametrize("over", OVER)
def test_invalid_requests_are_refused_in_little_memory_and_without_a_log_line(
    daemon: DaemonProcess, good: str, over: str
) -> None:
    before, memory_bytes = len(daemon.lines()), daemon.stats()["process"]["memory_bytes"]
    with promises(daemon, good, DATA):
        statuses = {name: exchange(daemon, request, over)[0] for name, request in INVALID_REQUESTS.items()}
        assert {name: status for name, status in statuses.items() if not 400 <= status < 500} == {}
        assert daemon.stats()["process"]["memory_bytes"] - memory_bytes < 20_000_000
    assert daemon.lines()[before:] == []


def test_a_body_that_is_too_large_is_refused(daemon: DaemonProcess, good: str) -> None:
    huge = b"POST /v1/fetch HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 999999999999\r\n\r\n"
    with promises(daemon, good, DATA):
        assert exchange(daemon, get("/stats", body=b"x" * 2_000_000))[0] == 200  # the body of a GET is not read
        assert exchange(daemon, huge + b"x" * 1000, "the socket")[0] == 413


# Slow, idle and too many connections


def test_connections_without_a_request_are_closed_after_five_seconds(daemon: DaemonProcess, good: str) -> None:
    """Over TCP: no byte, half a request, half of a second one, and a request byte by byte. Over the socket: half a body."""
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    body = b"POST /v1/fetch HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n{"
    with promises(daemon, good, DATA), ExitStack() as stack:
        started_s = time.monotonic()
        idle = []
        for sent in (b"", request[:30], request, request + request[:30]):
            idle.append(stack.enter_context(connected(daemon)))
            idle[-1].sendall(sent)
        dripping = stack.enter_context(connected(daemon))
        without_body = stack.enter_context(connected(daemon, "the socket"))
        without_body.sendall(body)
        dripping.settimeout(0.2)
        assert drip(dripping, request[:30] + b"X" * 1000) < 1000
        assert [receive_all(connection).count(b"HTTP/1.1 200") for connection in idle] == [0, 0, 1, 1]
        assert b" 408 " in receive_all(without_body)
        assert STATISTICS_LIMITS.idle_s - 1 < time.monotonic() - started_s < DEADLINE_S


def drip(connection: socket.socket, data: bytes) -> int:
    """Send a byte every 0.2 s until the daemon closes the connection. Return how many were sent."""
    for sent in range(len(data)):
        try:
            connection.send(data[sent : sent + 1])
            if not connection.recv(1000):
                return sent
        except TimeoutError:
            continue
        except ConnectionError:
            return sent
    return len(data)


def test_a_client_with_many_connections_does_not_block_the_statistics(daemon: DaemonProcess, good: str) -> None:
    before = daemon.stats()["process"]["open_files"]
    with promises(daemon, good, DATA), ExitStack() as stack:
        many = [stack.enter_context(connected(daemon)) for _ in range(3 * STATISTICS_LIMITS.connections)]
        for connection in many[::2]:
            connection.sendall(b"GET /stats HTTP/1.1\r\n")
        assert daemon.stats()["process"]["open_files"] <= before + STATISTICS_LIMITS.connections + 8
        assert all(
            receive_all(connection) == b"" for connection in many[: STATISTICS_LIMITS.connections]
        )  # the oldest were closed


def test_waiting_readers_keep_their_connections_if_others_open_too_many(server: ServingGCS, tmp_path: Path, good: str) -> None:
    """Of 256 descriptors, half are for readers."""
    with (
        faulted_daemon(tmp_path / "cache", server.url, under=["prlimit", "--nofile=256"]) as daemon,
        promises(daemon, good, DATA),
        ExitStack() as stack,
    ):
        lease = daemon.client.lease("a job")
        stack.callback(lease.close)
        assert daemon.client.status().pid == daemon.pid
        for _ in range(300):
            stack.enter_context(connected(daemon, "the socket"))
        assert daemon.stats()["process"]["open_files"] < 256
        assert daemon.client.status().pid == daemon.pid
        assert lease.is_held


# Paths and names


@pytest.mark.parametrize("over", OVER)
def test_no_path_of_a_request_leads_to_a_file(daemon: DaemonProcess, over: str) -> None:
    escapes = [
        "../daemon.json",
        "%2e%2e/daemon.json",
        "..%2fdaemon.json",
        "%2e%2e%2f%2e%2e%2fetc/passwd",
        "%00",
        "a" * 5000,
        "%ff",
    ]
    for start in ("/", "//", "/objects/", "/stats/", "/v1/", "/v1/objects/", "/v1/manifest/"):
        for escape in escapes:
            status, response = exchange(daemon, get(start + escape), over)
            assert status in (400, 404), start + escape
            assert b"instance_id" not in response
            assert b"root:" not in response


LONG = "x" * 1025
NAMES = [
    *("train/../../../etc/passwd", "train/../../daemon.json", "..", "train/..", "train/./a", "train//a", "train/%2e%2e/a"),
    *("train/a\0b", "train/" + "a" * 300, f"train/{LONG}", "train/a\nb", "train/\ud800", "train/%00", "/etc/passwd", ""),
]
URIS = [
    *(f"gs://{BUCKET}/{name}" for name in NAMES),
    *("file:///etc/passwd", "gs://../train/a", "gs://./train/a", f"gs://{BUCKET}/../another/a", "gs://", "", "/etc/passwd"),
    *("gs://a%2fb/c", "gs://evil.example:80@pictures/a", f"gs://{BUCKET}?x=1/train/a", f"gs://{BUCKET}#/train/a"),
]


def posted(daemon: DaemonProcess, target: str, message: object) -> tuple[int, bytes]:
    request = get(target, method="POST", body=json.dumps(message).encode())
    status, response = exchange(daemon, request, "the socket")
    return status, response.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("uri", URIS, ids=lambda uri: ascii(uri)[:40])
def test_no_name_of_an_object_leads_outside_the_tree(daemon: DaemonProcess, uri: str) -> None:
    before = files_around(daemon)
    status, body = posted(daemon, "/v1/fetch", {"objects": [uri]})
    assert status == 400 or (status == 200 and json.loads(body)["errors"] != [""])
    report = {"job": "", "hits": 0, "misses": 0, "fallbacks": 0, "wait_s": 0.0}
    assert posted(daemon, "/v1/reads", report | {"objects": [uri]})[0] in (200, 400)
    assert files_around(daemon) == before


def files_around(daemon: DaemonProcess) -> set[Path]:
    """All files below the parent folder of the cache, except for the index."""
    return {path for path in daemon.cache_dir.parent.rglob("*") if path.is_file() and "index" not in path.parts}


@pytest.mark.parametrize(
    "uri", [f"gs://{BUCKET}/private/key", "gs://another-bucket/train/images/1.jpg", f"gs://{BUCKET}/training"]
)
def test_only_the_configured_data_roots_are_served(daemon: DaemonProcess, server: ServingGCS, uri: str) -> None:
    before = server.counts.total()
    (error,) = daemon.client.fetch([uri])
    assert "not within a data root" in error
    root = uri.rpartition("/")[0]
    assert exchange(daemon, get(f"/v1/manifest?data_root={root}"), "the socket")[0] == 400
    assert server.counts.total() == before


@pytest.mark.parametrize("digest", ["../../../../etc", "..", "", "/etc", "%2e%2e", "a" * 5000, "objects", "\0"])
def test_no_digest_of_a_plan_leads_outside_the_manifests(daemon: DaemonProcess, digest: str) -> None:
    plan = {"job": "j", "stream": "s", "data_root": DATA_ROOT, "manifest": digest, "kind": "listed", "seed": 0, "epoch": 0}
    plan |= {"position": 0, "rank": 0, "world": 1, "drop_last": 0, "start": 0, "digest": ""}
    status, body = exchange(daemon, get("/v1/plan", method="POST", body=json.dumps(plan).encode() + b"\n"), "the socket")
    assert status == 400
    assert b"field 'manifest'" in body


# Files on disk


@pytest.mark.parametrize("umask", ["000", "022", "077"])
def test_files_are_for_the_user_and_the_group_under_every_umask(server: ServingGCS, tmp_path: Path, umask: str) -> None:
    under = ["sh", "-c", f'umask {umask} && exec "$@"', "sh"]
    with faulted_daemon(tmp_path / "cache", server.url, under=under) as daemon:
        cached_items(daemon)
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [daemon.cache_dir, *daemon.cache_dir.rglob("*")]}
        assert modes.pop(daemon.cache_dir / "daemon.sock") == 0o660
        assert {str(path) for path, mode in modes.items() if path.is_dir() and mode != 0o750} == set()
        assert {str(path) for path, mode in modes.items() if path.is_file() and mode != 0o640} == set()


def test_a_world_writable_directory_is_closed_to_others(server: ServingGCS, tmp_path: Path) -> None:
    """Others could replace the socket, and so make readers read other data."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with faulted_daemon(tmp_path / "cache", server.url):
        assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o775


CLAIM_AS_NOBODY = """
import logging, os, sys
from pathlib import Path
from gcs_prefetchd.cache.directory import CacheDirectory
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
logging.basicConfig(format="%(levelname)s %(message)s")
CacheDirectory(Path(sys.argv[1])).claim()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_world_writable_directory_of_another_user_is_used_with_a_warning() -> None:
    """Volumes of containers are such directories."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        done = run_script(CLAIM_AS_NOBODY, folder)
        assert (done.returncode, done.stdout) == (0, "")
        assert re.fullmatch(f"WARNING cache directory {folder}: every user who reaches it may write there.*\n", done.stderr)
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o777


# Secrets


SECRET = "ya29.this-token-is-nobodys-business"


def test_no_token_and_no_key_is_ever_logged_or_shown(tmp_path: Path) -> None:
    """At log level debug, with requests that fail in many ways; some error bodies repeat what was sent."""
    key = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    echo = json.dumps({"error": {"message": f"you sent Authorization: Bearer {SECRET}"}})
    faults: list[Fault] = [
        *(Status(status, body=echo, content_type="application/json") for status in (400, 401, 403, 404, 412, 429, 500, 503)),
        *(Status(400, body=f"Bearer {SECRET}"), Status(200, body=f"Bearer {SECRET}"), HtmlPage(f"<p>{SECRET}</p>")),
    ]
    with serving() as server:
        put_items(server, 1)
        server.require_token(SECRET)
        about = {"type": "service_account", "client_email": "reader@example.com", "private_key": key, "private_key_id": "1"}
        (tmp_path / "key.json").write_text(json.dumps(about | {"token_uri": f"{server.url}/token"}))
        for number, fault in enumerate(faults):
            server.put(BUCKET, f"train/{number}", DATA)
            server.faults.add(fault, f"{BUCKET}/train/{number}")
        extra = ["--set", "anonymous=false", "--credentials", str(tmp_path / "key.json"), "--set", "log_level=debug"]
        extra += ["--set", "relist_s=1", "--set", "deadline_s=1"]
        with faulted_daemon(tmp_path / "cache", server.url, extra) as daemon:
            shown = daemon.client.fetch([f"{DATA_ROOT}/{number}" for number in range(len(faults))])
            server.faults.add(faults[0], kind=Kind.LIST)
            daemon.wait_for_line("stays in force")
            server.faults.add(Status(400, body=json.dumps({"error": key, "assertion": SECRET})), kind=Kind.TOKEN)
            server.require_token("another")
            shown += daemon.client.fetch([f"{DATA_ROOT}/0"])
            shown += [exchange(daemon, get(target))[1].decode() for target in ("/", "/stats", "/metrics", "/nothing")]
            shown += [
                exchange(daemon, get(target), "the socket")[1].decode()
                for target in ("/v1/settings", "/v1/stats", "/v1/status")
            ]
            shown += [(tmp_path / "cache/daemon.json").read_text(), *daemon.lines()]
            shown += [Path(f"/proc/{daemon.pid}/cmdline").read_text(), Path(f"/proc/{daemon.pid}/environ").read_text()]
            daemon.stop()
        shown += daemon.lines()
    assert len(shown) > 30
    body = key.split("\n")[3]
    assert [text for text in shown if SECRET in text or body in text or "PRIVATE KEY" in text] == []
