"""GCS without HTTP: buckets, access control, and the response to each request. Blocks only if a bucket does."""

import json

from gcs_prefetchd.testing.access_control import Access
from gcs_prefetchd.testing.counters import Kind
from gcs_prefetchd.testing.paths import Api, Target, is_bucket_name
from gcs_prefetchd.testing.preconditions import bad_condition
from gcs_prefetchd.testing.read_handlers import read_bucket, read_listing, read_object
from gcs_prefetchd.testing.requests import ParsedRequest
from gcs_prefetchd.testing.resources import bucket_resource
from gcs_prefetchd.testing.responses import Refusal, Response, json_response, refuse
from gcs_prefetchd.testing.stored_objects import Bucket, MemoryBucket
from gcs_prefetchd.testing.write_handlers import Writes, read_upload

__all__ = ["FakeGCS"]

_NO_BUCKET = Refusal(404, "notFound", "The specified bucket does not exist.", "NoSuchBucket")
_NOT_FOUND = Refusal(404, "notFound", "Not Found", "NotFound")
_BAD_BUCKET = Refusal(400, "invalid", "Invalid bucket name.", "InvalidBucketName")
_BUCKET_EXISTS = Refusal(409, "conflict", "Your previous request to create the named bucket succeeded.", "BucketAlreadyExists")


class FakeGCS:
    """Buckets and access rules; returns one response per request."""

    def __init__(self) -> None:
        self.buckets: dict[str, Bucket] = {}
        self.access = Access()
        self._writes = Writes()

    def bucket(self, name: str) -> Bucket:
        """Return a bucket; an empty one is created in memory if it does not exist."""
        return self.buckets.setdefault(name, MemoryBucket(name))

    def key(self, parsed: ParsedRequest, body: bytes) -> str:
        """Return the key that a request is counted under; uploads may name their object in the body."""
        if parsed.kind is not Kind.UPLOAD or parsed.target is None or parsed.target.name:
            return parsed.key
        name = self._writes.name_of(parsed, None if "upload_id" in parsed.query else read_upload(parsed, body))
        return f"{parsed.target.bucket}/{name}" if name else parsed.target.bucket

    def is_quick(self, parsed: ParsedRequest) -> bool:
        """Return whether the response reads no disk, or so little that a thread would cost more."""
        bucket = self.buckets.get(parsed.target.bucket) if parsed.target is not None else None
        return bucket is None or bucket.is_quick(parsed.target.name if parsed.target is not None else "")

    def respond(self, parsed: ParsedRequest, body: bytes, url: str) -> Response:
        """Return the response to a request; `url` is the server's own, for links."""
        target = parsed.target
        if target is None or parsed.kind is Kind.OTHER:
            return refuse(_NOT_FOUND, Api.JSON if target is None else target.api)
        is_media = parsed.kind is Kind.MEDIA
        refusal = self.access.refusal(parsed.kind, target.bucket, parsed.query, parsed.headers)
        refusal = refusal or bad_condition(parsed.query, parsed.headers)
        if refusal is not None:
            return refuse(refusal, target.api, is_media=is_media)
        if not target.bucket:
            return self._all_buckets(parsed, body, url)
        bucket = self.buckets.get(target.bucket)
        if bucket is None:
            return refuse(_NO_BUCKET, target.api, is_media=is_media)
        return self._of_bucket(bucket, target, parsed, body, url)

    def _of_bucket(self, bucket: Bucket, target: Target, parsed: ParsedRequest, body: bytes, url: str) -> Response:
        match parsed.kind:
            case Kind.MEDIA | Kind.METADATA:
                return read_object(bucket, target, parsed, url)
            case Kind.LIST:
                return read_listing(bucket, target, parsed, url)
            case Kind.UPLOAD:
                return self._writes.upload(bucket, target, parsed, body, url)
            case Kind.DELETE:
                return self._writes.delete(bucket, target, parsed)
            case _:
                return read_bucket(target, url)

    def _all_buckets(self, parsed: ParsedRequest, body: bytes, url: str) -> Response:
        if parsed.method != "POST":
            items = [bucket_resource(name, url) for name in sorted(self.buckets)]
            return json_response({"kind": "storage#buckets", "items": items})
        try:
            name = json.loads(body)["name"]
        except (ValueError, KeyError, TypeError):
            name = None
        if not isinstance(name, str) or not is_bucket_name(name):
            return refuse(_BAD_BUCKET, Api.JSON)
        if name in self.buckets:
            return refuse(_BUCKET_EXISTS, Api.JSON)
        self.bucket(name)
        return json_response(bucket_resource(name, url))
