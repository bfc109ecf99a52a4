"""The messages between readers and the daemon over the Unix socket, and their validation.

HTTP with JSON bodies; a plan's indices follow its header as packed little-endian 32-bit integers. `docs/http-api.md` lists the
endpoints. Uses the standard library only, so that a training worker loads nothing else.
"""

import json
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from sys import byteorder
from typing import Any, Self

from gcs_prefetchd.shared.errors import ProtocolError

__all__ = [
    "PLAN_KINDS",
    "FetchRequest",
    "FetchResponse",
    "ManifestResponse",
    "Plan",
    "ReadReport",
    "Status",
    "pack_indices",
    "unpack_indices",
]

MAX_OBJECTS_PER_MESSAGE = 10_000
MAX_TEXT_LENGTH = 8192  # of a path or a name, some of which the daemon keeps until it stops
PLAN_KINDS = ("listed", "shuffled", "endless")  # how a plan's indices become an epoch's order (`epoch_order.plan_order`)


class _Message:
    """Reads and writes a flat dataclass as JSON. A missing field or one of another type raises ProtocolError."""

    __slots__ = ()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError(f"{cls.__name__}: not JSON ({exc})") from None
        if not isinstance(data, Mapping):
            raise ProtocolError(f"{cls.__name__}: not a JSON object")
        return cls._from_mapping(data)

    @classmethod
    def _from_mapping(cls, data: Mapping[str, Any]) -> Self:
        values = {}
        for field in fields(cls):  # type: ignore[arg-type]  # every subclass is a dataclass
            if field.name not in data:
                raise ProtocolError(f"{cls.__name__}: field {field.name!r} is missing")
            values[field.name] = _checked(cls.__name__, field.name, str(field.type), data[field.name])
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(asdict(self))  # type: ignore[call-overload]  # every subclass is a dataclass


_TYPES: Mapping[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "list[str]": (list,)}


def _checked(message: str, name: str, kind: str, value: object) -> object:
    if not isinstance(value, _TYPES[kind]) or isinstance(value, bool):
        raise ProtocolError(f"{message}: field {name!r} must be {kind}, not {type(value).__name__}")
    if isinstance(value, int | float) and not 0 <= value < 2**63:
        raise ProtocolError(f"{message}: field {name!r} must not be negative, infinite or huge")
    if isinstance(value, str) and len(value) > MAX_TEXT_LENGTH:
        raise ProtocolError(f"{message}: field {name!r} has {len(value)} characters; {MAX_TEXT_LENGTH} at most")
    if isinstance(value, list):
        if len(value) > MAX_OBJECTS_PER_MESSAGE:
            raise ProtocolError(f"{message}: field {name!r} has {len(value)} entries; {MAX_OBJECTS_PER_MESSAGE} at most")
        if not all(isinstance(text, str) for text in value):
            raise ProtocolError(f"{message}: field {name!r} must be {kind}")
    if not all(_is_unicode(text) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
        raise ProtocolError(f"{message}: field {name!r} is not valid Unicode")
    return value


def _is_unicode(text: str) -> bool:
    # JSON can contain half a character, which no response and no web page could then encode.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Status(_Message):
    """The daemon's identity, and the ids of the streams that it knows."""

    pid: "int"
    instance_id: "str"
    version: "str"
    data_roots: "list[str]"
    streams: "list[str]"


@dataclass(frozen=True, slots=True)
class ManifestResponse(_Message):
    """The path of a data root's manifest, and its number of items."""

    digest: "str"
    path: "str"
    items: "int"


@dataclass(frozen=True, slots=True)
class FetchRequest(_Message):
    """A demand: these objects (URIs) are needed now."""

    objects: "list[str]"


@dataclass(frozen=True, slots=True)
class FetchResponse(_Message):
    """For each requested object the empty string once its file is in the cache, or the error."""

    errors: "list[str]"


@dataclass(frozen=True, slots=True)
class ReadReport(_Message):
    """The objects (URIs) that one process read since its last report, and how.

    `hits` were found on disk, `misses` were fetched by the daemon, `fallbacks` were read from GCS; `wait_s` is the duration of
    the last two in seconds. `job` links the report to the plans of the same job. The `number` of a reporter's reports rises,
    from 1 on; a report that may have been lost is sent again with the same number, and counted once.
    """

    job: "str"
    reporter: "str"
    number: "int"
    hits: "int"
    misses: "int"
    fallbacks: "int"
    wait_s: "float"
    objects: "list[str]"


@dataclass(frozen=True, slots=True)
class Plan(_Message):
    """What one stream reads in one epoch: a kind of order and, packed after this header, the indices that it uses.

    - `kind` "listed": the indices are the stream's sequence, item by item. "shuffled" and "endless": they are the items to
      shuffle or to draw from, with `seed` and `epoch`.
    - `rank`, `world`, `drop_last`, `start`: the stream's share of that global order, as in `epoch_order.plan_order`: from
      `start` on every `world`-th item from `rank`.
    - `position`: how many items of this share have been read already.
    - `digest`: the share's digest (`epoch_order.order_digest`), so that a disagreement between reader and daemon is detected.

    Raises ProtocolError if the value of a field is not valid.
    """

    job: "str"
    stream: "str"
    data_root: "str"
    manifest: "str"
    kind: "str"
    seed: "int"
    epoch: "int"
    position: "int"
    rank: "int"
    world: "int"
    drop_last: "int"
    start: "int"
    digest: "str"

    def __post_init__(self) -> None:
        if self.kind not in PLAN_KINDS:
            raise ProtocolError(f"Plan: field 'kind' must be one of {', '.join(PLAN_KINDS)}, not {self.kind[:40]!r}")
        if self.world < 1:
            raise ProtocolError(f"Plan: field 'world' must be at least 1, not {self.world}")
        if self.rank >= self.world:
            raise ProtocolError(f"Plan: field 'rank' must be below the world of {self.world}, not {self.rank}")
        if self.drop_last not in (0, 1):
            raise ProtocolError(f"Plan: field 'drop_last' must be 0 or 1, not {self.drop_last}")

    def to_body(self, packed: bytes) -> bytes:
        """The request body: the header on a line of its own, then the packed indices."""
        return self.to_json().encode() + b"\n" + packed

    @classmethod
    def from_body(cls, body: bytes) -> tuple[Self, bytes]:
        """The header and the packed indices of a request body. Raises ProtocolError."""
        header, newline, packed = body.partition(b"\n")
        if not newline or len(packed) % 4:
            raise ProtocolError("Plan: must be a JSON line and packed 32-bit indices")
        return cls.from_json(header), packed


def pack_indices(indices: "array[int] | list[int]") -> bytes:
    """Indices as little-endian unsigned 32-bit integers."""
    packed = array("I", indices)
    if byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_indices(packed: bytes) -> "array[int]":
    """The inverse of `pack_indices`."""
    indices = array("I")
    indices.frombytes(packed)
    if byteorder == "big":
        indices.byteswap()
    return indices
