"""GCS without HTTP: its buckets, who may ask, and the answer to each request. Blocks only where a bucket does."""

import json

from gcs_prefetchd.testing.access_control import Access
from gcs_prefetchd.testing.counters import Kind
from gcs_prefetchd.testing.paths import Api, Target, is_bucket_name
from gcs_prefetchd.testing.preconditions import bad_condition
from gcs_prefetchd.testing.read_handlers import read_bucket, read_listing, read_object
from gcs_prefetchd.testing.requests import Ask
from gcs_prefetchd.testing.resources import bucket_resource
from gcs_prefetchd.testing.responses import Answer, Refusal, json_answer, refuse
from gcs_prefetchd.testing.stored_objects import Bucket, MemoryBucket
from gcs_prefetchd.testing.write_handlers import Writes, read_upload

__all__ = ["Service"]

_NO_BUCKET = Refusal(404, "notFound", "The specified bucket does not exist.", "NoSuchBucket")
_NOT_FOUND = Refusal(404, "notFound", "Not Found", "NotFound")
_BAD_BUCKET = Refusal(400, "invalid", "Invalid bucket name.", "InvalidBucketName")
_TAKEN = Refusal(409, "conflict", "Your previous request to create the named bucket succeeded.", "BucketAlreadyExists")


class Service:
    """What the server knows and demands; one answer to each request."""

    def __init__(self) -> None:
        self.buckets: dict[str, Bucket] = {}
        self.access = Access()
        self._writes = Writes()

    def bucket(self, name: str) -> Bucket:
        """Return a bucket, made empty in memory where there is none."""
        return self.buckets.setdefault(name, MemoryBucket(name))

    def key(self, ask: Ask, body: bytes) -> str:
        """Return what a request is counted under; uploads may name their object in the body."""
        if ask.kind is not Kind.UPLOAD or ask.target is None or ask.target.name:
            return ask.key
        name = self._writes.name_of(ask, None if "upload_id" in ask.query else read_upload(ask, body))
        return f"{ask.target.bucket}/{name}" if name else ask.target.bucket

    def is_quick(self, ask: Ask) -> bool:
        """Tell whether the answer reads no disk, or so little that a thread would cost more."""
        bucket = self.buckets.get(ask.target.bucket) if ask.target is not None else None
        return bucket is None or bucket.is_quick(ask.target.name if ask.target is not None else "")

    def answer(self, ask: Ask, body: bytes, url: str) -> Answer:
        """Return the answer to a request; `url` is the server's own, for links."""
        target = ask.target
        if target is None or ask.kind is Kind.OTHER:
            return refuse(_NOT_FOUND, Api.JSON if target is None else target.api)
        is_media = ask.kind is Kind.MEDIA
        refusal = self.access.refusal(ask.kind, target.bucket, ask.query, ask.headers)
        refusal = refusal or bad_condition(ask.query, ask.headers)
        if refusal is not None:
            return refuse(refusal, target.api, is_media=is_media)
        if not target.bucket:
            return self._all_buckets(ask, body, url)
        bucket = self.buckets.get(target.bucket)
        if bucket is None:
            return refuse(_NO_BUCKET, target.api, is_media=is_media)
        return self._of_bucket(bucket, target, ask, body, url)

    def _of_bucket(self, bucket: Bucket, target: Target, ask: Ask, body: bytes, url: str) -> Answer:
        match ask.kind:
            case Kind.MEDIA | Kind.METADATA:
                return read_object(bucket, target, ask, url)
            case Kind.LIST:
                return read_listing(bucket, target, ask, url)
            case Kind.UPLOAD:
                return self._writes.upload(bucket, target, ask, body, url)
            case Kind.DELETE:
                return self._writes.delete(bucket, target, ask)
            case _:
                return read_bucket(target, url)

    def _all_buckets(self, ask: Ask, body: bytes, url: str) -> Answer:
        if ask.method != "POST":
            items = [bucket_resource(name, url) for name in sorted(self.buckets)]
            return json_answer({"kind": "storage#buckets", "items": items})
        try:
            name = json.loads(body)["name"]
        except (ValueError, KeyError, TypeError):
            name = None
        if not isinstance(name, str) or not is_bucket_name(name):
            return refuse(_BAD_BUCKET, Api.JSON)
        if name in self.buckets:
            return refuse(_TAKEN, Api.JSON)
        self.bucket(name)
        return json_answer(bucket_resource(name, url))
