"""Faults of GCS, hit by the fallback: the right bytes or an error that names the object, whatever GCS or a proxy sends."""

import gzip
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gcs_dataset.gcs_loader import GCSLoader
from gcs_prefetchd.shared.errors import AccessDeniedError, ObjectMissingError, OriginError, OriginUnavailableError
from gcs_prefetchd.testing import (
    Cut,
    Fault,
    FlippedByte,
    HtmlPage,
    Kind,
    MalformedHash,
    MissingHash,
    Partial,
    ServingGCS,
    Stall,
    Status,
    serving,
)
from support.caches import run_script
from support.daemons import BUCKET, put_items
from support.faults import faulted_daemon

NAME = "train/bad"
KEY = f"{BUCKET}/{NAME}"
URI = f"gs://{KEY}"
PATH = f"/storage/v1/b/{BUCKET}/o/train%2Fbad"
DATA = bytes(range(256)) * 400
FIRST = 65_536
HUGE = "x" * 30_000_000

load = GCSLoader(deadline_s=20)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingGCS]:
    with serving() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        server.put(BUCKET, NAME, DATA)
        yield server


@pytest.mark.parametrize(
    "fault",
    [
        Cut(FIRST, "http/1.0"),
        Partial(0, FIRST - 1),
        HtmlPage("<" * len(DATA)),
        *map(Status, (206, 304, 301, 307)),
        *(Status(503, retry_after=value) for value in ("1000000000", "soon", "Thu, 05 Nov 2099 12:00:10 GMT")),
    ],
    ids=lambda fault: repr(fault)[:60],
)
def test_after_a_passing_fault_the_right_bytes_are_read(server: ServingGCS, fault: Fault) -> None:
    server.faults.add(fault, KEY, requests=1)
    assert load.read(URI) == DATA
    assert server.counts.media[KEY] == 2


@pytest.mark.parametrize(
    "fault",
    [
        MissingHash(),
        MalformedHash(),
        *map(MalformedHash, ("crc32c=!!!!", "crc32c=AAAA", "crc32c", "", "md5=XrY7u+Ae7tCTyyK7j1rNww==")),
    ],
    ids=str,
)
def test_a_response_without_a_crc32c_is_compared_with_the_metadata(server: ServingGCS, fault: Fault) -> None:
    server.faults.add(fault, KEY)
    assert load.read(URI) == DATA
    assert (server.counts.media[KEY], server.counts.metadata[KEY]) == (1, 1)


def test_incomplete_bytes_without_a_crc32c_are_requested_again(server: ServingGCS) -> None:
    server.faults.add(Cut(FIRST, "close"), KEY, requests=1)
    server.faults.add(MissingHash(), KEY)
    assert load.read(URI) == DATA
    assert server.counts.media[KEY] == 2


def test_a_wrong_crc32c_is_an_error_at_the_deadline_and_not_the_bytes(server: ServingGCS) -> None:
    server.faults.add(MalformedHash("crc32c=AAAAAA=="), KEY)
    with pytest.raises(OriginUnavailableError, match=f"{URI}: gave up .*crc32c"):
        GCSLoader(deadline_s=0.5).read(URI)


@pytest.mark.parametrize(("status", "error"), [(400, OriginError), (403, AccessDeniedError), (404, ObjectMissingError)])
def test_a_refused_object_is_an_error_after_one_request_and_is_read_once_gcs_allows_it(
    server: ServingGCS, status: int, error: type[OriginError]
) -> None:
    server.faults.add(Status(status), KEY, requests=1)
    with pytest.raises(error, match=f"{URI}: GCS returned {status}"):
        load.read(URI)
    assert server.counts.media[KEY] == 1
    assert load.read(URI) == DATA


def test_an_object_replaced_during_its_download_is_of_one_generation(server: ServingGCS) -> None:
    server.faults.add(Stall(FIRST), KEY, requests=1)
    results: list[bytes] = []
    reading = Thread(target=lambda: results.append(GCSLoader(deadline_s=4).read(URI)))
    reading.start()
    server.wait_for(lambda counts: counts.bytes[KEY] == FIRST)
    server.put(BUCKET, NAME, DATA[::-1])
    reading.join()
    assert results == [DATA[::-1]]


def test_no_redirect_leads_to_another_host(server: ServingGCS) -> None:
    """The other host's response has the crc32c of its own bytes, so no check would find it. No request, no token either."""
    with serving() as elsewhere:
        elsewhere.put(BUCKET, NAME, b"of somebody else")
        server.faults.add(Status(302, location=f"{elsewhere.url}{PATH}?alt=media"), KEY, requests=1)
        assert load.read(URI) == DATA
        assert elsewhere.seen == []


def test_no_redirect_of_the_metadata_leads_to_another_host(server: ServingGCS) -> None:
    with serving() as elsewhere:
        elsewhere.put(BUCKET, NAME, DATA[::-1])
        server.faults.add(FlippedByte(), KEY, requests=1)
        server.faults.add(MissingHash(), KEY)
        server.faults.add(Status(307, location=elsewhere.url + PATH), KEY, kind=Kind.METADATA, requests=1)
        assert load.read(URI) == DATA
        assert elsewhere.seen == []


def test_a_redirect_loop_ends_at_the_deadline(server: ServingGCS) -> None:
    server.faults.add(Status(302, location=f"{PATH}?alt=media"), KEY)
    with pytest.raises(OriginUnavailableError, match=f"{URI}: gave up"):
        GCSLoader(deadline_s=0.5).read(URI)
    assert server.counts.media[KEY] < 10


class Downgrade(BaseHTTPRequestHandler):
    """Redirects https requests to the same path over http."""

    to = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.to + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        pass


@contextmanager
def over_https(handler: type[BaseHTTPRequestHandler], certificate: Path) -> Iterator[str]:
    """The URL of a server with this certificate and key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def write_certificate(path: Path) -> None:
    """A key and a self-signed certificate of 127.0.0.1."""
    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    certificate = builder.add_extension(names, critical=True).sign(key, SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem + certificate.public_bytes(Encoding.PEM))


def test_no_redirect_leads_from_https_to_http(server: ServingGCS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.pem"
    write_certificate(certificate)
    handler = type("ToServer", (Downgrade,), {"to": server.url})
    with over_https(handler, certificate) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        with pytest.raises(OriginUnavailableError, match=f"{URI}: gave up .*redirects"):
            GCSLoader(deadline_s=1).read(URI)
    assert server.seen == []


SCRIPT = """
import resource, sys
from gcs_dataset.gcs_loader import GCSLoader

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

good, bad, attempts = sys.argv[1:]
GCSLoader().read(good)
before = peak_bytes()
data = GCSLoader(deadline_s=60).read(bad)
print(len(data), peak_bytes() - before)
"""


def test_error_bodies_of_30_mb_are_not_kept_between_attempts(server: ServingGCS) -> None:
    """google-cloud-storage reads each to its end, and holds three or four copies of it."""
    server.put(BUCKET, "train/good", DATA)
    server.faults.add(Status(503, body=HUGE), KEY, requests=range(1, 6))
    ended = run_script(SCRIPT, f"gs://{BUCKET}/train/good", URI, 5)
    assert ended.returncode == 0, ended.stderr
    size_bytes, grown_bytes = map(int, ended.stdout.split())
    assert size_bytes == len(DATA)
    assert grown_bytes < 8 * len(HUGE)


def test_a_gzipped_object_is_the_same_in_a_hit_a_miss_and_a_fallback(server: ServingGCS, tmp_path: Path) -> None:
    """The object is a gzip bomb: nothing unpacks it on the way."""
    packed = gzip.compress(bytes(300_000_000), 1)
    put_items(server, 1)
    server.put(BUCKET, NAME, packed, content_encoding="gzip")
    with faulted_daemon(tmp_path / "cache", server.url) as daemon:
        miss, hit, fallback = daemon.read(URI), daemon.read(URI), load.read(URI)
    assert miss == hit == fallback == packed
    assert server.counts.media[KEY] == 2
