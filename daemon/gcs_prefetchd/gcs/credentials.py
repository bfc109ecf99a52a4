"""Credentials for GCS: a key file, application default credentials, the metadata server, or none (anonymous)."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from gcloud.aio.auth import Token

from gcs_prefetchd.shared.errors import CredentialsError

__all__ = ["Access", "create_token", "token_from_key_file"]

SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
METADATA_TIMEOUT_S = 3.0
_REQUIRED_FIELDS = {
    "service_account": ("client_email", "private_key", "token_uri"),
    "authorized_user": ("client_id", "client_secret", "refresh_token"),
    "external_account": ("audience", "credential_source", "subject_token_type", "token_url"),
    "impersonated_service_account": ("source_credentials", "service_account_impersonation_url"),
}
_ADVICE = (
    "set `credentials` to a key file, run `gcloud auth application-default login`, or pass --anonymous for a public bucket"
)


@dataclass(frozen=True, slots=True)
class Access:
    """How to access GCS: endpoint (None: the public one), credentials, and the project to bill."""

    endpoint: str | None = None
    anonymous: bool = False
    credentials: Path | None = None
    user_project: str | None = None


async def create_token(access: Access, session: aiohttp.ClientSession) -> Token | None:
    """The source of access tokens, or None for anonymous access. Raises CredentialsError if no credentials are usable.

    The search order is Google's, https://cloud.google.com/docs/authentication/application-default-credentials, after one step
    of our own: a key passed by systemd with `LoadCredential=gcs-key.json`.
    """
    if access.anonymous:
        return None
    token = token_from_key_file(access, session)
    if token is None:
        token = Token(session=session, scopes=[SCOPE])  # type: ignore[arg-type]  # typed for requests
        await _check_metadata_server(token, session)
    return token


def token_from_key_file(access: Access, session: aiohttp.ClientSession) -> Token | None:
    """A token source from the key file's present content; None if there is no key file. Raises CredentialsError."""
    path = _key_file(access)
    if path is None:
        return None
    _check_key_file(path)
    return Token(service_file=str(path), session=session, scopes=[SCOPE])  # type: ignore[arg-type]


def _key_file(access: Access) -> Path | None:
    if access.credentials is not None:
        return access.credentials
    from_systemd = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / "gcs-key.json"
    if os.access(from_systemd, os.R_OK):  # systemd sets the variable even without a key
        return from_systemd
    if named := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return Path(named)
    folder = os.environ.get("CLOUDSDK_CONFIG")
    # expanduser and access: a container's user may have no home directory, and a service may not be allowed to enter it.
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  # Path.home raises
    well_known = (Path(folder) if folder else home / ".config/gcloud") / "application_default_credentials.json"
    return well_known if os.access(well_known, os.F_OK) else None


def _check_key_file(path: Path) -> None:
    # With a damaged file gcloud-aio-auth silently uses the metadata server: report the damage before it can.
    try:
        key = json.loads(path.read_bytes())
    except OSError as exc:
        raise CredentialsError(f"credentials {path}: {exc.strerror}; {_ADVICE}") from None
    except (ValueError, RecursionError):
        raise CredentialsError(f"credentials {path}: not JSON; download the key again, or {_ADVICE}") from None
    kind = key.get("type") if isinstance(key, dict) else None
    if not isinstance(kind, str) or kind not in _REQUIRED_FIELDS:
        raise CredentialsError(f"credentials {path}: its type is {kind!r}, not one of {', '.join(sorted(_REQUIRED_FIELDS))}")
    missing = [name for name in _REQUIRED_FIELDS[kind] if not key.get(name)]
    if missing:
        raise CredentialsError(f"credentials {path}: {', '.join(missing)} missing; download the key again")
    if kind == "service_account":
        try:
            is_readable = isinstance(load_pem_private_key(str(key["private_key"]).encode(), password=None), RSAPrivateKey)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
            is_readable = False
        if not is_readable:
            raise CredentialsError(f"credentials {path}: its private_key cannot be read; download the key again")


async def _check_metadata_server(token: Token, session: aiohttp.ClientSession) -> None:
    # The library itself would retry for up to a minute without logging why the start takes so long.
    try:
        timeout = aiohttp.ClientTimeout(total=METADATA_TIMEOUT_S)
        async with session.get(token.token_uri, headers={"metadata-flavor": "Google"}, timeout=timeout) as response:
            if response.status == 200:
                return
            reason = f"the metadata server returned {response.status}"
    except (aiohttp.ClientError, TimeoutError, OSError):
        reason = "no key file, no application default credentials and no metadata server"
    raise CredentialsError(f"no credentials: {reason}; {_ADVICE}")
