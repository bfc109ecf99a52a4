"""Uploads and deletions: every upload makes a new generation."""

import secrets
from dataclasses import replace
from urllib.parse import quote

from multidict import CIMultiDict

from gcs_prefetchd.shared.errors import InvalidNameError
from gcs_prefetchd.testing.paths import Api, Target
from gcs_prefetchd.testing.preconditions import missing_object, unmet_for_writing
from gcs_prefetchd.testing.requests import ParsedRequest
from gcs_prefetchd.testing.resources import object_resource, xml_etag
from gcs_prefetchd.testing.responses import Refusal, Response, empty_response, json_response, refuse
from gcs_prefetchd.testing.stored_objects import Bucket, StoredObject, digests
from gcs_prefetchd.testing.uploads import (
    ResumableUpload,
    Upload,
    parse_content_range,
    read_announced,
    read_multipart,
    read_simple,
)

__all__ = ["Writes", "read_upload"]

_NO_UPLOAD = Refusal(400, "badRequest", "The upload cannot be parsed.", "InvalidArgument")
_NO_SESSION = Refusal(404, "notFound", "No such upload session.", "NoSuchUpload")


def read_upload(parsed: ParsedRequest, body: bytes) -> Upload | None:
    """Return the upload in a request's body (for a resumable one what it announces), or None if there is none."""
    if parsed.target is not None and parsed.target.api is Api.XML:
        return read_simple({"name": parsed.target.name}, parsed.headers, body)
    match parsed.query.get("uploadType"):
        case "media":
            return read_simple(parsed.query, parsed.headers, body)
        case "multipart":
            return read_multipart(parsed.query, parsed.headers, body)
        case "resumable":
            return read_announced(parsed.query, parsed.headers, body)
    return None


class Writes:
    """Performs uploads and deletions; holds the resumable uploads in progress."""

    def __init__(self) -> None:
        self._resumable: dict[str, ResumableUpload] = {}

    def name_of(self, parsed: ParsedRequest, upload: Upload | None) -> str:
        """Return the name of the object that a request uploads, or nothing."""
        session = self._resumable.get(parsed.query.get("upload_id", ""))
        named = upload if session is None else session.announced
        return "" if named is None else named.name

    def upload(self, bucket: Bucket, target: Target, parsed: ParsedRequest, body: bytes, url: str) -> Response:
        """Store an upload, or one step of a resumable one."""
        if "upload_id" in parsed.query:
            return self._resume(bucket, target, parsed, body, url)
        upload = read_upload(parsed, body)
        if upload is None:
            return refuse(_NO_UPLOAD, target.api)
        if parsed.query.get("uploadType") == "resumable" and target.api is not Api.XML:
            return self._announce(target, parsed, upload, url)
        return self._store(bucket, target, parsed, upload, url)

    def delete(self, bucket: Bucket, target: Target, parsed: ParsedRequest) -> Response:
        """Delete an object."""
        stored = bucket.get(target.name)
        if stored is None or parsed.query.get("generation", str(stored.generation)) != str(stored.generation):
            return refuse(missing_object(target.bucket, target.name), target.api)
        unmet = unmet_for_writing(stored, parsed.query, parsed.headers)
        if unmet is not None:
            return refuse(unmet, target.api)
        bucket.delete(target.name)
        return empty_response(204)

    def _announce(self, target: Target, parsed: ParsedRequest, upload: Upload, url: str) -> Response:
        upload_id = secrets.token_urlsafe(24)
        self._resumable[upload_id] = ResumableUpload(target.bucket, upload, dict(parsed.query))
        where = f"{url}/upload/storage/v1/b/{target.bucket}/o?uploadType=resumable&name={quote(upload.name, safe='')}"
        headers = CIMultiDict({"Location": f"{where}&upload_id={upload_id}", "X-GUploader-UploadID": upload_id})
        return Response(200, headers)

    def _resume(self, bucket: Bucket, target: Target, parsed: ParsedRequest, body: bytes, url: str) -> Response:
        session = self._resumable.get(parsed.query["upload_id"])
        if session is None or session.bucket != target.bucket:
            return refuse(_NO_SESSION, target.api)
        part = parse_content_range(parsed.headers.get("Content-Range"), len(body))
        if part is None or (part.start is not None and part.start > len(session.received)):
            return refuse(_NO_UPLOAD, target.api)
        if part.start is not None:
            session.received[part.start :] = body
        if part.total_bytes is None or part.total_bytes != len(session.received):
            received = CIMultiDict({"Range": f"bytes=0-{len(session.received) - 1}"} if session.received else {})
            return Response(308, received)
        del self._resumable[parsed.query["upload_id"]]
        return self._store(bucket, target, replace(parsed, query=session.query), session.finish(), url)

    def _store(self, bucket: Bucket, target: Target, parsed: ParsedRequest, upload: Upload, url: str) -> Response:
        refusal = unmet_for_writing(bucket.get(upload.name), parsed.query, parsed.headers) or _broken(upload)
        if refusal is not None:
            return refuse(refusal, target.api)
        try:
            stored = bucket.put(upload.name, upload.data, upload.attributes)
        except InvalidNameError as exc:
            return refuse(Refusal(400, "invalid", str(exc), "InvalidArgument"), target.api)
        return _stored_response(stored, target, url)


def _broken(upload: Upload) -> Refusal | None:
    """Return a 400 if the bytes are not those that the uploader hashed, or None."""
    if upload.crc32c is None and upload.md5 is None:
        return None
    crc32c, md5 = digests([upload.data])
    for word, claimed, right in (("CRC32C", upload.crc32c, crc32c), ("MD5 hash", upload.md5, md5)):
        if claimed is not None and claimed != right:
            message = f'Provided {word} "{claimed}" doesn\'t match calculated {word} "{right}".'
            return Refusal(400, "invalid", message, "BadDigest")
    return None


def _stored_response(stored: StoredObject, target: Target, url: str) -> Response:
    if target.api is not Api.XML:
        return json_response(object_resource(stored, url))
    headers = {"ETag": xml_etag(stored), "x-goog-generation": str(stored.generation), "x-goog-metageneration": "1"}
    return Response(200, CIMultiDict(headers))
