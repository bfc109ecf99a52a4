"""Responses as values, and how GCS words its errors in each API."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from multidict import CIMultiDict

from gcs_prefetchd.testing.paths import Api

__all__ = ["Content", "Refusal", "Response", "empty_response", "json_response", "refuse"]


@dataclass(frozen=True, slots=True)
class Content:
    """A body that is produced piece by piece; `chunks` may block on a disk, `size_bytes` is None if unknown."""

    chunks: Callable[[], Iterator[bytes]]
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response before it is sent."""

    status: int
    headers: CIMultiDict[str]
    body: bytes | Content = b""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error response: the status, GCS's reason code and its message."""

    status: int
    reason: str
    message: str
    code: str = ""  # the XML API's reason code
    headers: tuple[tuple[str, str], ...] = ()


def json_response(value: object, status: int = 200) -> Response:
    """Return `value` as GCS's JSON API sends it."""
    headers = CIMultiDict({"Content-Type": "application/json; charset=UTF-8"})
    return Response(status, headers, json.dumps(value).encode())


def empty_response(status: int = 204) -> Response:
    """Return a response without a body."""
    return Response(status, CIMultiDict())


def refuse(refusal: Refusal, api: Api, *, is_media: bool = False) -> Response:
    """Return an error in the API of the request.

    The JSON API refuses `alt=media` in plain text, not in JSON: clients show that text as the error.
    """
    if refusal.status == 304:
        response = empty_response(304)
    elif api is Api.XML:
        body = (
            "<?xml version='1.0' encoding='UTF-8'?>"
            f"<Error><Code>{refusal.code or refusal.reason}</Code><Message>{escape(refusal.message)}</Message></Error>"
        )
        response = Response(refusal.status, CIMultiDict({"Content-Type": "application/xml; charset=UTF-8"}), body.encode())
    elif is_media:
        headers = CIMultiDict({"Content-Type": "text/html; charset=UTF-8"})
        response = Response(refusal.status, headers, refusal.message.encode())
    else:
        error = {"message": refusal.message, "domain": "global", "reason": refusal.reason}
        value = {"error": {"code": refusal.status, "message": refusal.message, "errors": [error]}}
        response = json_response(value, refusal.status)
    response.headers.extend(refusal.headers)
    return response
