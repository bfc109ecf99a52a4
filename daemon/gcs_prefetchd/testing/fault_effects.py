"""How a fault changes a response. Pure."""

from multidict import CIMultiDict

from gcs_prefetchd.testing.faults import (
    EmptyBody,
    FlippedByte,
    HtmlPage,
    LongBody,
    MalformedHash,
    MissingHash,
    Partial,
    ResponseFault,
    Status,
    WrongGeneration,
)
from gcs_prefetchd.testing.responses import Response

__all__ = ["alter", "read_body"]


def alter(response: Response, fault: ResponseFault) -> Response:
    """Return the response that a client gets under `fault` instead of the right one."""
    match fault:
        case Status():
            headers = CIMultiDict({"Content-Type": fault.content_type})
            if fault.retry_after is not None:
                headers["Retry-After"] = fault.retry_after
            if fault.location is not None:
                headers["Location"] = fault.location
            return Response(fault.status, headers, fault.body.encode())
        case HtmlPage():
            return Response(200, CIMultiDict({"Content-Type": "text/html; charset=UTF-8"}), fault.body.encode())
        case EmptyBody():
            return Response(200, response.headers)
        case Partial():
            return _part(read_body(response), response.headers.copy(), fault)
        case FlippedByte() | LongBody():
            return Response(response.status, response.headers, _damaged(read_body(response), fault))
        case MissingHash() | MalformedHash() | WrongGeneration():
            return Response(response.status, _mislabelled(response.headers, fault), response.body)


def read_body(response: Response) -> bytes:
    """Return a response's body in one piece; blocks if the object is a file on disk."""
    return response.body if isinstance(response.body, bytes) else b"".join(response.body.chunks())


def _part(body: bytes, headers: CIMultiDict[str], fault: Partial) -> Response:
    part = body[fault.first : fault.last + 1]
    headers["Content-Range"] = f"bytes {fault.first}-{fault.first + len(part) - 1}/{len(body)}"
    return Response(206, headers, part)


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
