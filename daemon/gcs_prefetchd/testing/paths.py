"""What a raw request path names: parsed strictly, percent-decoded exactly once."""

import re
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import unquote_to_bytes

__all__ = ["Api", "Target", "is_bucket_name", "parse_path", "parse_query"]

_BUCKET = re.compile(r"[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


class Api(StrEnum):
    """The APIs of GCS that clients use."""

    JSON = "json"  # /storage/v1/b/B/o/O
    DOWNLOAD = "download"  # /download/storage/v1/b/B/o/O
    UPLOAD = "upload"  # /upload/storage/v1/b/B/o
    XML = "xml"  # /B/O


_JSON_ROOTS = (
    ("/storage/v1/b", Api.JSON),
    ("/download/storage/v1/b", Api.DOWNLOAD),
    ("/upload/storage/v1/b", Api.UPLOAD),
    ("/resumable/upload/storage/v1/b", Api.UPLOAD),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A bucket, its listing (`is_listing`) or an object; an empty bucket is the list of buckets."""

    api: Api
    bucket: str = ""
    name: str = ""
    is_listing: bool = False


def is_bucket_name(bucket: str) -> bool:
    """Return whether GCS allows a bucket of this name (without its finer rules)."""
    return _BUCKET.fullmatch(bucket) is not None


def parse_path(path: str) -> Target | None:
    """Return what a raw path (without the query) names, or None when it names nothing that GCS would serve.

    In JSON paths a slash of an object's name must be sent as %2F; in XML paths it may be sent literally.
    """
    for root, api in _JSON_ROOTS:
        if path == root or path.startswith(root + "/"):
            return _json_target(api, path[len(root) + 1 :])
    return _xml_target(path)


def parse_query(query: str) -> dict[str, str] | None:
    """Return the parameters of a raw query string, or None when it is not valid; the last value wins if one is repeated."""
    parameters = {}
    for part in query.split("&") if query else ():
        key, _, value = part.partition("=")
        decoded_key, decoded_value = _decode(key.replace("+", " ")), _decode(value.replace("+", " "))
        if decoded_key is None or decoded_value is None:
            return None
        parameters[decoded_key] = decoded_value
    return parameters


def _json_target(api: Api, rest: str) -> Target | None:
    if not rest:
        return Target(api)
    parts = rest.split("/")
    bucket = _decode(parts[0])
    if bucket is None or not is_bucket_name(bucket):
        return None
    match parts[1:]:
        case []:
            return Target(api, bucket)
        case ["o"] | ["o", ""]:
            return Target(api, bucket, is_listing=True)
        case ["o", quoted]:
            name = _decode(quoted)
            return None if name is None else Target(api, bucket, name)
        case _:
            return None


def _xml_target(path: str) -> Target | None:
    bucket, _, quoted = path.removeprefix("/").partition("/")
    name = _decode(quoted)
    if name is None or not is_bucket_name(bucket):
        return None
    return Target(Api.XML, bucket, name, is_listing=not name)


def _decode(quoted: str) -> str | None:
    """Percent-decode once; None for a stray % or what is not UTF-8, which must not become some other name."""
    if quoted.isascii() and "%" not in quoted:
        return quoted
    if _BAD_ESCAPE.search(quoted):
        return None
    try:
        # aiohttp hands over raw bytes above 127 as surrogates.
        return unquote_to_bytes(quoted.encode("utf-8", "surrogateescape")).decode("utf-8")
    except UnicodeError:
        return None
