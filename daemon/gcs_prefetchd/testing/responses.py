"""Answers as values, and how GCS words its refusals in each of its dialects."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from multidict import CIMultiDict

from gcs_prefetchd.testing.paths import Api

__all__ = ["Answer", "Content", "Refusal", "empty_answer", "json_answer", "refuse"]


@dataclass(frozen=True, slots=True)
class Content:
    """A body that is produced piece by piece; `chunks` may block on a disk, `size_bytes` is None where not known."""

    chunks: Callable[[], Iterator[bytes]]
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer before it is sent."""

    status: int
    headers: CIMultiDict[str]
    body: bytes | Content = b""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer other than the one asked for: the status, GCS's word for the reason and its sentence."""

    status: int
    reason: str
    message: str
    code: str = ""  # the XML API's word for the reason
    headers: tuple[tuple[str, str], ...] = ()


def json_answer(value: object, status: int = 200) -> Answer:
    """Return `value` as GCS's JSON API sends it."""
    headers = CIMultiDict({"Content-Type": "application/json; charset=UTF-8"})
    return Answer(status, headers, json.dumps(value).encode())


def empty_answer(status: int = 204) -> Answer:
    """Return an answer without a body."""
    return Answer(status, CIMultiDict())


def refuse(refusal: Refusal, api: Api, *, is_media: bool = False) -> Answer:
    """Return a refusal in the dialect of the question.

    The JSON API answers a refused `alt=media` in plain text, not in JSON: clients show that text as the error.
    """
    if refusal.status == 304:
        answer = empty_answer(304)
    elif api is Api.XML:
        body = (
            "<?xml version='1.0' encoding='UTF-8'?>"
            f"<Error><Code>{refusal.code or refusal.reason}</Code><Message>{escape(refusal.message)}</Message></Error>"
        )
        answer = Answer(refusal.status, CIMultiDict({"Content-Type": "application/xml; charset=UTF-8"}), body.encode())
    elif is_media:
        headers = CIMultiDict({"Content-Type": "text/html; charset=UTF-8"})
        answer = Answer(refusal.status, headers, refusal.message.encode())
    else:
        error = {"message": refusal.message, "domain": "global", "reason": refusal.reason}
        value = {"error": {"code": refusal.status, "message": refusal.message, "errors": [error]}}
        answer = json_answer(value, refusal.status)
    answer.headers.extend(refusal.headers)
    return answer
