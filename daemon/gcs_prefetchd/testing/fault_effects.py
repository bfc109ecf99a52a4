"""What a fault makes of an answer: pure."""

from multidict import CIMultiDict

from gcs_prefetchd.testing.faults import (
    AnswerFault,
    EmptyBody,
    FlippedByte,
    HtmlPage,
    LongBody,
    MalformedHash,
    MissingHash,
    Partial,
    Status,
    WrongGeneration,
)
from gcs_prefetchd.testing.responses import Answer

__all__ = ["alter", "whole_body"]


def alter(answer: Answer, fault: AnswerFault) -> Answer:
    """Return the answer that a client gets under `fault` in place of the right one."""
    match fault:
        case Status():
            headers = CIMultiDict({"Content-Type": fault.content_type})
            if fault.retry_after is not None:
                headers["Retry-After"] = fault.retry_after
            if fault.location is not None:
                headers["Location"] = fault.location
            return Answer(fault.status, headers, fault.body.encode())
        case HtmlPage():
            return Answer(200, CIMultiDict({"Content-Type": "text/html; charset=UTF-8"}), fault.body.encode())
        case EmptyBody():
            return Answer(200, answer.headers)
        case Partial():
            return _part(whole_body(answer), answer.headers.copy(), fault)
        case FlippedByte() | LongBody():
            return Answer(answer.status, answer.headers, _damaged(whole_body(answer), fault))
        case MissingHash() | MalformedHash() | WrongGeneration():
            return Answer(answer.status, _mislabelled(answer.headers, fault), answer.body)


def whole_body(answer: Answer) -> bytes:
    """Return an answer's body in one piece; blocks when the object is a file on disk."""
    return answer.body if isinstance(answer.body, bytes) else b"".join(answer.body.chunks())


def _part(body: bytes, headers: CIMultiDict[str], fault: Partial) -> Answer:
    part = body[fault.first : fault.last + 1]
    headers["Content-Range"] = f"bytes {fault.first}-{fault.first + len(part) - 1}/{len(body)}"
    return Answer(206, headers, part)


def _damaged(body: bytes, fault: FlippedByte | LongBody) -> bytes:
    if isinstance(fault, LongBody):
        return body + b"\0" * fault.extra_bytes
    if not body:
        return body
    damaged = bytearray(body)
    damaged[len(body) // 2 if fault.at is None else min(fault.at, len(body) - 1)] ^= 1
    return bytes(damaged)


def _mislabelled(headers: CIMultiDict[str], fault: MissingHash | MalformedHash | WrongGeneration) -> CIMultiDict[str]:
    changed = headers.copy()
    if isinstance(fault, WrongGeneration):
        right = int(headers.get("x-goog-generation", "0"))
        changed["x-goog-generation"] = str(right + 1 if fault.generation is None else fault.generation)
        return changed
    changed.popall("x-goog-hash", None)
    if isinstance(fault, MalformedHash):
        changed["x-goog-hash"] = fault.value
    return changed
