"""Credentials for GCS. The tests generate keys; a process of its own contacts the metadata server, at a given address."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from gcloud.aio.auth import Token

from gcs_prefetchd.gcs.credentials import Access, create_token
from gcs_prefetchd.shared.errors import CredentialsError


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None) -> str:
    how = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how).decode()


RSA_KEY = rsa.generate_private_key(65537, 2048)
SERVICE_ACCOUNT = {
    "type": "service_account",
    "client_email": "prefetch@project.iam.gserviceaccount.com",
    "private_key": pem(RSA_KEY),
    "private_key_id": "1",
    "token_uri": "https://oauth2.googleapis.com/token",
}
AUTHORIZED_USER = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "r"}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


def write(path: Path, key: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(key))
    return path


def named(path: Path, who: str) -> Path:
    """A key file that can be distinguished from others by its account."""
    return write(path, SERVICE_ACCOUNT | {"client_email": who})


async def refusal(access: Access, session: aiohttp.ClientSession) -> str:
    with pytest.raises(CredentialsError) as caught:
        await create_token(access, session)
    text = str(caught.value)
    assert "\n" not in text
    return text


async def test_anonymous_access_needs_no_credentials(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    assert await create_token(Access(anonymous=True, credentials=tmp_path / "missing"), session) is None


async def test_a_key_file_creates_a_token_of_its_account(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    token = await create_token(Access(credentials=write(tmp_path / "key.json", SERVICE_ACCOUNT)), session)
    assert token is not None
    assert token.service_data == SERVICE_ACCOUNT
    assert token.scopes == "https://www.googleapis.com/auth/devstorage.read_only"


async def test_the_endpoint_returns_the_token_for_a_request_signed_with_the_key(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    assertions: list[str] = []

    async def respond(request: web.Request) -> web.Response:
        assertions.append(str((await request.post())["assertion"]))
        return web.json_response({"access_token": "secret", "expires_in": 3600})

    app = web.Application()
    app.router.add_post("/token", respond)
    async with TestServer(app) as server:
        key = SERVICE_ACCOUNT | {"token_uri": str(server.make_url("/token"))}
        token = await create_token(Access(credentials=write(tmp_path / "key.json", key)), session)
        assert token is not None
        assert (await token.refresh(timeout=10)).value == "secret"
    assert assertions[0].count(".") == 2


@pytest.mark.parametrize(
    "key",
    [
        AUTHORIZED_USER,
        {
            "type": "external_account",
            "audience": "a",
            "credential_source": {"file": "/x"},
            "subject_token_type": "t",
            "token_url": "u",
        },
        {
            "type": "impersonated_service_account",
            "source_credentials": AUTHORIZED_USER,
            "service_account_impersonation_url": "https://iamcredentials.googleapis.com/v1/x",
        },
    ],
    ids=lambda key: str(key["type"]),
)
async def test_every_kind_of_key_file_is_accepted(
    session: aiohttp.ClientSession, tmp_path: Path, key: dict[str, object]
) -> None:
    token = await create_token(Access(credentials=write(tmp_path / "key.json", key)), session)
    assert token is not None
    assert token.service_data == key


async def test_a_missing_key_file_is_named(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    text = await refusal(Access(credentials=tmp_path / "key.json"), session)
    assert text.startswith(f"credentials {tmp_path}/key.json: No such file or directory; set `credentials`")


async def test_a_directory_is_not_a_key_file(session: aiohttp.ClientSession, tmp_path: Path) -> None:
    assert f"credentials {tmp_path}: Is a directory" in await refusal(Access(credentials=tmp_path), session)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"-----BEGIN PRIVATE KEY-----", b"\xff\xfe\x00", b"[" * 100_000, b'{"type": 1}x']
)
async def test_a_key_file_that_is_not_json_is_named(session: aiohttp.ClientSession, tmp_path: Path, content: bytes) -> None:
    """gcloud-aio-auth ignores such a file and contacts the metadata server for a minute."""
    (tmp_path / "key.json").write_bytes(content)
    text = await refusal(Access(credentials=tmp_path / "key.json"), session)
    assert text.startswith(f"credentials {tmp_path}/key.json: not JSON; download the key again")


@pytest.mark.parametrize(
    "key", [[], None, 5, "text", {}, {"type": None}, {"type": "x"}, {"type": []}, {"type": {}}, {"type": "gdch"}]
)
async def test_a_key_file_of_another_type_is_named(session: aiohttp.ClientSession, tmp_path: Path, key: object) -> None:
    text = await refusal(Access(credentials=write(tmp_path / "key.json", key)), session)
    assert text.startswith(f"credentials {tmp_path}/key.json: its type is ")
    assert "service_account" in text


@pytest.mark.parametrize("key", [SERVICE_ACCOUNT, AUTHORIZED_USER], ids=["service account", "user"])
async def test_a_field_missing_from_a_key_file_is_named(
    session: aiohttp.ClientSession, tmp_path: Path, key: dict[str, str]
) -> None:
    for name in key.keys() - {"type", "private_key_id"}:
        for value in (None, ""):
            text = await refusal(Access(credentials=write(tmp_path / "key.json", key | {name: value})), session)
            assert f"key.json: {name} missing; download the key again" in text


@pytest.mark.parametrize(
    "private_key",
    [
        "not PEM",
        pem(RSA_KEY)[:200],
        pem(RSA_KEY).replace("M", "N"),
        pem(RSA_KEY, b"password"),
        pem(ec.generate_private_key(ec.SECP256R1())),
        "half a character: \ud800",
        5,
        ["x"],
    ],
    ids=["text", "cut", "altered", "encrypted", "of another kind", "half a character", "number", "list"],
)
async def test_a_private_key_that_cannot_sign_is_named_and_not_shown(
    session: aiohttp.ClientSession, tmp_path: Path, private_key: object
) -> None:
    text = await refusal(
        Access(credentials=write(tmp_path / "key.json", SERVICE_ACCOUNT | {"private_key": private_key})), session
    )
    assert text == f"credentials {tmp_path}/key.json: its private_key cannot be read; download the key again"


async def test_the_first_source_with_a_key_is_used(
    session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting, systemd's credentials, the environment's, and gcloud's own: the test removes one after another."""
    setting = named(tmp_path / "setting.json", "setting")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(named(tmp_path / "systemd/gcs-key.json", "systemd").parent))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(named(tmp_path / "adc.json", "environment")))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(named(tmp_path / "gcloud/application_default_credentials.json", "gcloud").parent))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    named(tmp_path / "home/.config/gcloud/application_default_credentials.json", "home")
    assert await account(Access(credentials=setting), session) == "setting"
    assert await account(Access(), session) == "systemd"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))  # systemd sets it for other credentials too
    assert await account(Access(), session) == "environment"
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    assert await account(Access(), session) == "gcloud"
    monkeypatch.delenv("CLOUDSDK_CONFIG")
    assert await account(Access(), session) == "home"


async def account(access: Access, session: aiohttp.ClientSession) -> str:
    token = await create_token(access, session)
    assert isinstance(token, Token)
    return str(token.service_data["client_email"])


async def test_a_key_file_named_by_the_environment_must_exist(
    session: aiohttp.ClientSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "typo.json"))
    assert f"credentials {tmp_path}/typo.json: No such file" in await refusal(Access(), session)


SCRIPT = """
import asyncio, os
import aiohttp
from gcs_prefetchd.gcs.credentials import Access, create_token
from gcs_prefetchd.shared.errors import CredentialsError

async def main():
    async with aiohttp.ClientSession() as session:
        try:
            token = await create_token(Access(), session)
            print("token", (await token.refresh(timeout=5)).value)
        except CredentialsError as exc:
            print("refused", exc)

if "NOBODY" in os.environ:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
asyncio.run(main())
"""


def run_with_metadata_server(address: str, **environment: str) -> str:
    """What a process with only a metadata server prints. gcloud-aio-auth reads the address when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"PATH": os.environ["PATH"], "GCE_METADATA_HOST": address, "HOME": "/nonexistent"} | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def closed_address() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{bound.getsockname()[1]}"


def test_without_any_credentials_the_start_fails_at_once_with_advice() -> None:
    started_s = time.monotonic()
    output = run_with_metadata_server(closed_address())
    assert time.monotonic() - started_s < 20
    assert output.startswith("refused no credentials: no key file, no application default credentials and no metadata server; ")
    assert "--anonymous" in output
    assert output.count("\n") == 1


def test_the_wait_for_a_silent_metadata_server_is_short() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        output = run_with_metadata_server(f"127.0.0.1:{listener.getsockname()[1]}")
    assert output.startswith("refused no credentials: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that the system does not know")
def test_a_user_without_a_home_gets_advice_and_no_traceback() -> None:
    """As in containers: a user id without an account, and no HOME."""
    with_path = {"NOBODY": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        ["env", "-u", "HOME", sys.executable, "-c", SCRIPT],
        env={"PATH": os.environ["PATH"], "GCE_METADATA_HOST": closed_address()} | with_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout.startswith("refused no credentials: "), done.stderr


async def test_a_metadata_server_returns_the_token() -> None:
    async def respond(request: web.Request) -> web.Response:
        assert request.headers["Metadata-Flavor"] == "Google"
        return web.json_response({"access_token": "from-metadata", "expires_in": 3600})

    app = web.Application()
    app.router.add_get("/computeMetadata/v1/instance/service-accounts/default/token", respond)
    async with TestServer(app) as server:
        assert await asyncio.to_thread(run_with_metadata_server, f"127.0.0.1:{server.port}") == "token from-metadata\n"


async def test_a_refusal_of_the_metadata_server_is_reported() -> None:
    async with TestServer(web.Application()) as server:
        output = await asyncio.to_thread(run_with_metadata_server, f"127.0.0.1:{server.port}")
    assert output.startswith("refused no credentials: the metadata server returned 404; ")
