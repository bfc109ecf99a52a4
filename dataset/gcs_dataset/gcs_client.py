"""google-cloud-storage as we use it: one client per process, one retry, a deadline that holds, and its errors made ours.

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

__all__ = ["EMULATOR_VARIABLE", "SOCKET_TIMEOUT_S", "emulator_endpoint", "retrying", "storage_client"]

EMULATOR_VARIABLE = "STORAGE_EMULATOR_HOST"  # the client libraries' own word for a stand-in, without credentials
SOCKET_TIMEOUT_S = (10.0, 20.0)  # to connect; between two pieces of an answer

# One try may take this share of the deadline: a connection that drips is given up in time for another one.
_TRY_SHARE = 0.5
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
_SHOWN_CHARACTERS = 300

_CREDENTIALS_VARIABLE = "GOOGLE_APPLICATION_CREDENTIALS"
_WHAT_TO_DO = (
    "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
    f" ({EMULATOR_VARIABLE} for a stand-in without credentials)"
)

T = TypeVar("T")

# Clients by process and settings. Those of the parent stay in here after a fork, unused: closing them would close its
# connections' descriptors under whoever runs in it.
_clients: dict[tuple[int, str | None, str | None], Any] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def emulator_endpoint() -> str | None:
    """The URL in STORAGE_EMULATOR_HOST, or None; raises SettingsError where it is no URL."""
    endpoint = os.environ.get(EMULATOR_VARIABLE)
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise SettingsError(f"{EMULATOR_VARIABLE}={endpoint}: must be a URL, as in http://127.0.0.1:9000")
    return endpoint.rstrip("/") if endpoint else None


def storage_client() -> Any:
    """This process's google.cloud.storage.Client, made at the first call and again after a fork.

    Raises CredentialsError where the environment has none that can be used.
    """
    key = (os.getpid(), emulator_endpoint(), os.environ.get(_CREDENTIALS_VARIABLE))
    with _lock:
        if key not in _clients:
            _clients[key] = _new_client()
        return _clients[key]


def _new_client() -> Any:
    # Telemetry that would ask for each bucket's metadata, which readers often may not.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    try:
        client = storage.Client(project=None)  # reading needs none, and finding one out can fail
        # GCS redirects no request. Whoever does is no GCS, and names a crc32c of its own bytes.
        client._http.max_redirects = 0  # noqa: SLF001 - there is no public way
    except (GoogleAuthError, OSError, ValueError) as exc:
        raise CredentialsError(f"no usable Google credentials ({_short(exc)}): {_WHAT_TO_DO}") from exc
    return client


def retrying(what: str, call: Callable[[], T], deadline_s: float) -> T:
    """What `call` returns, repeated with jittered, growing pauses while it fails for a reason that may pass.

    The deadline holds: the library's own time-outs are per socket operation, and a body that drips would never meet one, so
    every try runs in a thread that can be left behind. Raises one of ours, which names `what`: OriginUnavailableError at the
    deadline, ObjectMissingError, AccessDeniedError and CredentialsError at once.
    """
    from google.api_core.exceptions import RetryError
    from google.api_core.retry import Retry, if_exception_type

    ends_s = time.monotonic() + deadline_s
    causes: list[Exception] = []

    def one_try() -> T:
        return _one_try(call, min(max(ends_s - time.monotonic(), 0.0), deadline_s * _TRY_SHARE))

    retry = Retry(
        predicate=if_exception_type(_PassingError),
        initial=_FIRST_PAUSE_S,
        maximum=_LONGEST_PAUSE_S,
        timeout=deadline_s,
        on_error=causes.append,
    )
    try:
        result: T = retry(one_try)()
    except RetryError as exc:
        raise OriginUnavailableError(
            f"{what}: gave up after {deadline_s:g} s and {len(causes)} tries; last: {causes[-1]}"
        ) from exc
    except Exception as exc:
        ours = _as_ours(what, exc)
        if ours is None:
            raise
        raise ours from exc
    return result


class _PassingError(Exception):
    """What may pass, in a line: all of them are kept until the call ends, and the library's own hold the body of the answer."""


def _one_try(call: Callable[[], T], longest_s: float) -> T:
    """What `call` returns; raises _PassingError where it failed for a reason that may pass, or took longer."""
    try:
        return _in_time(call, longest_s)
    except Exception as exc:
        if not _may_pass(exc):
            raise
        passing = _PassingError(_short(exc))
        exc.__traceback__ = None  # its frames hold the outcome, which holds it: a circle, until garbage is collected
    raise passing  # here, where it no longer refers to the other


def _in_time(call: Callable[[], T], longest_s: float) -> T:
    outcome = call_in_background(call)
    if not wait([outcome], longest_s).done:
        raise TimeoutError(f"not answered in full within {longest_s:.1f} s")
    return outcome.result()


def _may_pass(exc: Exception) -> bool:
    """Whether another try may go better. The library's own predicate passes over damaged bodies."""
    import requests
    import urllib3
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption

    if isinstance(exc, GoogleAPICallError):
        # A proxy's 204 or 302 is no answer of GCS's; its refusals are 4xx.
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


def _as_ours(what: str, exc: Exception) -> PrefetchdError | None:
    """The error of our tree that a final failure becomes, or None for a programming error."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    if isinstance(exc, PrefetchdError):
        return type(exc)(f"{what}: {exc}") if what not in str(exc) else exc
    if isinstance(exc, exceptions.NotFound):
        return ObjectMissingError(f"{what}: GCS says 404, there is no such object or bucket")
    if isinstance(exc, exceptions.Forbidden):
        return AccessDeniedError(f"{what}: GCS says 403, these credentials may not read it ({_short(exc)})")
    if isinstance(exc, exceptions.Unauthorized | GoogleAuthError):
        return CredentialsError(f"{what}: GCS does not accept the credentials ({_short(exc)}); {_WHAT_TO_DO}")
    if isinstance(exc, exceptions.GoogleAPICallError):
        return OriginError(f"{what}: GCS says {exc.code} ({_short(exc)})")
    return None


def _short(exc: Exception) -> str:
    # The whole body of an error stands in its message, 30 MB of it if a proxy sends that much.
    text = str(exc)[:_SHOWN_CHARACTERS].partition("\n")[0]
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
