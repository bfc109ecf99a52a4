"""Fixtures for the tests of `gcs`: clients and a service account's key."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gcs_prefetchd.gcs.client import Access, GCSClient
from gcs_prefetchd.testing import GCSServer
from support.gcs_clients import make_client


@pytest.fixture
async def client(gcs: GCSServer) -> AsyncIterator[GCSClient]:
    async with make_client(gcs) as opened:
        yield opened


@pytest.fixture(scope="session")
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@pytest.fixture
def key_file(gcs: GCSServer, private_key: str, tmp_path: Path) -> Path:
    """A service account's key whose tokens come from the server."""
    path = tmp_path / "key.json"
    key = {"type": "service_account", "client_email": "reader@example.com", "private_key": private_key}
    path.write_text(json.dumps(key | {"token_uri": f"{gcs.url}/token"}))
    return path


@pytest.fixture
async def authorized_client(gcs: GCSServer, key_file: Path) -> AsyncIterator[GCSClient]:
    """A client with a service account's key; the server demands its token."""
    gcs.require_token("first")
    async with GCSClient(Access(gcs.url, credentials=key_file), deadline_s=20.0, connections=16) as opened:
        yield opened
