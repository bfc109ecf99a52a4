"""google-cloud-storage as we use it: one client per process, one retry loop, a strict deadline, and errors of our own tree.

The library takes 0.4 s to import, so nothing here imports it before the first request.
"""

import http.client
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any, TypeVar

from gcs_dataset.background_call import call_in_background
from gcs_prefetchd.shared.errors import (
    AccessDeniedError,
    CredentialsError,
    ObjectMissingError,
    OriginError,
    OriginUnavailableError,
    PrefetchdError,
    SettingsError,
    WrongBytesError,
)

__all__ = ["EMULATOR_VARIABLE", "SOCKET_TIMEOUT_S", "call_with_retries", "emulator_endpoint", "storage_client"]

EMULATOR_VARIABLE = "STORAGE_EMULATOR_HOST"  # the client libraries' own name for an emulator, without credentials
SOCKET_TIMEOUT_S = (10.0, 20.0)  # to connect; between two pieces of a response

# An attempt may take this share of the deadline: a connection that drips is given up in time for another one.
_ATTEMPT_SHARE = 0.5
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
_SHOWN_CHARACTERS = 300

_CREDENTIALS_VARIABLE = "GOOGLE_APPLICATION_CREDENTIALS"
_CREDENTIALS_ADVICE = (
    "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
    f" ({EMULATOR_VARIABLE} for an emulator without credentials)"
)

T = TypeVar("T")

# Clients by process and settings. After a fork, those of the parent stay in here unused: closing them would close the
# descriptors of connections that the parent is using.
_clients: dict[tuple[int, str | None, str | None], Any] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def emulator_endpoint() -> str | None:
    """The URL in STORAGE_EMULATOR_HOST, or None; raises SettingsError if it is not a URL."""
    endpoint = os.environ.get(EMULATOR_VARIABLE)
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise SettingsError(f"{EMULATOR_VARIABLE}={endpoint}: must be a URL, as in http://127.0.0.1:9000")
    return endpoint.rstrip("/") if endpoint else None


def storage_client() -> Any:
    """This process's google.cloud.storage.Client, created at the first call and again after a fork.

    Raises CredentialsError if the environment has no usable credentials.
    """
    key = (os.getpid(), emulator_endpoint(), os.environ.get(_CREDENTIALS_VARIABLE))
    with _lock:
        if key not in _clients:
            _clients[key] = _new_client()
        return _clients[key]


def _new_client() -> Any:
    # Telemetry that would request each bucket's metadata, for which readers often lack permission.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    try:
        client = storage.Client(project=None)  # reading needs none, and looking one up can fail
        # GCS never redirects. A server that does is not GCS, and sends a crc32c of its own bytes.
        client._http.max_redirects = 0  # noqa: SLF001 - there is no public way
    except (GoogleAuthError, OSError, ValueError) as exc:
        raise CredentialsError(f"no usable Google credentials ({_summary(exc)}): {_CREDENTIALS_ADVICE}") from exc
    return client


def call_with_retries(what: str, call: Callable[[], T], deadline_s: float) -> T:
    """What `call` returns; transient errors are retried with jittered, growing pauses until `deadline_s`.

    The deadline is strict: the library's own timeouts are per socket operation, and a body that drips would never reach one, so
    every attempt runs in a thread that can be abandoned. Raises an error of our tree that names `what`: OriginUnavailableError
    at the deadline; ObjectMissingError, AccessDeniedError and CredentialsError at once.
    """
    from google.api_core.exceptions import RetryError
    from google.api_core.retry import Retry, if_exception_type

    deadline_at_s = time.monotonic() + deadline_s
    causes: list[Exception] = []

    def attempt() -> T:
        return _attempt(call, min(max(deadline_at_s - time.monotonic(), 0.0), deadline_s * _ATTEMPT_SHARE))

    retry = Retry(
        predicate=if_exception_type(_TransientError),
        initial=_FIRST_PAUSE_S,
        maximum=_LONGEST_PAUSE_S,
        timeout=deadline_s,
        on_error=causes.append,
    )
    try:
        result: T = retry(attempt)()
    except RetryError as exc:
        raise OriginUnavailableError(
            f"{what}: gave up after {deadline_s:g} s and {len(causes)} attempts; last: {causes[-1]}"
        ) from exc
    except Exception as exc:
        converted = _converted_error(what, exc)
        if converted is None:
            raise
        raise converted from exc
    return result


class _TransientError(Exception):
    """A transient error, in one line. All are kept until the call ends, and the library's own hold the body of the response."""


def _attempt(call: Callable[[], T], timeout_s: float) -> T:
    """What `call` returns; raises _TransientError if it failed with a transient error or took longer."""
    try:
        return _call_with_timeout(call, timeout_s)
    except Exception as exc:
        if not _is_transient(exc):
            raise
        transient = _TransientError(_summary(exc))
        exc.__traceback__ = None  # its frames hold the outcome, which holds it: a cycle until garbage is collected
    raise transient  # here, so that it does not refer to the other


def _call_with_timeout(call: Callable[[], T], timeout_s: float) -> T:
    outcome = call_in_background(call)
    if not wait([outcome], timeout_s).done:
        raise TimeoutError(f"no complete response within {timeout_s:.1f} s")
    return outcome.result()


def _is_transient(exc: Exception) -> bool:
    """Whether retrying may help. The library's own predicate ignores damaged bodies."""
    import requests
    import urllib3
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption

    if isinstance(exc, GoogleAPICallError):
        # A proxy's 204 or 302 is not a response of GCS, whose refusals are 4xx.
        return exc.code in (408, 429) or not 400 <= (exc.code or 0) < 500
    if isinstance(exc, GoogleAuthError):
        return bool(exc.retryable)
    return isinstance(
        exc,
        WrongBytesError
        | DataCorruption
        | requests.RequestException
        | urllib3.exceptions.HTTPError
        | http.client.HTTPException
        | OSError,
    )


def _converted_error(what: str, exc: Exception) -> PrefetchdError | None:
    """The error of our tree for a permanent failure, or None for a programming error."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    if isinstance(exc, PrefetchdError):
        return type(exc)(f"{what}: {exc}") if what not in str(exc) else exc
    if isinstance(exc, exceptions.NotFound):
        return ObjectMissingError(f"{what}: GCS returned 404, there is no such object or bucket")
    if isinstance(exc, exceptions.Forbidden):
        return AccessDeniedError(f"{what}: GCS returned 403, these credentials may not read it ({_summary(exc)})")
    if isinstance(exc, exceptions.Unauthorized | GoogleAuthError):
        return CredentialsError(f"{what}: GCS does not accept the credentials ({_summary(exc)}); {_CREDENTIALS_ADVICE}")
    if isinstance(exc, exceptions.GoogleAPICallError):
        return OriginError(f"{what}: GCS returned {exc.code} ({_summary(exc)})")
    return None


def _summary(exc: Exception) -> str:
    # An error's message holds the complete body, 30 MB of it if a proxy sends that much.
    text = str(exc)[:_SHOWN_CHARACTERS].partition("\n")[0]
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
