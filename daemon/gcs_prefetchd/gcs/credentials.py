"""Who we are to GCS: a key file, application default credentials, the metadata server, or nobody."""

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
METADATA_ANSWERS_WITHIN_S = 3.0
_NEEDED = {
    "service_account": ("client_email", "private_key", "token_uri"),
    "authorized_user": ("client_id", "client_secret", "refresh_token"),
    "external_account": ("audience", "credential_source", "subject_token_type", "token_url"),
    "impersonated_service_account": ("source_credentials", "service_account_impersonation_url"),
}
_WHAT_TO_DO = (
    "set `credentials` to a key file, run `gcloud auth application-default login`, or pass --anonymous for a public bucket"
)


@dataclass(frozen=True, slots=True)
class Access:
    """How GCS is reached: root URL (None: the public one), credentials, and the project that pays."""

    endpoint: str | None = None
    anonymous: bool = False
    credentials: Path | None = None
    user_project: str | None = None


async def create_token(access: Access, session: aiohttp.ClientSession) -> Token | None:
    """What signs our requests, or None for anonymous access; raises CredentialsError where there is nothing usable.

    The order is Google's own, https://cloud.google.com/docs/authentication/application-default-credentials, with one step
    before it: a key that systemd hands over with `LoadCredential=gcs-key.json`.
    """
    if access.anonymous:
        return None
    token = token_from_key_file(access, session)
    if token is None:
        token = Token(session=session, scopes=[SCOPE])  # type: ignore[arg-type]  # typed for requests
        await _ask_metadata_server(token, session)
    return token


def token_from_key_file(access: Access, session: aiohttp.ClientSession) -> Token | None:
    """What the key file, as it is now, signs with; None where there is none. Raises CredentialsError."""
    path = _key_file(access)
    if path is None:
        return None
    _check_key_file(path)
    return Token(service_file=str(path), session=session, scopes=[SCOPE])  # type: ignore[arg-type]


def _key_file(access: Access) -> Path | None:
    if access.credentials is not None:
        return access.credentials
    handed_over = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / "gcs-key.json"
    if os.access(handed_over, os.R_OK):  # systemd sets the variable without a key, too
        return handed_over
    if named := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return Path(named)
    folder = os.environ.get("CLOUDSDK_CONFIG")
    # expanduser and access: a container's user may have no home at all, a service's may be closed to it.
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  # Path.home raises
    well_known = (Path(folder) if folder else home / ".config/gcloud") / "application_default_credentials.json"
    return well_known if os.access(well_known, os.F_OK) else None


def _check_key_file(path: Path) -> None:
    # gcloud-aio-auth takes a damaged file for "use the metadata server": say what is wrong before it can.
    try:
        key = json.loads(path.read_bytes())
    except OSError as exc:
        raise CredentialsError(f"credentials {path}: {exc.strerror}; {_WHAT_TO_DO}") from None
    except (ValueError, RecursionError):
        raise CredentialsError(f"credentials {path}: not JSON; download the key again, or {_WHAT_TO_DO}") from None
    kind = key.get("type") if isinstance(key, dict) else None
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise CredentialsError(f"credentials {path}: its type is {kind!r}, not one of {', '.join(sorted(_NEEDED))}")
    missing = [name for name in _NEEDED[kind] if not key.get(name)]
    if missing:
        raise CredentialsError(f"credentials {path}: {', '.join(missing)} missing; download the key again")
    if kind == "service_account":
        try:
            readable = isinstance(load_pem_private_key(str(key["private_key"]).encode(), password=None), RSAPrivateKey)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
            readable = False
        if not readable:
            raise CredentialsError(f"credentials {path}: its private_key cannot be read; download the key again")


async def _ask_metadata_server(token: Token, session: aiohttp.ClientSession) -> None:
    # The library itself tries for up to a minute, with nobody told why the start takes so long.
    try:
        timeout = aiohttp.ClientTimeout(total=METADATA_ANSWERS_WITHIN_S)
        async with session.get(token.token_uri, headers={"metadata-flavor": "Google"}, timeout=timeout) as response:
            if response.status == 200:
                return
            reason = f"the metadata server returned {response.status}"
    except (aiohttp.ClientError, TimeoutError, OSError):
        reason = "no key file, no application default credentials and no metadata server"
    raise CredentialsError(f"no credentials: {reason}; {_WHAT_TO_DO}")
