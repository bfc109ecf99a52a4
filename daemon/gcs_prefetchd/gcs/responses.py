"""What a response of GCS means: pure functions from status, headers and body to an error or to an object's version."""

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from gcs_prefetchd.shared.errors import (
    AccessDeniedError,
    CredentialsError,
    ObjectChangedError,
    ObjectMissingError,
    OriginError,
)
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = [
    "MAX_ERROR_BODY_BYTES",
    "UnusableResponseError",
    "error_for_status",
    "one_line",
    "parse_retry_after",
    "version_from_headers",
    "version_from_metadata",
]

MAX_ERROR_BODY_BYTES = 16_384  # the rest of a larger error is not worth its bytes
MAX_REASON_LENGTH = 200
_FINAL: Mapping[int, type[OriginError]] = {
    400: OriginError,
    401: CredentialsError,
    403: AccessDeniedError,
    404: ObjectMissingError,
    412: ObjectChangedError,
}


class UnusableResponseError(Exception):
    """An unusable response. `final` is the error to raise if retrying would not help.

    Callers who request an object or a listing never see it, so it may hold more than one string.
    """

    def __init__(
        self, kind: str, reason: str, *, final: type[OriginError] | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.final = final
        self.retry_after_s = retry_after_s


def error_for_status(status: int, headers: Mapping[str, str], body: bytes, *, pinned: bool) -> UnusableResponseError:
    """The error for a status other than 200. `pinned`: the request named a generation, so 404 can mean that it is gone."""
    final = _FINAL.get(status)
    if status == 404 and pinned:
        final = ObjectChangedError
    reason = _HINTS.get(status, "") or _reason(headers.get("Content-Type", ""), body)
    text = f"GCS returned {status}" + (f" ({reason})" if reason else "")
    return UnusableResponseError(str(status), text, final=final, retry_after_s=parse_retry_after(headers.get("Retry-After")))


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds to wait according to a Retry-After header (seconds or a date); None if it is absent or not valid."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        wait_s = (parsedate_to_datetime(text) - (now or datetime.now(UTC))).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, wait_s)


def version_from_headers(name: ObjectName, headers: Mapping[str, str]) -> ObjectVersion | None:
    """The version from a download's headers; None if they lack the generation, the length or the crc32c."""
    hashes = dict(part.strip().partition("=")[::2] for value in _all(headers, "x-goog-hash") for part in value.split(","))
    length = headers.get("x-goog-stored-content-length") or headers.get("Content-Length")
    try:
        return _version(name, headers["x-goog-generation"], length or "", hashes["crc32c"])
    except (KeyError, ValueError):
        return None


def version_from_metadata(name: ObjectName, body: bytes) -> ObjectVersion:
    """The live version, from an object's metadata. Raises UnusableResponseError if the generation or size is missing."""
    try:
        metadata = json.loads(body)
    except (ValueError, RecursionError):
        raise UnusableResponseError("metadata", "its metadata is not JSON") from None
    try:
        return _version(name, metadata["generation"], metadata["size"], metadata.get("crc32c"))
    except (AttributeError, KeyError, ValueError, TypeError):
        shown = str(metadata)[:MAX_REASON_LENGTH]
        raise UnusableResponseError("metadata", f"its metadata lacks generation or size: {shown}") from None


def _version(name: ObjectName, generation: str, size: str, encoded: str | None) -> ObjectVersion:
    """Raises ValueError (binascii.Error is one), also for numbers that do not fit an index."""
    crc32c = None if encoded is None else base64.b64decode(encoded, validate=True)
    numbers = int(generation), int(size)
    if (crc32c is not None and len(crc32c) != 4) or min(numbers) < 0 or max(numbers) >= 1 << 63:
        raise ValueError
    return ObjectVersion(name, *numbers, None if crc32c is None else int.from_bytes(crc32c))


_HINTS: Mapping[int, str] = {
    401: "the credentials are not accepted",
    403: "these credentials may not read it",
    404: "there is no such object or bucket",
}


def _reason(content_type: str, body: bytes) -> str:
    if content_type.startswith("text/") and not body.lstrip().startswith(b"<"):  # the form of a failed download's body
        return _shortened(body.decode(errors="replace"))
    try:
        return _shortened(str(json.loads(body)["error"]["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _shortened(text: str) -> str:
    return " ".join(text.split())[:MAX_REASON_LENGTH]


def _all(headers: Mapping[str, str], name: str) -> list[str]:
    # GCS sends one x-goog-hash header for each hash.
    getall = getattr(headers, "getall", None)
    return list(getall(name, [])) if getall else [value for key, value in headers.items() if key.lower() == name]


def one_line(exc: BaseException) -> str:
    """Another library's error in one line; its own text may hold a body of megabytes, or nothing."""
    text = " ".join(str(exc)[:300].split())
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
