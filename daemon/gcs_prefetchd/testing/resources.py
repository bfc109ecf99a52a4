"""How GCS describes objects, buckets and listings: JSON resources, XML documents, response headers."""

import base64
from collections.abc import Sequence
from datetime import datetime
from email.utils import format_datetime
from urllib.parse import quote
from xml.sax.saxutils import escape

from multidict import CIMultiDict

from gcs_prefetchd.testing.paths import Api
from gcs_prefetchd.testing.stored_objects import StoredObject

__all__ = ["bucket_resource", "media_headers", "object_resource", "rfc3339", "xml_listing"]


def object_resource(stored: StoredObject, url: str) -> dict[str, object]:
    """Return an object as the JSON API describes it; `url` is the server's own."""
    attributes, updated = stored.attributes, rfc3339(stored.updated)
    path = f"/storage/v1/b/{stored.bucket}/o/{quote_name(stored.name)}"
    resource: dict[str, object] = {
        "kind": "storage#object",
        "id": f"{stored.bucket}/{stored.name}/{stored.generation}",
        "selfLink": url + path,
        "mediaLink": f"{url}/download{path}?generation={stored.generation}&alt=media",
        "name": stored.name,
        "bucket": stored.bucket,
        "generation": str(stored.generation),
        "metageneration": "1",
        "contentType": attributes.content_type,
        "storageClass": "STANDARD",
        "size": str(stored.size_bytes),
        "crc32c": stored.crc32c,
        "etag": json_etag(stored),
        "timeCreated": updated,
        "updated": updated,
        "timeStorageClassUpdated": updated,
    }
    optional = {
        "md5Hash": stored.md5,
        "componentCount": 2 if attributes.composite else None,
        "contentEncoding": attributes.content_encoding,
        "cacheControl": attributes.cache_control,
        "metadata": dict(attributes.metadata) or None,
    }
    return resource | {key: value for key, value in optional.items() if value is not None}


def bucket_resource(bucket: str, url: str) -> dict[str, object]:
    """Return a bucket as the JSON API describes it."""
    return {
        "kind": "storage#bucket",
        "id": bucket,
        "name": bucket,
        "selfLink": f"{url}/storage/v1/b/{bucket}",
        "projectNumber": "0",
        "location": "US",
        "locationType": "multi-region",
        "storageClass": "STANDARD",
        "metageneration": "1",
        "etag": "CAE=",
        "timeCreated": "2020-01-01T00:00:00.000Z",
        "updated": "2020-01-01T00:00:00.000Z",
    }


def media_headers(stored: StoredObject, api: Api) -> CIMultiDict[str]:
    """Return the headers that every response with an object's bytes carries; the caller adds lengths and encoding."""
    attributes = stored.attributes
    headers = CIMultiDict(
        {
            "Content-Type": attributes.content_type,
            "ETag": xml_etag(stored) if api is Api.XML else json_etag(stored),
            "Last-Modified": format_datetime(stored.updated, usegmt=True),
            "Cache-Control": attributes.cache_control or "private, max-age=0",
            "x-goog-generation": str(stored.generation),
            "x-goog-metageneration": "1",
            "x-goog-storage-class": "STANDARD",
            "x-goog-stored-content-encoding": attributes.content_encoding or "identity",
            "x-goog-stored-content-length": str(stored.size_bytes),
        }
    )
    hashes = [f"crc32c={stored.crc32c}"] + ([f"md5={stored.md5}"] if stored.md5 else [])
    # The XML API sends one header line for each hash, the JSON API one line for both: a client must read either.
    for value in hashes if api is Api.XML else [",".join(hashes)]:
        headers.add("x-goog-hash", value)
    for key, value in attributes.metadata.items():
        headers.add(f"x-goog-meta-{key}", value)
    return headers


def xml_listing(bucket: str, found: Sequence[StoredObject], prefixes: Sequence[str], token: str | None) -> bytes:
    """Return a page of a listing as the XML API's `list-type=2` sends it."""
    contents = "".join(
        f"<Contents><Key>{escape(stored.name)}</Key><Generation>{stored.generation}</Generation>"
        f"<MetaGeneration>1</MetaGeneration><LastModified>{rfc3339(stored.updated)}</LastModified>"
        f"<ETag>{escape(xml_etag(stored))}</ETag><Size>{stored.size_bytes}</Size></Contents>"
        for stored in found
    )
    folders = "".join(f"<CommonPrefixes><Prefix>{escape(prefix)}</Prefix></CommonPrefixes>" for prefix in prefixes)
    more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return (
        "<?xml version='1.0' encoding='UTF-8'?><ListBucketResult xmlns='http://doc.s3.amazonaws.com/2006-03-01'>"
        f"<Name>{bucket}</Name><KeyCount>{len(found) + len(prefixes)}</KeyCount>"
        f"<IsTruncated>{'true' if token else 'false'}</IsTruncated>{more}{contents}{folders}</ListBucketResult>"
    ).encode()


def rfc3339(when: datetime) -> str:
    """Return a time as the JSON API writes it, in UTC with milliseconds."""
    return when.strftime("%Y-%m-%dT%H:%M:%S.") + f"{when.microsecond // 1000:03d}Z"


def json_etag(stored: StoredObject) -> str:
    """Return the JSON API's ETag: base64 of generation and metageneration as a protocol buffer."""
    rest, varint = stored.generation, bytearray()
    while rest > 0x7F:
        varint.append(rest & 0x7F | 0x80)
        rest >>= 7
    varint.append(rest)
    return base64.b64encode(b"\x08" + bytes(varint) + b"\x10\x01").decode()


def xml_etag(stored: StoredObject) -> str:
    """Return the XML API's ETag: the MD5 in hex, in quotes; composite objects, which have none, get the other kind."""
    return f'"{json_etag(stored) if stored.md5 is None else base64.b64decode(stored.md5).hex()}"'


def quote_name(name: str) -> str:
    """Return an object's name as it stands in a JSON path, slashes included."""
    return quote(name, safe="")
