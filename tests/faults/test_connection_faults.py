"""Faults of connections and credentials, hit by a real daemon while it runs and at its start: cached objects are served."""

import asyncio
import json
import re
import ssl
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from gcs_prefetchd.testing import Fault, Kind, ServingGCS, Stall, Status, serving
from support.daemons import BUCKET, DATA_ROOT, run_command, start_arguments
from support.faults import DATA, DaemonProcess, cached_items, faulted_daemon, promises

BAD = f"gs://{BUCKET}/train/bad"
QUICK = ["--set", "relist_s=1", "--set", "deadline_s=1"]
IN_FORCE = "the last listing stays in force; retry in 1 s"
REFUSED = Status(
    400, body='{"error": "invalid_grant", "error_description": "Invalid JWT Signature."}', content_type="application/json"
)

T = TypeVar("T")


class Proxy:
    """A proxy port before the server that can be closed and opened again, optionally with TLS."""

    def __init__(self, server_port: int, context: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self._server_port = server_port
        self._context = context
        self._loop = asyncio.new_event_loop()
        self._listener: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Listen, on the same port as before."""
        self._do(self._listen())

    def close(self) -> None:
        """Stop listening and close every connection: new ones are refused from now on."""
        self._do(self._end())

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            self.open()
            yield self
            self.close()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())  # aborted connections are closed by then
            self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._context)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        if self._listener is not None:
            self._listener.close()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # including those of connections just accepted
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        task.add_done_callback(lambda _: writer.transport.abort())  # also if it is cancelled before it starts

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        ways = [asyncio.create_task(_copy(reader, far_writer)), asyncio.create_task(_copy(far_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far_writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


@pytest.fixture(scope="module")
def server(server: ServingGCS) -> ServingGCS:
    """The server with another object, for the faults."""
    server.put(BUCKET, "train/bad", DATA)
    return server


def test_while_gcs_refuses_connections_cached_objects_are_served(server: ServingGCS, tmp_path: Path, good: str) -> None:
    with (
        Proxy(server.port).running() as proxy,
        faulted_daemon(tmp_path / "cache", f"http://127.0.0.1:{proxy.port}", QUICK) as daemon,
    ):
        parts, listed = cached_items(daemon), daemon.client.manifest(DATA_ROOT)
        with promises(daemon, good, DATA):
            proxy.close()
            assert re.search(f"list {DATA_ROOT}.*Connect call failed", daemon.wait_for_line(IN_FORCE))
            assert re.search(f"fetch {BAD}: .*Connect call failed", str(daemon.read(BAD)))
            assert all(isinstance(daemon.read(uri), bytes) for uri in parts)
            assert daemon.client.manifest(DATA_ROOT) == listed
            proxy.open()
        assert len(daemon.lines_about(BAD)) == 1


# Certificates


class Authority:
    """A certificate authority."""

    def __init__(self, name: str) -> None:
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = rsa.generate_private_key(65537, 2048)
        self.pem = self._sign(self._name, self._key, days=1, authority=True).public_bytes(Encoding.PEM)

    def certificate(self, path: Path, host: str = "localhost", days: int = 1) -> Path:
        """A certificate and its key in one file; with negative `days` it has expired."""
        key = rsa.generate_private_key(65537, 2048)
        signed = self._sign(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]), key, days=days, host=host)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(secret + signed.public_bytes(Encoding.PEM))
        return path

    def _sign(
        self, name: x509.Name, key: rsa.RSAPrivateKey, *, days: int, host: str = "", authority: bool = False
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=3)).not_valid_after(now + timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        if host:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Certificates by what is wrong with them, and the certificate of the trusted authority."""
    folder, trusted = tmp_path_factory.mktemp("certificates"), Authority("trusted")
    (folder / "authority.pem").write_bytes(trusted.pem)
    return {
        "authority": folder / "authority.pem",
        "nothing": trusted.certificate(folder / "good.pem"),
        "expired": trusted.certificate(folder / "expired.pem", days=-1),
        "another host": trusted.certificate(folder / "other.pem", host="other.example"),
    }


@pytest.fixture(scope="module")
def over_tls(
    server: ServingGCS, certificates: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DaemonProcess, Proxy, ssl.SSLContext]]:
    """A daemon that uses TLS with GCS and trusts one authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates["nothing"])
    with (
        Proxy(server.port, context).running() as proxy,
        faulted_daemon(
            tmp_path_factory.mktemp("tls") / "cache",
            f"https://localhost:{proxy.port}",
            QUICK,
            environment={"SSL_CERT_FILE": str(certificates["authority"])},
        ) as daemon,
    ):
        yield daemon, proxy, context


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("expired", "certificate has expired"),
        ("another host", "Hostname mismatch"),
    ],
)
def test_nothing_is_accepted_from_a_server_with_a_wrong_certificate(
    over_tls: tuple[DaemonProcess, Proxy, ssl.SSLContext], certificates: dict[str, Path], good: str, wrong: str, cause: str
) -> None:
    daemon, proxy, context = over_tls
    parts = cached_items(daemon)
    with promises(daemon, good, DATA):
        context.load_cert_chain(certificates[wrong])
        proxy.close()
        proxy.open()
        daemon.wait_for_line(f"list {DATA_ROOT}.*{cause}.*{IN_FORCE}")
        assert re.search(f"fetch {BAD}: .*{cause}", str(daemon.read(BAD)))
        assert all(isinstance(daemon.read(uri), bytes) for uri in parts)
        context.load_cert_chain(certificates["nothing"])


# Credentials


@pytest.fixture(scope="module")
def private_key() -> str:
    key = rsa.generate_private_key(65537, 2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def write_key(path: Path, private_key: str, endpoint: str) -> None:
    """Write a service account's key atomically, as a key rotation does."""
    key = {"type": "service_account", "client_email": "reader@example.com", "private_key": private_key}
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(key | {"token_uri": f"{endpoint}/token"}))
    unfinished.rename(path)


def credential_arguments(key_file: Path) -> list[str]:
    return ["--set", "anonymous=false", "--credentials", str(key_file)]


@pytest.fixture
def authorized(server: ServingGCS, tmp_path: Path, private_key: str) -> Iterator[DaemonProcess]:
    """A daemon with a service account's key; the server demands its token."""
    write_key(tmp_path / "key.json", private_key, server.url)
    server.require_token("first")
    with faulted_daemon(tmp_path / "cache", server.url, [*QUICK, *credential_arguments(tmp_path / "key.json")]) as daemon:
        yield daemon
    server.require_token(None)
    server.reset()


def test_a_refused_token_is_refreshed_once_and_no_reader_notices(
    authorized: DaemonProcess, server: ServingGCS, good: str
) -> None:
    cached_items(authorized)
    with promises(authorized, good, DATA):
        server.require_token("second")
        assert authorized.read(BAD) == DATA
        listings = server.counts.list[BUCKET]
        server.wait_for(lambda counts: counts.list[BUCKET] >= listings + 4)
    assert server.counts.total(Kind.TOKEN) == 2
    assert [line for line in authorized.lines() if " INFO " not in line] == []


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Status(503, body="x" * 30_000_000), "the token endpoint returned 503"),
        (Stall(None), "no access token arrived"),
    ],
    ids=["failing", "slow"],
)
def test_without_a_new_token_cached_objects_are_served_and_the_cause_is_named(
    authorized: DaemonProcess, server: ServingGCS, good: str, fault: Fault, cause: str
) -> None:
    parts = cached_items(authorized)
    with promises(authorized, good, DATA):
        server.faults.add(fault, kind=Kind.TOKEN)
        server.require_token("second")
        assert re.search(f"{DATA_ROOT}/.*{cause}", authorized.wait_for_line(IN_FORCE))
        assert re.search(f"fetch {BAD}: .*{cause}", str(authorized.read(BAD)))
        assert all(isinstance(authorized.read(uri), bytes) for uri in parts)
        server.faults.clear()
        server.release()
        mark = len(authorized.lines())
        server.put(BUCKET, "train/images/00009.jpg", DATA)
        server.put(BUCKET, "train/labels/00009.png", DATA)
        authorized.wait_for_line(f"INFO {DATA_ROOT}: 3 items")
        server.delete(BUCKET, "train/images/00009.jpg")
        server.delete(BUCKET, "train/labels/00009.png")
    assert len(authorized.lines_about(BAD)) == 1
    assert len(authorized.lines()) - mark < 20


def test_a_replaced_key_is_used_without_a_restart(server: ServingGCS, tmp_path: Path, private_key: str, good: str) -> None:
    """A server of its own issues the old key's tokens, which distinguishes the two keys."""
    key_file = tmp_path / "key.json"
    with serving() as old:
        write_key(key_file, private_key, old.url)
        for issuer in (old, server):
            issuer.require_token("old")
        with faulted_daemon(tmp_path / "cache", server.url, [*QUICK, *credential_arguments(key_file)]) as daemon:
            with promises(daemon, good, DATA):
                key_file.write_text('{"type": "serv')  # another program is writing it in place
                for issuer in (old, server):
                    issuer.require_token("renewed")
                assert daemon.read(BAD) == DATA
                write_key(key_file, private_key, server.url)
                old.faults.add(REFUSED, kind=Kind.TOKEN)
                server.require_token("new")
                assert daemon.read(f"{DATA_ROOT}/images/00000.jpg") == daemon.read(f"{DATA_ROOT}/images/00000.jpg")
            assert [line for line in daemon.lines() if " INFO " not in line] == []
    server.require_token(None)


def test_a_refused_key_and_an_unreadable_one_are_both_named(
    server: ServingGCS, authorized: DaemonProcess, tmp_path: Path, good: str
) -> None:
    key = (tmp_path / "key.json").read_text()
    with promises(authorized, good, DATA):
        (tmp_path / "key.json").write_text("{")
        server.faults.add(REFUSED, kind=Kind.TOKEN)
        server.require_token("second")
        text = str(authorized.read(BAD))
        assert re.search(
            rf"endpoint returned 400 .invalid_grant: Invalid JWT Signature..; credentials {tmp_path}/key.json: not JSON", text
        )
        (tmp_path / "key.json").write_text(key)
        server.faults.clear()
        requested = server.counts.total(Kind.TOKEN)
        server.wait_for(lambda counts: counts.total(Kind.TOKEN) > requested)  # a refused key is sent again after 5 s


def test_while_credentials_are_refused_prefetching_pauses_with_one_line_and_continues_afterwards(
    server: ServingGCS, tmp_path: Path, good: str
) -> None:
    items, root = 100, "gs://many/train"
    for i in range(items):
        server.put("many", f"train/images/{i}.jpg", DATA)
        server.put("many", f"train/labels/{i}.png", DATA)
    server.faults.add(Status(401), "many/*")
    extra = ["--data-root", root, "--set", "concurrency=8", "--set", "deadline_s=2"]
    with faulted_daemon(tmp_path / "cache", server.url, extra) as daemon, promises(daemon, good, DATA):
        daemon.wait_for_line("GCS returned 401 .*; planned again in 5 s")
        refused = sum(count for key, count in server.counts.media.items() if key.startswith("many/"))
        assert refused < items
        server.faults.clear()
        server.wait_for(
            lambda counts: sum(counts.media[key] > 0 for key in counts.media if key.startswith("many/")) == 2 * items
        )
        assert len([line for line in daemon.lines() if "401" in line]) < 5


# At the start


def test_a_start_without_gcs_serves_cached_objects_and_a_first_start_names_the_cause(
    server: ServingGCS, tmp_path: Path
) -> None:
    endpoint, cause = "http://gcs.invalid", "Cannot connect to host gcs.invalid|no connection to gcs.invalid:80"
    with faulted_daemon(tmp_path / "cache", server.url) as daemon:
        parts = cached_items(daemon)
        daemon.stop()
    with faulted_daemon(tmp_path / "cache", endpoint, QUICK) as daemon:
        assert re.search(f"list {DATA_ROOT}/.*({cause})", daemon.wait_for_line(IN_FORCE))
        assert all(isinstance(daemon.read(uri), bytes) for uri in parts)
        assert re.search(f"fetch {BAD}: .*({cause})", str(daemon.read(BAD)))
    first = run_command("start", *start_arguments(tmp_path / "another", endpoint, ["--set", "deadline_s=1"]))
    assert first.returncode == 1
    assert re.fullmatch(f"gcs-prefetchd: list {DATA_ROOT}/.*({cause}).*\n", first.stderr)
