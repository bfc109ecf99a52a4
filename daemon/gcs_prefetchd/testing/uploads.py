"""Uploads: what a client sends (media, multipart, resumable) as a name, bytes and attributes. Pure."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gcs_prefetchd.testing.stored_objects import Attributes

__all__ = [
    "ContentRange",
    "ResumableUpload",
    "Upload",
    "parse_content_range",
    "read_announced",
    "read_multipart",
    "read_simple",
]

_BOUNDARY = re.compile(r'boundary="?([^";]+)"?', re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_DEFAULT_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Upload:
    """An object as it arrives; the hashes are the uploader's, in base64."""

    name: str
    data: bytes
    attributes: Attributes
    crc32c: str | None = None
    md5: str | None = None


@dataclass(slots=True)
class ResumableUpload:
    """A resumable upload in progress: what was announced, and the bytes so far."""

    bucket: str
    announced: Upload
    query: Mapping[str, str]
    received: bytearray = field(default_factory=bytearray)

    def finish(self) -> Upload:
        """Return the upload with all its bytes."""
        announced = self.announced
        return Upload(announced.name, bytes(self.received), announced.attributes, announced.crc32c, announced.md5)


@dataclass(frozen=True, slots=True)
class ContentRange:
    """Where a piece of a resumable upload belongs; `start` is None if it only queries the state, `total_bytes` if unknown."""

    start: int | None
    total_bytes: int | None


def parse_content_range(header: str | None, length_bytes: int) -> ContentRange | None:
    """Return what a `Content-Range` header states about a piece of `length_bytes`; without one the piece is complete."""
    if header is None:
        return ContentRange(0, length_bytes)
    matched = _CONTENT_RANGE.fullmatch(header.strip())
    if matched is None:
        return None
    first, last, total = matched.groups()
    if first is not None and int(last) - int(first) + 1 != length_bytes:
        return None
    return ContentRange(None if first is None else int(first), None if total == "*" else int(total))


def read_simple(query: Mapping[str, str], headers: Mapping[str, str], data: bytes) -> Upload:
    """Return an `uploadType=media` upload."""
    attributes = Attributes(
        content_type=headers.get("Content-Type", _DEFAULT_TYPE),
        content_encoding=query.get("contentEncoding") or headers.get("Content-Encoding"),
        cache_control=headers.get("Cache-Control"),
    )
    return _with_hashes(query.get("name", ""), data, attributes, {}, headers)


def read_announced(query: Mapping[str, str], headers: Mapping[str, str], body: bytes) -> Upload | None:
    """Return what starts a resumable upload, without its bytes; None if the metadata is not a JSON object."""
    return _described(query, headers, body, b"", headers.get("X-Upload-Content-Type"))


def read_multipart(query: Mapping[str, str], headers: Mapping[str, str], body: bytes) -> Upload | None:
    """Return an `uploadType=multipart` upload, or None when the body is not the two parts that it must be."""
    boundary = _BOUNDARY.search(headers.get("Content-Type", ""))
    parts = _split(body, b"--" + boundary[1].encode()) if boundary else []
    if len(parts) != 2:
        return None
    (_, metadata), (part_headers, data) = parts
    return _described(query, headers, metadata, data, part_headers.get("content-type"))


def _described(
    query: Mapping[str, str], headers: Mapping[str, str], metadata: bytes, data: bytes, content_type: str | None
) -> Upload | None:
    try:
        described = json.loads(metadata or b"{}")
    except ValueError:
        return None
    if not isinstance(described, dict):
        return None
    attributes = Attributes(
        content_type=str(described.get("contentType") or content_type or _DEFAULT_TYPE),
        content_encoding=described.get("contentEncoding"),
        cache_control=described.get("cacheControl"),
        metadata={str(key): str(value) for key, value in (described.get("metadata") or {}).items()},
    )
    return _with_hashes(str(described.get("name") or query.get("name", "")), data, attributes, described, headers)


def _with_hashes(
    name: str, data: bytes, attributes: Attributes, described: Mapping[str, str], headers: Mapping[str, str]
) -> Upload:
    claimed = dict(part.strip().split("=", 1) for part in headers.get("x-goog-hash", "").split(",") if "=" in part)
    crc32c = described.get("crc32c") or claimed.get("crc32c")
    md5 = described.get("md5Hash") or claimed.get("md5") or headers.get("Content-MD5")
    return Upload(name, data, attributes, crc32c, md5)


def _split(body: bytes, delimiter: bytes) -> list[tuple[dict[str, str], bytes]]:
    """Split a multipart body; its lines end as the first one does, since gcsfs ends them with a bare LF."""
    first = body.find(delimiter)
    if first < 0:
        return []
    newline = b"\r\n" if body.startswith(delimiter + b"\r\n", first) else b"\n"
    parts = []
    for part in body[first + len(delimiter) :].split(newline + delimiter)[:-1]:
        # What follows the delimiter's own line end: header lines, if any, an empty line, the data.
        head, _, data = part.partition(newline * 2)
        lines = (line.decode("latin-1").partition(":") for line in head.removeprefix(newline).split(newline))
        parts.append(({key.strip().lower(): value.strip() for key, _, value in lines}, data))
    return parts
