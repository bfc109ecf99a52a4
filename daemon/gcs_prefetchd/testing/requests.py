"""Parsing a request: method, raw path, query and headers. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from gcs_prefetchd.testing.counters import Kind
from gcs_prefetchd.testing.paths import Api, Target, parse_path, parse_query

__all__ = ["ParsedRequest", "parse_request"]


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """One request to GCS; `target` is None if the path names nothing."""

    method: str
    path: str
    target: Target | None
    query: Mapping[str, str]
    headers: Mapping[str, str]
    kind: Kind

    @property
    def key(self) -> str:
        """The key that the request is counted under: `bucket/name`, a bucket, or the path."""
        if self.target is None or not self.target.bucket:
            return self.path
        return f"{self.target.bucket}/{self.target.name}" if self.target.name else self.target.bucket


def parse_request(method: str, raw_path: str, headers: Mapping[str, str]) -> ParsedRequest:
    """Parse a request."""
    path, _, raw_query = raw_path.partition("?")
    query = parse_query(raw_query)
    target = None if query is None else parse_path(path)
    kind = Kind.OTHER if target is None else _kind(method, target, query or {})
    return ParsedRequest(method, path, target, query or {}, headers, kind)


def _kind(method: str, target: Target, query: Mapping[str, str]) -> Kind:
    match method, target:
        case "GET", Target(api=Api.JSON, name=name) if name:
            return Kind.MEDIA if query.get("alt") == "media" else Kind.METADATA
        case "GET", Target(api=Api.XML | Api.DOWNLOAD, name=name) if name:
            return Kind.MEDIA
        case "HEAD", Target(name=name) if name:
            return Kind.METADATA
        case "GET", Target(api=Api.JSON | Api.XML, is_listing=True):
            return Kind.LIST
        case (("GET" | "HEAD" | "POST"), Target(api=Api.JSON | Api.XML, is_listing=False)):
            return Kind.BUCKET if not target.name else Kind.OTHER
        case "HEAD", Target(api=Api.XML, is_listing=True):
            return Kind.BUCKET
        case (("POST" | "PUT"), Target(api=Api.UPLOAD, is_listing=True)):
            return Kind.UPLOAD
        case "PUT", Target(api=Api.XML, name=name) if name:
            return Kind.UPLOAD
        case "DELETE", Target(api=Api.JSON | Api.XML, name=name) if name:
            return Kind.DELETE
    return Kind.OTHER
