"""Collects the statistics from the parts that count them."""

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gcs_prefetchd import __version__
from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.fetch.fetcher import Fetcher
from gcs_prefetchd.fetch.prefetcher import Prefetcher
from gcs_prefetchd.fetch.process_pool import FetchProcesses
from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.planning.reader import Reader
from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.planning.wait_reasons import WAIT_REASONS
from gcs_prefetchd.server.statistics import (
    CacheStatistics,
    LimitStatistics,
    OriginStatistics,
    PrefetchStatistics,
    ProcessStatistics,
    ReadStatistics,
    Statistics,
    StreamStatistics,
)
from gcs_prefetchd.shared.messages import ReadReport

__all__ = ["ReadCounters", "StatisticsCollector"]


@dataclass(slots=True)
class ReadCounters:
    """Sums of all read reports since the start, in objects."""

    hits: int = 0
    misses: int = 0
    fallbacks: int = 0
    wait_s: float = 0.0

    def add(self, report: ReadReport) -> None:
        """Add one report."""
        self.hits += report.hits
        self.misses += report.misses
        self.fallbacks += report.fallbacks
        self.wait_s += report.wait_s

    @property
    def hit_ratio(self) -> float:
        """Hits per read; 0 before the first read."""
        total = self.hits + self.misses + self.fallbacks
        return self.hits / total if total else 0.0


@dataclass(frozen=True, slots=True)
class StatisticsCollector:
    """Takes a snapshot of all counts."""

    instance_id: str
    cache: Cache
    registry: Registry
    fetcher: Fetcher
    prefetcher: Prefetcher
    counters: RequestCounters
    fetch_processes: FetchProcesses | None = None
    reads: ReadCounters = field(default_factory=ReadCounters)
    started_s: float = field(default_factory=time.monotonic)

    def collect(self) -> Statistics:
        """The statistics of this moment."""
        now_s = time.monotonic()
        streams = tuple(self._stream(reader, now_s) for reader in self.registry)
        return Statistics(
            version=__version__,
            instance_id=self.instance_id,
            uptime_s=round(now_s - self.started_s, 3),
            cache=self._cache(),
            reads=self._reads(),
            origin=self._origin(),
            limits=self._limits(now_s),
            prefetch=self._prefetch(streams),
            process=self._process(),
            streams=streams,
        )

    def _cache(self) -> CacheStatistics:
        return CacheStatistics(
            bytes=self.cache.bytes,
            limit_bytes=self.cache.capacity.limit_bytes,
            reserved_bytes=self.cache.capacity.reserved_bytes,
            objects=len(self.cache),
            evictions=self.cache.evictions,
            damaged=self.cache.damaged,
            ready=int(self.cache.is_ready),
        )

    def _reads(self) -> ReadStatistics:
        return ReadStatistics(
            hits=self.reads.hits,
            misses=self.reads.misses,
            fallbacks=self.reads.fallbacks,
            hit_ratio=round(self.reads.hit_ratio, 6),
            wait_s=round(self.reads.wait_s, 3),
            waits=_by_reason(self.prefetcher.waits),
        )

    def _origin(self) -> OriginStatistics:
        return OriginStatistics(
            requests=self.counters.requests,
            bytes=self.counters.received_bytes,
            errors=dict(self.counters.errors),
            in_flight=self.counters.in_flight,
        )

    def _limits(self, now_s: float) -> LimitStatistics:
        slots, rate = self.fetcher.slots, self.fetcher.slots.rate
        return LimitStatistics(
            concurrency=slots.concurrency.limit,
            min_concurrency=slots.concurrency.minimum,
            max_concurrency=slots.concurrency.maximum,
            last_change_reason=slots.concurrency.last_change_reason,
            last_change_age_s=round(now_s - slots.last_change_s, 3),
            requests_per_s=rate.requests.per_s(now_s),
            allowed_requests_per_s=round(rate.allowed_requests_per_s, 1),
            bytes_per_s=rate.received_bytes.per_s(now_s),
            allowed_bytes_per_s=rate.max_bytes_per_s,
            throttled_s=round(slots.throttled_s, 3),
        )

    def _prefetch(self, streams: tuple[StreamStatistics, ...]) -> PrefetchStatistics:
        return PrefetchStatistics(
            fetched=self.fetcher.downloaded.prefetch,
            demand_fetched=self.fetcher.downloaded.demand,
            runway_items=min((one.runway_items for one in streams if one.position < one.length), default=0),
        )

    def _process(self) -> ProcessStatistics:
        pids = self.fetch_processes.pids if self.fetch_processes is not None else []
        return ProcessStatistics(
            memory_bytes=_memory_bytes(os.getpid()),
            open_files=sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1,  # without the one that lists them
            threads=threading.active_count(),
            tasks=len(asyncio.all_tasks()),
            fetch_processes=len(pids),
            fetch_memory_bytes=sum(map(_memory_bytes, pids)),
        )

    def _stream(self, reader: Reader, now_s: float) -> StreamStatistics:
        runway_items, rate_per_s = reader.runway_items(), reader.stream.rate.per_s(now_s)
        return StreamStatistics(
            id=reader.stream.id,
            data_root=reader.data_root,
            epoch=reader.stream.epoch.number,
            position=reader.stream.position,
            length=len(reader.stream),
            runway_items=runway_items,
            runway_s=round(runway_items / rate_per_s, 3),
            reads_per_s=round(rate_per_s, 1),
            window_items=self.registry.window_items(reader),
            missing_at_epoch_start=reader.missing_at_epoch_start,
            prefetched_items=reader.prefetched_items,
            demanded_objects=reader.demanded_objects,
            waits=_by_reason(reader.waits),
        )


def _by_reason(waits: Counter[str]) -> Mapping[str, int]:
    """A count for every reason, so that each has its metric from the start."""
    return {reason: waits[reason] for reason in WAIT_REASONS}


def _memory_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # the process has just ended
        return 0
