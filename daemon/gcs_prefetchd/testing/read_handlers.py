"""Responses to requests that change nothing: buckets, listings, objects' metadata and media."""

from collections.abc import Mapping

from multidict import CIMultiDict

from gcs_prefetchd.testing.counters import Kind
from gcs_prefetchd.testing.listing import MAX_RESULTS, ListQuery, list_page
from gcs_prefetchd.testing.media_handler import media_response
from gcs_prefetchd.testing.paths import Api, Target
from gcs_prefetchd.testing.preconditions import missing_object, unmet_for_reading
from gcs_prefetchd.testing.requests import ParsedRequest
from gcs_prefetchd.testing.resources import bucket_resource, media_headers, object_resource, xml_listing
from gcs_prefetchd.testing.responses import Refusal, Response, json_response, refuse
from gcs_prefetchd.testing.stored_objects import Bucket, StoredObject

__all__ = ["read_bucket", "read_listing", "read_object"]


def read_bucket(target: Target, url: str) -> Response:
    """Return the description of a bucket that exists."""
    return json_response(bucket_resource(target.bucket, url))


def read_object(bucket: Bucket, target: Target, parsed: ParsedRequest, url: str) -> Response:
    """Return an object's bytes or its description, as requested, if the preconditions hold."""
    is_media = parsed.kind is Kind.MEDIA
    stored = bucket.get(target.name)
    if stored is None:
        return refuse(missing_object(target.bucket, target.name), target.api, is_media=is_media)
    unmet = unmet_for_reading(stored, parsed.query, parsed.headers)
    if unmet is not None:
        return refuse(unmet, target.api, is_media=is_media)
    if is_media:
        return media_response(stored, target.api, parsed.headers)
    if target.api is Api.JSON:
        return json_response(object_resource(stored, url))
    return _head(stored, target.api)


def read_listing(bucket: Bucket, target: Target, parsed: ParsedRequest, url: str) -> Response:
    """Return a page of a bucket's listing."""
    query = list_query(parsed.query, target.api)
    if isinstance(query, Refusal):
        return refuse(query, target.api)
    page = list_page(bucket.names(), query)
    if page is None:
        bad_token = Refusal(400, "invalid", f"Invalid value for: pageToken '{query.page_token}'.", "InvalidArgument")
        return refuse(bad_token, target.api)
    # A file on disk may have been deleted since the names were read.
    found = [stored for name in page.names if (stored := bucket.get(name)) is not None]
    if target.api is Api.XML:
        headers = CIMultiDict({"Content-Type": "application/xml; charset=UTF-8"})
        return Response(200, headers, xml_listing(target.bucket, found, page.prefixes, page.next_page_token))
    value: dict[str, object] = {"kind": "storage#objects"}
    if page.next_page_token:
        value["nextPageToken"] = page.next_page_token
    if page.prefixes:
        value["prefixes"] = list(page.prefixes)
    if found:
        value["items"] = [object_resource(stored, url) for stored in found]
    return json_response(value)


def list_query(query: Mapping[str, str], api: Api) -> ListQuery | Refusal:
    """Return the parameters of a listing, from either API's names."""
    names = ("max-keys", "continuation-token") if api is Api.XML else ("maxResults", "pageToken")
    limit, token = (query.get(name, "") for name in names)
    if limit and not (limit.isascii() and limit.isdigit()):
        return Refusal(400, "invalidParameter", f"Invalid unsigned integer value: '{limit}'.", "InvalidArgument")
    # The XML API starts after a name, the JSON API at it: the next name there can be is that one and a zero byte.
    start = query["start-after"] + "\0" if query.get("start-after") else query.get("startOffset", "")
    return ListQuery(
        prefix=query.get("prefix", ""),
        delimiter=query.get("delimiter", ""),
        start_offset=start,
        end_offset=query.get("endOffset", ""),
        max_results=int(limit or 0) or MAX_RESULTS,
        page_token=token,
        include_trailing_delimiter=query.get("includeTrailingDelimiter") == "true",
    )


def _head(stored: StoredObject, api: Api) -> Response:
    headers = media_headers(stored, api)
    headers["Accept-Ranges"] = "bytes"
    headers["Content-Length"] = str(stored.size_bytes)
    if stored.attributes.content_encoding:
        headers["Content-Encoding"] = stored.attributes.content_encoding
    return Response(200, headers)
