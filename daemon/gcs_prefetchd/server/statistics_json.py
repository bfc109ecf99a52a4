"""The statistics as JSON: what `/stats` returns, and what the command line reads. Pure."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from gcs_prefetchd.server.statistics import Statistics
from gcs_prefetchd.shared.errors import ProtocolError

__all__ = ["from_json", "to_json"]


def to_json(statistics: Statistics) -> dict[str, Any]:
    """The statistics as objects, lists, texts and numbers of JSON."""
    return _jsonable(statistics)  # type: ignore[no-any-return]  # a dict, as Statistics is a dataclass


def from_json(data: Mapping[str, Any]) -> Statistics:
    """The statistics that `/stats` returned. Ignores unknown fields; raises ProtocolError if one is missing."""
    return _built(Statistics, data)  # type: ignore[no-any-return]


def _jsonable(value: Any) -> Any:
    # dataclasses.asdict copies every dict, and takes five to ten times as long.
    if (names := getattr(value, "__dataclass_fields__", None)) is not None:
        return {name: _jsonable(getattr(value, name)) for name in names}
    if isinstance(value, tuple):
        return [_jsonable(entry) for entry in value]
    return value


def _built(section: Any, data: Mapping[str, Any]) -> Any:
    if not isinstance(data, Mapping):
        raise ProtocolError(f"statistics: {data!r:.40} is not an object; is the daemon of another version?")
    values = {}
    for field in fields(section):
        if field.name not in data:
            raise ProtocolError(f"statistics: field {field.name!r} is missing; is the daemon of another version?")
        value = data[field.name]
        if is_dataclass(field.type):
            value = _built(field.type, value)
        elif field.name == "streams":
            value = tuple(_built(get_args(field.type)[0], entry) for entry in value)
        values[field.name] = value
    return section(**values)
