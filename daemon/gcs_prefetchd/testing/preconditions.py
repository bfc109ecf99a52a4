"""Preconditions of a request, by generation or by ETag. Pure."""

from collections.abc import Mapping

from gcs_prefetchd.testing.resources import json_etag, xml_etag
from gcs_prefetchd.testing.responses import Refusal
from gcs_prefetchd.testing.stored_objects import StoredObject

__all__ = ["bad_condition", "missing_object", "unmet_for_reading", "unmet_for_writing"]

_PARAMETERS = ("generation", "ifGenerationMatch", "ifGenerationNotMatch", "ifMetagenerationMatch")
_HEADERS = {
    "x-goog-if-generation-match": "ifGenerationMatch",
    "x-goog-if-metageneration-match": "ifMetagenerationMatch",
}
_UNMET = Refusal(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.", "PreconditionFailed")
_NOT_MODIFIED = Refusal(304, "notModified", "Not Modified")


def missing_object(bucket: str, name: str) -> Refusal:
    """Return GCS's 404 for an object."""
    return Refusal(404, "notFound", f"No such object: {bucket}/{name}", "NoSuchKey")


def bad_condition(query: Mapping[str, str], headers: Mapping[str, str]) -> Refusal | None:
    """Return a 400 for a generation that is not a number, or None."""
    for key, value in _conditions(query, headers).items():
        if not (value.isascii() and value.isdigit()):
            message = f"Invalid value for: Expected an integer for '{key}', got '{value}'."
            return Refusal(400, "invalidParameter", message, "InvalidArgument")
    return None


def unmet_for_reading(stored: StoredObject, query: Mapping[str, str], headers: Mapping[str, str]) -> Refusal | None:
    """Return why a read of `stored` is refused, or None."""
    conditions = _conditions(query, headers)
    generation, metageneration = str(stored.generation), "1"
    if conditions.get("generation", generation) != generation:
        return missing_object(stored.bucket, f"{stored.name}#{conditions['generation']}")
    if conditions.get("ifGenerationMatch", generation) != generation:
        return _UNMET
    if conditions.get("ifMetagenerationMatch", metageneration) != metageneration:
        return _UNMET
    etags = {json_etag(stored), f'"{json_etag(stored)}"', xml_etag(stored), "*"}
    if "If-Match" in headers and etags.isdisjoint(_etags(headers["If-Match"])):
        return _UNMET
    if conditions.get("ifGenerationNotMatch") == generation:
        return _NOT_MODIFIED
    if "If-None-Match" in headers and not etags.isdisjoint(_etags(headers["If-None-Match"])):
        return _NOT_MODIFIED
    return None


def unmet_for_writing(stored: StoredObject | None, query: Mapping[str, str], headers: Mapping[str, str]) -> Refusal | None:
    """Return why an upload or a deletion may not replace `stored` (None: there is no such object), or None."""
    conditions = _conditions(query, headers)
    generation = "0" if stored is None else str(stored.generation)
    if conditions.get("ifGenerationMatch", generation) != generation:
        return _UNMET
    return _UNMET if conditions.get("ifGenerationNotMatch") == generation else None


def _conditions(query: Mapping[str, str], headers: Mapping[str, str]) -> dict[str, str]:
    conditions = {key: query[key] for key in _PARAMETERS if key in query}
    for header, key in _HEADERS.items():
        if header in headers:
            conditions[key] = headers[header]
    return conditions


def _etags(header: str) -> set[str]:
    return {etag.strip().removeprefix("W/") for etag in header.split(",")}
