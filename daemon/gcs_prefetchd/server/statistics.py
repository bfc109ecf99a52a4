"""What the statistics are: every field with its unit, its meaning and its kind of metric. Pure.

`/stats`, `/metrics` and the tables of `docs/http-api.md` are generated from these classes, so each field is described once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

__all__ = [
    "CacheStatistics",
    "Field",
    "LimitStatistics",
    "Meaning",
    "OriginStatistics",
    "PrefetchStatistics",
    "ProcessStatistics",
    "ReadStatistics",
    "Statistics",
    "StreamStatistics",
    "all_fields",
]

Kind = Literal["counter", "gauge", "label", "none"]


@dataclass(frozen=True, slots=True)
class Meaning:
    """The meaning of a field. `help` is plain text; `details` is Markdown, shown in the document alone.

    A field of the kind `label` labels all metrics of its class. A field that counts by reason has a `label` for the reason.
    """

    unit: str
    kind: Kind
    help: str
    details: str = ""
    label: str = ""
    metric_details: str = ""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the statistics. `section` is the field of `Statistics` that holds it, empty for those of `Statistics`."""

    section: str
    name: str
    meaning: Meaning

    @property
    def path(self) -> str:
        """The field as documents name it: `uptime_s`, `cache.bytes`, `streams[].id`."""
        separator = "[]." if self.section == "streams" else "." if self.section else ""
        return f"{self.section}{separator}{self.name}"


def _meaning(unit: str, kind: Kind, help_text: str, details: str = "", **more: str) -> Mapping[str, Meaning]:
    """The metadata of a dataclass field."""
    return MappingProxyType({"meaning": Meaning(unit, kind, help_text, details, **more)})


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """The cache on disk."""

    bytes: int = field(metadata=_meaning("bytes", "gauge", "Size of the cached objects."))
    limit_bytes: int = field(
        metadata=_meaning(
            "bytes",
            "gauge",
            "Largest size of the cache.",
            "The setting `cache_size`. `cache.bytes` and `cache.reserved_bytes` together never exceed it.",
        )
    )
    reserved_bytes: int = field(metadata=_meaning("bytes", "gauge", "Space reserved for downloads in progress."))
    objects: int = field(metadata=_meaning("objects", "gauge", "Cached objects."))
    evictions: int = field(metadata=_meaning("objects", "counter", "Objects evicted to free space."))
    damaged: int = field(
        metadata=_meaning(
            "objects",
            "counter",
            "Cached files that did not match their stamp when a reader requested them.",
            "They are downloaded again.",
        )
    )
    ready: int = field(
        metadata=_meaning(
            "0 or 1",
            "gauge",
            "1 once the daemon knows everything that the cache holds.",
            "It is 0 after a start until the index has been read, and after a crash until every file has been checked.",
        )
    )


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """What readers reported."""

    hits: int = field(metadata=_meaning("objects", "counter", "Objects that readers found on disk."))
    misses: int = field(metadata=_meaning("objects", "counter", "Objects that readers requested from the daemon and received."))
    fallbacks: int = field(metadata=_meaning("objects", "counter", "Objects that readers downloaded from GCS themselves."))
    hit_ratio: float = field(
        metadata=_meaning("ratio, 0 to 1", "none", "`hits / (hits + misses + fallbacks)`; 0 before the first read.")
    )
    wait_s: float = field(
        metadata=_meaning("seconds", "counter", "Time that misses and fallbacks took, summed over all readers.")
    )
    waits: Mapping[str, int] = field(
        metadata=_meaning(
            "objects, by reason",
            "counter",
            "Objects that readers requested from the daemon and that were not in the cache.",
            "See [Why readers wait](#why-readers-wait).",
            label="reason",
        )
    )


@dataclass(frozen=True, slots=True)
class OriginStatistics:
    """The traffic with GCS."""

    requests: int = field(
        metadata=_meaning(
            "requests",
            "counter",
            "Requests sent to GCS for objects, listings and metadata, including retries.",
            "Requests for access tokens do not count.",
        )
    )
    bytes: int = field(
        metadata=_meaning("bytes", "counter", "Bytes of objects received from GCS, including those of failed attempts.")
    )
    errors: Mapping[str, int] = field(
        metadata=_meaning(
            "attempts, by kind",
            "counter",
            "Failed attempts.",
            "See [Kinds of errors](#kinds-of-errors).",
            label="kind",
            metric_details="no sample before the first error of a kind",
        )
    )
    in_flight: int = field(metadata=_meaning("downloads", "gauge", "Downloads in progress."))


@dataclass(frozen=True, slots=True)
class LimitStatistics:
    """The limits of downloads, and how close to them the daemon is."""

    concurrency: int = field(
        metadata=_meaning(
            "downloads",
            "gauge",
            "Current limit of concurrent downloads.",
            "It [adapts](configuration.md#adaptive-limits) between the next two.",
        )
    )
    min_concurrency: int = field(
        metadata=_meaning(
            "downloads",
            "gauge",
            "Lower bound of the concurrency limit.",
            "The setting `min_concurrency`, or `concurrency` if that is less.",
        )
    )
    max_concurrency: int = field(
        metadata=_meaning("downloads", "gauge", "Upper bound of the concurrency limit.", "The setting `concurrency`.")
    )
    last_change_reason: str = field(
        metadata=_meaning(
            "text",
            "none",
            "Why the concurrency limit last changed.",
            "See [Why the limit changed](#why-the-limit-changed).",
        )
    )
    last_change_age_s: float = field(metadata=_meaning("seconds", "none", "Time since that change."))
    requests_per_s: float = field(
        metadata=_meaning(
            "requests per second",
            "gauge",
            "Requests sent to GCS in the last full second, including listings and retries.",
        )
    )
    allowed_requests_per_s: float = field(
        metadata=_meaning(
            "requests per second",
            "gauge",
            "Request rate that is allowed now.",
            "The setting `max_requests_per_s` or GCS's ramp-up rule, whichever is lower.",
        )
    )
    bytes_per_s: float = field(
        metadata=_meaning(
            "bytes per second",
            "gauge",
            "Bytes of objects received in the last full second.",
            "An object counts when its download ends.",
        )
    )
    allowed_bytes_per_s: float | None = field(
        metadata=_meaning(
            "bytes per second",
            "gauge",
            "Byte rate that is allowed.",
            "The setting `max_bytes_per_s`; null if it is not set.",
            metric_details="no sample if it is not set",
        )
    )
    throttled_s: float = field(
        metadata=_meaning(
            "seconds",
            "counter",
            "Time during which a slot was free and prefetches waited only for the allowed rates.",
        )
    )


@dataclass(frozen=True, slots=True)
class PrefetchStatistics:
    """What was downloaded, and how far ahead of the readers."""

    fetched: int = field(metadata=_meaning("objects", "counter", "Objects downloaded before a reader requested them."))
    demand_fetched: int = field(metadata=_meaning("objects", "counter", "Objects downloaded while a reader waited for them."))
    runway_items: int = field(
        metadata=_meaning(
            "items",
            "gauge",
            "Shortest runway of all streams; 0 without streams.",
            "Streams at the end of their epoch do not count.",
        )
    )


@dataclass(frozen=True, slots=True)
class ProcessStatistics:
    """What the daemon uses of the machine. These numbers stay flat, whatever goes wrong."""

    memory_bytes: int = field(
        metadata=_meaning("bytes", "gauge", "Resident memory (RSS) of the daemon.", "The kernel's page cache does not count.")
    )
    open_files: int = field(
        metadata=_meaning("descriptors", "gauge", "Open descriptors of the daemon: files, sockets and connections.")
    )
    threads: int = field(metadata=_meaning("threads", "gauge", "Threads of the daemon."))
    tasks: int = field(
        metadata=_meaning(
            "tasks",
            "gauge",
            "Tasks of the daemon's event loop.",
            "A few are permanent; each download and each connection adds one or two.",
        )
    )
    fetch_processes: int = field(
        metadata=_meaning(
            "processes",
            "gauge",
            "Fetch processes that are ready for work.",
            "See [Fetch processes](configuration.md#fetch-processes). "
            "0 until there is something to prefetch; fewer while one is restarted.",
        )
    )
    fetch_memory_bytes: int = field(metadata=_meaning("bytes", "gauge", "Resident memory (RSS) of all fetch processes."))


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """One stream."""

    id: str = field(
        metadata=_meaning(
            "text",
            "label",
            "Name of the stream, chosen by the reader.",
            "`seeded gs://bucket/prefix` is the order that is prefetched before a reader has sent a plan.",
            label="stream",
        )
    )
    data_root: str = field(metadata=_meaning("URI", "label", "The data root that it reads.", label="data_root"))
    epoch: int = field(metadata=_meaning("number, from 0", "none", "Its current epoch."))
    position: int = field(metadata=_meaning("items", "gauge", "Items read in the stream's current epoch."))
    length: int = field(metadata=_meaning("items", "gauge", "Items of the stream's current epoch."))
    runway_items: int = field(
        metadata=_meaning(
            "items",
            "gauge",
            "The stream's next items that are on disk without a gap.",
            "They are counted as far as prefetching has advanced.",
        )
    )
    runway_s: float = field(
        metadata=_meaning("seconds", "gauge", "How long the runway lasts at the stream's current rate.", "See `reads_per_s`.")
    )
    reads_per_s: float = field(
        metadata=_meaning(
            "items per second",
            "none",
            "The stream's current rate: the average of about the last 10 s.",
            "100 until two reports have arrived.",
        )
    )
    window_items: int = field(
        metadata=_meaning(
            "items",
            "none",
            "How far ahead of its reader the stream is prefetched.",
            "The setting `window_items`, or [as measured](planner.md#how-long-the-window-is).",
        )
    )
    missing_at_epoch_start: int = field(
        metadata=_meaning(
            "items",
            "gauge",
            "Items of the epoch that were not completely in the cache when its plan arrived.",
            "This stream or another one on the same data has to fetch them.",
        )
    )
    prefetched_items: int = field(
        metadata=_meaning(
            "items",
            "gauge",
            "Items prefetched for the stream since its epoch's plan arrived.",
            "Those from the start of the next epoch count as well.",
        )
    )
    demanded_objects: int = field(
        metadata=_meaning("objects", "none", "Objects that the stream waited for since its epoch's plan arrived.")
    )
    waits: Mapping[str, int] = field(
        metadata=_meaning(
            "objects, by reason",
            "none",
            "Objects that the stream waited for since it was registered, in all its epochs.",
            "See [Why readers wait](#why-readers-wait).",
        )
    )


@dataclass(frozen=True, slots=True)
class Statistics:
    """All statistics of a daemon at one moment."""

    version: str = field(metadata=_meaning("text", "none", "Version of the daemon."))
    instance_id: str = field(
        metadata=_meaning("text", "none", "32 hexadecimal digits, new at each start.", "All counts start at 0 with it.")
    )
    uptime_s: float = field(metadata=_meaning("seconds", "none", "Time since the start."))
    cache: CacheStatistics
    reads: ReadStatistics
    origin: OriginStatistics
    limits: LimitStatistics
    prefetch: PrefetchStatistics
    process: ProcessStatistics
    streams: tuple[StreamStatistics, ...] = field(metadata=_meaning("list", "none", "The streams that the daemon knows."))


def all_fields() -> tuple[Field, ...]:
    """Every field in the order of the classes; a list before the fields of its entries."""
    return tuple(_fields_of(Statistics, ""))


def _fields_of(section_class: Any, section: str) -> Iterator[Field]:
    for one in fields(section_class):
        if is_dataclass(one.type):
            yield from _fields_of(one.type, one.name)
        else:
            yield Field(section, one.name, one.metadata["meaning"])
            if one.name == "streams":
                yield from _fields_of(get_args(one.type)[0], one.name)
