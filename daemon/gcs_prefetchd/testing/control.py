"""Control over HTTP, for a server in another process: counts, reset, faults, release."""

import json
from collections.abc import Container
from dataclasses import fields
from typing import Protocol, get_args
from urllib.parse import parse_qs

from pydantic import PositiveInt, TypeAdapter

from gcs_prefetchd.shared.errors import ProtocolError
from gcs_prefetchd.testing.counters import Counts, Kind
from gcs_prefetchd.testing.faults import Fault, FaultPlan, Rule
from gcs_prefetchd.testing.responses import Response, empty_response, json_response

__all__ = ["CONTROL_PATHS", "control", "read_rule"]

CONTROL_PATHS = frozenset({"/_counts", "/_reset", "/_faults", "/_release"})  # no bucket's name starts with _
_FAULTS = {fault.__name__: fault for fault in get_args(Fault)}


class Controlled(Protocol):
    """What a control request can change."""

    faults: FaultPlan

    @property
    def counts(self) -> Counts:
        """The requests so far."""

    def reset(self) -> None:
        """Reset all counters."""

    def release(self) -> None:
        """Release stalled responses."""


def control(server: Controlled, method: str, raw_path: str, body: bytes) -> Response:
    """Carry out a control request.

    `GET /_counts` (`?objects=false` for totals only), `POST /_reset`, `POST /_release`, `DELETE /_faults`, and
    `POST /_faults` with one rule or a list, such as
    `{"fault": "Status", "status": 503, "object": "bucket/images/*", "requests": [1, 2]}`.
    """
    path, _, query = raw_path.partition("?")
    match method, path:
        case "GET", "/_counts":
            return json_response(server.counts.summary(objects=parse_qs(query).get("objects") != ["false"]))
        case "POST", "/_reset":
            server.reset()
        case "POST", "/_release":
            server.release()
        case "DELETE", "/_faults":
            server.faults.clear()
        case "POST", "/_faults":
            return _add_faults(server.faults, body)
        case _:
            return json_response({"error": f"{method} {path}: not a control request"}, 405)
    return empty_response(204)


def _add_faults(plan: FaultPlan, body: bytes) -> Response:
    try:
        value = json.loads(body)
        rules = [read_rule(each) for each in (value if isinstance(value, list) else [value])]
    except (ValueError, ProtocolError) as exc:
        return json_response({"error": str(exc)}, 400)
    for rule in rules:
        plan.append(rule)
    return empty_response(204)


def read_rule(value: object) -> Rule:
    """Return the rule that a JSON object describes: the fault's name and fields, and those of the rule.

    `requests` is a list of numbers; `every` selects each n-th request. Raises ProtocolError.
    """
    name = value.get("fault") if isinstance(value, dict) else None
    made = _FAULTS.get(name) if isinstance(name, str) else None
    if made is None or not isinstance(value, dict):
        raise ProtocolError(f"fault: expected an object whose fault is one of {', '.join(sorted(_FAULTS))}")
    own = {field.name for field in fields(made)}
    unknown = value.keys() - own - {"fault", "object", "kind", "requests", "every", "together"}
    if unknown:
        raise ProtocolError(f"fault {name}: unknown field {min(unknown)!r}")
    try:
        return Rule(
            fault=TypeAdapter[Fault](made).validate_python({key: value[key] for key in own & value.keys()}),
            object=str(value.get("object", "*")),
            kind=Kind(value.get("kind", "media")),
            requests=_numbers(value.get("requests"), value.get("every")),
            together=bool(value.get("together", False)),
        )
    except (TypeError, ValueError) as exc:
        raise ProtocolError(f"fault {name}: {exc}") from exc


def _numbers(requests: object, every: object) -> Container[int] | None:
    if every is not None:
        step = TypeAdapter(PositiveInt).validate_python(every)
        return range(step, 1 << 62, step)
    return None if requests is None else TypeAdapter(frozenset[int]).validate_python(requests)
