"""The messages between the daemon and its fetch processes, and how they are encoded: a line is a JSON array of messages.

A message is encoded as its class's name, followed by its fields. Both ends are the same version of the same program, so a
message is not validated: a wrong one raises TypeError or KeyError, which closes the connection.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

__all__ = [
    "AttemptEnded",
    "BytesWritten",
    "CancelDownload",
    "DownloadCancelled",
    "DownloadFailed",
    "DownloadPublished",
    "ErrorsCounted",
    "Message",
    "ProcessOptions",
    "ProcessReady",
    "StartDownload",
    "TokenGranted",
    "TokenRefused",
    "TokenRequest",
    "TokenUnavailable",
    "decode",
    "encode",
]


# --- From the daemon


@dataclass(frozen=True, slots=True)
class ProcessOptions:
    """The first message: how the process downloads, and into which cache directory. The same for every process."""

    cache_dir: str
    endpoint: str
    is_anonymous: bool
    user_project: str | None
    connections: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class StartDownload:
    """Download this version into `temporary_path`, and publish the file at `path`. Later messages refer to it by `number`."""

    number: int
    temporary_path: str
    path: str
    bucket: str
    name: str
    generation: int
    size: int
    crc32c: int | None


@dataclass(frozen=True, slots=True)
class CancelDownload:
    """Stop this download. The process reports its end all the same."""

    number: int


@dataclass(frozen=True, slots=True)
class TokenGranted:
    """The response to `TokenRequest`: the access token."""

    token: str


@dataclass(frozen=True, slots=True)
class TokenUnavailable:
    """The response to `TokenRequest`: there is no access token. If `is_final`, retrying would not help."""

    reason: str
    is_final: bool


# --- From the process


@dataclass(frozen=True, slots=True)
class ProcessReady:
    """The process accepts downloads."""


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt of a download has ended, after this many requests."""

    number: int
    requests: int
    duration_s: float
    received_bytes: int
    is_throttled: bool
    is_success: bool


@dataclass(frozen=True, slots=True)
class BytesWritten:
    """This many bytes of a download are on the disk."""

    number: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class ErrorsCounted:
    """Errors since the last such message, by kind."""

    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class DownloadPublished:
    """The file is complete, checked and at its path."""

    number: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class DownloadFailed:
    """The download failed with this error of `shared.errors`. Nothing of it is left on the disk."""

    number: int
    error: str
    text: str


@dataclass(frozen=True, slots=True)
class DownloadCancelled:
    """The download was cancelled. Nothing of it is left on the disk."""

    number: int


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """The process needs an access token: `TokenGranted` or `TokenUnavailable` must follow."""


@dataclass(frozen=True, slots=True)
class TokenRefused:
    """GCS refused this access token."""

    token: str


Message = (
    ProcessOptions
    | StartDownload
    | CancelDownload
    | TokenGranted
    | TokenUnavailable
    | ProcessReady
    | AttemptEnded
    | BytesWritten
    | ErrorsCounted
    | DownloadPublished
    | DownloadFailed
    | DownloadCancelled
    | TokenRequest
    | TokenRefused
)


# --- The codec


def encode(messages: Iterable[Message]) -> bytes:
    """The messages as one line, with its newline."""
    return json.dumps([(type(message).__name__, *_VALUES[type(message)](message)) for message in messages]).encode() + b"\n"


def decode(line: bytes) -> list[Message]:
    """The inverse of `encode`, without the newline."""
    return [_CLASSES[name](*values) for name, *values in json.loads(line)]


def _values_of(message_class: type[Message]) -> Callable[[Message], tuple[Any, ...]]:
    """What returns the fields of such a message. `dataclasses.astuple`, which copies every value, takes 10 times as long."""
    names = [field.name for field in fields(message_class)]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda message: tuple(getattr(message, name) for name in names)


_CLASSES: Mapping[str, type[Message]] = {each.__name__: each for each in Message.__args__}
_VALUES: Mapping[type[Message], Callable[[Message], tuple[Any, ...]]] = {each: _values_of(each) for each in Message.__args__}
