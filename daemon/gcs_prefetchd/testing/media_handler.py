"""The response to a request for an object's bytes: ranges, gzip transcoding, headers. Pure but for reading the object."""

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from multidict import CIMultiDict

from gcs_prefetchd.testing.paths import Api
from gcs_prefetchd.testing.resources import media_headers
from gcs_prefetchd.testing.responses import Content, Refusal, Response, refuse
from gcs_prefetchd.testing.stored_objects import StoredObject

__all__ = ["ByteRange", "media_response", "parse_range"]

# Larger files are read piece by piece in a thread; reading a small one that is in the page cache takes less than
# handing it to a thread would.
INLINE_BYTES = 1 << 20
PIECE_BYTES = 1 << 18

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Part of an object, in bytes; `stop` is exclusive."""

    start: int
    stop: int


def parse_range(header: str | None, size_bytes: int) -> ByteRange | Refusal | None:
    """Return the range that a `Range` header requests, None for the complete object, a 416 if no byte is in range.

    Headers that are not a single byte range are ignored, as RFC 9110 requires.
    """
    matched = _RANGE.fullmatch(header.strip()) if header else None
    if matched is None or matched.group(0) == "bytes=-":
        return None
    first, last = matched.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size_bytes - int(last))
    stop = min(size_bytes, int(last) + 1) if first and last else size_bytes
    if start >= size_bytes:
        message = "The requested range cannot be satisfied."
        headers = (("Content-Range", f"bytes */{size_bytes}"),)
        return Refusal(416, "requestedRangeNotSatisfiable", message, "InvalidRange", headers)
    return ByteRange(start, stop)


def media_response(stored: StoredObject, api: Api, request_headers: Mapping[str, str]) -> Response:
    """Return the response with an object's bytes; `request_headers` decide range and encoding."""
    attributes = stored.attributes
    headers = media_headers(stored, api)
    if attributes.content_encoding == "gzip":
        headers["Vary"] = "Accept-Encoding"
        if not _accepts_gzip(request_headers) and "no-transform" not in (attributes.cache_control or ""):
            return _transcoded(stored, headers)
    if attributes.content_encoding:
        headers["Content-Encoding"] = attributes.content_encoding
    headers["Accept-Ranges"] = "bytes"
    part = parse_range(request_headers.get("Range"), stored.size_bytes)
    if isinstance(part, Refusal):
        return refuse(part, api, is_media=True)
    if part is None:
        return Response(200, headers, _body(stored, ByteRange(0, stored.size_bytes)))
    headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{stored.size_bytes}"
    return Response(206, headers, _body(stored, part))


def _accepts_gzip(request_headers: Mapping[str, str]) -> bool:
    codings = [coding.partition(";") for coding in request_headers.get("Accept-Encoding", "").lower().split(",")]
    return any(name.strip() in {"gzip", "*"} and weight.replace(" ", "") not in {"q=0", "q=0.0"} for name, _, weight in codings)


def _transcoded(stored: StoredObject, headers: CIMultiDict[str]) -> Response:
    """Return the object gunzipped, in chunks without a Content-Length and whatever the range, as GCS does."""
    headers["Warning"] = '214 UploadServer "gunzipped"'
    return Response(200, headers, Content(lambda: _gunzip(_pieces(stored, ByteRange(0, stored.size_bytes))), None))


def _body(stored: StoredObject, part: ByteRange) -> bytes | Content:
    size_bytes = part.stop - part.start
    if isinstance(stored.source, bytes) or size_bytes <= INLINE_BYTES:
        return stored.read(part.start, size_bytes)
    return Content(lambda: _pieces(stored, part), size_bytes)


def _pieces(stored: StoredObject, part: ByteRange) -> Iterator[bytes]:
    for start in range(part.start, part.stop, PIECE_BYTES):
        yield stored.read(start, min(PIECE_BYTES, part.stop - start))


def _gunzip(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what the gzip stream holds, a bounded piece at a time however well it is compressed."""
    inflater = zlib.decompressobj(wbits=31)
    for piece in pieces:
        rest = piece
        while rest:
            if inflater.eof:  # several gzip members in a row are one stream
                inflater = zlib.decompressobj(wbits=31)
            plain = inflater.decompress(rest, PIECE_BYTES)
            rest = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
            if plain:
                yield plain
    if plain := inflater.flush():
        yield plain
