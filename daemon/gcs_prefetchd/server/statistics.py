"""What `/stats` and `/metrics` say: one snapshot, from the parts that count."""

import asyncio
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gcs_prefetchd import __version__
from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.fetch.prefetcher import Prefetcher
from gcs_prefetchd.fetch.process_pool import FetchProcesses
from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.planning.wait_reasons import WAIT_REASONS
from gcs_prefetchd.shared.messages import ReadReport

__all__ = ["METRICS", "Reads", "Statistics"]


@dataclass(slots=True)
class Reads:
    """What every reader reported since the start, in objects."""

    hits: int = 0
    misses: int = 0
    fallbacks: int = 0
    wait_s: float = 0.0

    def add(self, report: ReadReport) -> None:
        """Count one report."""
        self.hits += report.hits
        self.misses += report.misses
        self.fallbacks += report.fallbacks
        self.wait_s += report.wait_s

    @property
    def hit_ratio(self) -> float:
        """Hits per read, 0 before the first read."""
        total = self.hits + self.misses + self.fallbacks
        return self.hits / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Statistics:
    """Takes snapshots."""

    instance_id: str
    cache: Cache
    registry: Registry
    fetcher: Fetcher
    prefetcher: Prefetcher
    counters: RequestCounters
    fetch_processes: FetchProcesses | None = None
    reads: Reads = field(default_factory=Reads)
    started_s: float = field(default_factory=time.monotonic)

    def snapshot(self) -> dict[str, Any]:
        """What `/stats` answers; `docs/http-api.md` explains each number."""
        streams = self._streams()
        return {
            "version": __version__,
            "instance_id": self.instance_id,
            "uptime_s": round(time.monotonic() - self.started_s, 3),
            "cache": {
                "bytes": self.cache.bytes,
                "limit_bytes": self.cache.limit_bytes,
                "reserved_bytes": self.cache.reserved_bytes,
                "objects": len(self.cache),
                "evictions": self.cache.evictions,
                "damaged": self.cache.damaged,
                "ready": int(self.cache.is_whole),
            },
            "reads": {
                "hits": self.reads.hits,
                "misses": self.reads.misses,
                "fallbacks": self.reads.fallbacks,
                "hit_ratio": round(self.reads.hit_ratio, 6),
                "wait_s": round(self.reads.wait_s, 3),
                "waits": {why: self.prefetcher.waits[why] for why in WAIT_REASONS},
            },
            "origin": {
                "requests": self.counters.requests,
                "bytes": self.counters.received_bytes,
                "errors": dict(self.counters.errors),
                "in_flight": self.counters.in_flight,
            },
            "limits": self._limits(),
            "prefetch": {
                "fetched": self.fetcher.fetched.prefetch,
                "demand_fetched": self.fetcher.fetched.demand,
                "runway_items": min((s["runway_items"] for s in streams if s["position"] < s["length"]), default=0),
            },
            "process": _process() | self._fetch_processes(),
            "streams": streams,
        }

    def _limits(self) -> dict[str, Any]:
        now_s, slots, rate = time.monotonic(), self.fetcher.slots, self.fetcher.slots.rate
        return {
            "concurrency": slots.concurrency.limit,
            "min_concurrency": slots.concurrency.minimum,
            "max_concurrency": slots.concurrency.maximum,
            "last_change_reason": slots.concurrency.last_change_reason,
            "last_change_age_s": round(now_s - slots.last_change_s, 3),
            "requests_per_s": rate.requests.per_s(now_s),
            "allowed_requests_per_s": round(rate.allowed_requests_per_s, 1),
            "bytes_per_s": rate.received_bytes.per_s(now_s),
            "allowed_bytes_per_s": rate.max_bytes_per_s,
            "throttled_s": round(slots.throttled_s, 3),
        }

    def _fetch_processes(self) -> dict[str, int]:
        pids = self.fetch_processes.pids if self.fetch_processes is not None else []
        return {"fetch_processes": len(pids), "fetch_memory_bytes": sum(map(_memory_bytes, pids))}

    def _streams(self) -> list[dict[str, Any]]:
        now_s = time.monotonic()
        return [
            {
                "id": reader.stream.id,
                "data_root": reader.data_root,
                "epoch": reader.stream.epoch.number,
                "position": reader.stream.position,
                "length": len(reader.stream),
                "runway_items": (runway := reader.runway_items()),
                "runway_s": round(runway / reader.stream.rate.per_s(now_s), 3),
                "reads_per_s": round(reader.stream.rate.per_s(now_s), 1),
                "window_items": self.registry.window_items(reader),
                "missing_at_epoch_start": reader.missing_at_epoch_start,
                "prefetched_items": reader.prefetched_items,
                "demanded_objects": reader.demanded_objects,
                "waits": {why: reader.waits[why] for why in WAIT_REASONS},
            }
            for reader in self.registry
        ]

    def metrics(self) -> bytes:
        """The same for Prometheus, in its text format."""
        registry = CollectorRegistry()
        registry.register(_Snapshot(self.snapshot()))
        return generate_latest(registry)


def _process() -> dict[str, int]:
    """What the daemon itself takes of the machine: each of it stays flat, whatever has gone wrong."""
    return {
        "memory_bytes": _memory_bytes(os.getpid()),
        "open_files": sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1,  # without the one that lists them
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }


def _memory_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # it has just ended
        return 0


# metric: (kind, where in the snapshot, help)
METRICS: dict[str, tuple[str, tuple[str, str], str]] = {
    "gcs_prefetchd_cache_bytes": ("gauge", ("cache", "bytes"), "Bytes of objects in the cache"),
    "gcs_prefetchd_cache_limit_bytes": ("gauge", ("cache", "limit_bytes"), "The most bytes the cache may hold"),
    "gcs_prefetchd_cache_reserved_bytes": ("gauge", ("cache", "reserved_bytes"), "Bytes set aside for downloads under way"),
    "gcs_prefetchd_cache_objects": ("gauge", ("cache", "objects"), "Objects in the cache"),
    "gcs_prefetchd_cache_evictions": ("counter", ("cache", "evictions"), "Objects dropped to make room"),
    "gcs_prefetchd_cache_damaged": ("counter", ("cache", "damaged"), "Cached files found to differ from their object"),
    "gcs_prefetchd_cache_ready": ("gauge", ("cache", "ready"), "1 once everything that the cache holds is known"),
    "gcs_prefetchd_reads_hits": ("counter", ("reads", "hits"), "Objects that readers found on disk"),
    "gcs_prefetchd_reads_misses": ("counter", ("reads", "misses"), "Objects that readers had to wait for"),
    "gcs_prefetchd_reads_fallbacks": ("counter", ("reads", "fallbacks"), "Objects that readers fetched from GCS themselves"),
    "gcs_prefetchd_reads_wait_seconds": (
        "counter",
        ("reads", "wait_s"),
        "Seconds that readers waited for misses and fallbacks",
    ),
    "gcs_prefetchd_reads_waits": ("counter", ("reads", "waits"), "Objects that readers waited for, by reason"),
    "gcs_prefetchd_origin_requests": ("counter", ("origin", "requests"), "Requests sent to GCS"),
    "gcs_prefetchd_origin_bytes": ("counter", ("origin", "bytes"), "Bytes of objects received from GCS"),
    "gcs_prefetchd_origin_errors": ("counter", ("origin", "errors"), "Failed tries, by kind"),
    "gcs_prefetchd_origin_in_flight": ("gauge", ("origin", "in_flight"), "Downloads under way"),
    "gcs_prefetchd_limits_concurrency": ("gauge", ("limits", "concurrency"), "Downloads that may be under way, adapted"),
    "gcs_prefetchd_limits_min_concurrency": ("gauge", ("limits", "min_concurrency"), "The fewest that it adapts to"),
    "gcs_prefetchd_limits_max_concurrency": ("gauge", ("limits", "max_concurrency"), "The most that it adapts to"),
    "gcs_prefetchd_limits_requests_per_second": ("gauge", ("limits", "requests_per_s"), "Requests sent in the last second"),
    "gcs_prefetchd_limits_allowed_requests_per_second": (
        "gauge",
        ("limits", "allowed_requests_per_s"),
        "Requests a second that are allowed now",
    ),
    "gcs_prefetchd_limits_bytes_per_second": ("gauge", ("limits", "bytes_per_s"), "Bytes received in the last second"),
    "gcs_prefetchd_limits_allowed_bytes_per_second": (
        "gauge",
        ("limits", "allowed_bytes_per_s"),
        "Bytes a second that are allowed; no sample where any are",
    ),
    "gcs_prefetchd_limits_throttled_seconds": (
        "counter",
        ("limits", "throttled_s"),
        "Seconds that prefetches waited for the allowed rates",
    ),
    "gcs_prefetchd_prefetch_fetched": ("counter", ("prefetch", "fetched"), "Objects fetched ahead of their reader"),
    "gcs_prefetchd_prefetch_demand_fetched": (
        "counter",
        ("prefetch", "demand_fetched"),
        "Objects fetched while a reader waited",
    ),
    "gcs_prefetchd_prefetch_runway_items": (
        "gauge",
        ("prefetch", "runway_items"),
        "Items on disk ahead of the hungriest stream",
    ),
    "gcs_prefetchd_process_memory_bytes": ("gauge", ("process", "memory_bytes"), "Resident memory of the daemon"),
    "gcs_prefetchd_process_open_files": ("gauge", ("process", "open_files"), "Descriptors that the daemon has open"),
    "gcs_prefetchd_process_threads": ("gauge", ("process", "threads"), "Threads of the daemon"),
    "gcs_prefetchd_process_tasks": ("gauge", ("process", "tasks"), "Tasks of the daemon's event loop"),
    "gcs_prefetchd_process_fetch_processes": (
        "gauge",
        ("process", "fetch_processes"),
        "Fetch processes that can be told to fetch",
    ),
    "gcs_prefetchd_process_fetch_memory_bytes": (
        "gauge",
        ("process", "fetch_memory_bytes"),
        "Resident memory of the fetch processes",
    ),
    "gcs_prefetchd_stream_position": ("gauge", ("streams", "position"), "Items read of the stream's epoch"),
    "gcs_prefetchd_stream_length": ("gauge", ("streams", "length"), "Items of the stream's epoch"),
    "gcs_prefetchd_stream_runway_items": ("gauge", ("streams", "runway_items"), "Items on disk ahead of the stream"),
    "gcs_prefetchd_stream_runway_seconds": ("gauge", ("streams", "runway_s"), "How long they last at the stream's rate"),
    "gcs_prefetchd_stream_missing_at_epoch_start": (
        "gauge",
        ("streams", "missing_at_epoch_start"),
        "Items that were not here when the epoch began",
    ),
    "gcs_prefetchd_stream_prefetched_items": ("gauge", ("streams", "prefetched_items"), "Items fetched ahead in the epoch"),
}


class _Snapshot(Collector):
    def __init__(self, snapshot: dict[str, Any]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        for name, (kind, (section, key), text) in METRICS.items():
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            if section == "streams":
                metric = family(name, text, labels=["stream", "data_root"])
                for stream in self._snapshot["streams"]:
                    metric.add_metric([stream["id"], stream["data_root"]], stream[key])
            elif key in ("errors", "waits"):
                metric = family(name, text, labels=["kind" if key == "errors" else "reason"])
                for error, count in self._snapshot[section][key].items():
                    metric.add_metric([error], count)
            elif (value := self._snapshot[section][key]) is None:
                metric = family(name, text, labels=[])
            else:
                metric = family(name, text, value=value)
            yield metric
