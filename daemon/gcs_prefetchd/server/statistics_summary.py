"""The statistics as a few lines for people: the page and the command line show them. Pure."""

from collections.abc import Mapping

from gcs_prefetchd.fetch.adaptive_concurrency import CHANGE_REASONS
from gcs_prefetchd.server.statistics import CacheStatistics, LimitStatistics, ProcessStatistics, Statistics, StreamStatistics
from gcs_prefetchd.shared.byte_sizes import format_size

__all__ = ["summarize", "summarize_stream"]


def summarize(statistics: Statistics) -> dict[str, str]:
    """The lines about the daemon, by their headings."""
    cache, reads, origin, prefetch = statistics.cache, statistics.reads, statistics.origin, statistics.prefetch
    return {
        "Cache": _cache(cache),
        "Evicted": _count(cache.evictions, "object"),
        "Damaged": _count(cache.damaged, "object"),
        "Reads": f"{reads.hits:,} hits, {reads.misses:,} misses, {reads.fallbacks:,} fallbacks",
        "Hit ratio": f"{reads.hit_ratio:.1%}",
        "Wait time": f"{reads.wait_s:,.1f} s, summed over all readers",
        "Waits": _waits(reads.waits),
        "GCS": f"{_count(origin.requests, 'request')}, {format_size(origin.bytes)} received",
        "Failed attempts": ", ".join(f"{kind}: {count:,}" for kind, count in origin.errors.items()) or "none",
        "Downloads": f"{origin.in_flight:,} in progress; {_concurrency(statistics.limits)}",
        "Rate": _rate(statistics.limits),
        "Throttled": f"{_duration(statistics.limits.throttled_s)}, in which prefetches waited for the allowed rate",
        "Prefetched": f"{_count(prefetch.fetched, 'object')}; {prefetch.demand_fetched:,} more while a reader waited",
        "Runway": f"{_count(prefetch.runway_items, 'item')}, the shortest of all streams",
        "Memory": _memory(statistics.process),
        "Open files": f"{statistics.process.open_files:,}",
        "Uptime": _duration(statistics.uptime_s),
    }


def summarize_stream(stream: StreamStatistics) -> dict[str, str]:
    """The lines about one stream, by their headings."""
    is_read = stream.position > 0  # else its rate is an assumption
    runway_s, rate = (f" ({_duration(stream.runway_s)})", f", {stream.reads_per_s:,.1f} items/s") if is_read else ("", "")
    missing = f"{stream.missing_at_epoch_start:,} were missing at the epoch's start"
    return {
        "Read": f"{stream.position:,} of {stream.length:,} items{rate}",
        "Runway": f"{stream.runway_items:,} items{runway_s}; window {stream.window_items:,} items",
        "Prefetched": f"{stream.prefetched_items:,} items; {missing}",
        "Waits": _waits(stream.waits),
    }


def _cache(cache: CacheStatistics) -> str:
    loading = "" if cache.ready else " so far (still loading the index)"
    return f"{format_size(cache.bytes)} of {format_size(cache.limit_bytes)}, {_count(cache.objects, 'object')}{loading}"


def _concurrency(limits: LimitStatistics) -> str:
    reason = CHANGE_REASONS.get(limits.last_change_reason, limits.last_change_reason)  # a newer daemon's may be unknown
    change = f"{reason} {_duration(limits.last_change_age_s)} ago"
    return f"limit {limits.concurrency:,} ({limits.min_concurrency:,} to {limits.max_concurrency:,}), {change}"


def _rate(limits: LimitStatistics) -> str:
    allowed_bytes = limits.allowed_bytes_per_s
    bytes_allowed = "" if allowed_bytes is None else f" ({format_size(allowed_bytes)}/s allowed)"
    requests = f"{limits.requests_per_s:,.0f} requests/s ({limits.allowed_requests_per_s:,.0f} allowed)"
    return f"{requests}, {format_size(limits.bytes_per_s)}/s{bytes_allowed}"


def _waits(waits: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in waits.items() if count)
    return f"{_count(sum(waits.values()), 'object')}: {reasons}" if reasons else "none"


def _memory(process: ProcessStatistics) -> str:
    memory = format_size(process.memory_bytes)
    if not process.fetch_processes:
        return memory
    others = _count(process.fetch_processes, "fetch process", "fetch processes")
    return f"{memory}, and {format_size(process.fetch_memory_bytes)} in {others}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def _duration(seconds: float) -> str:
    """In the unit that leaves two or three digits."""
    for unit, unit_s, below_s in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < below_s:
            return f"{seconds / unit_s:.1f} {unit}" if seconds < 9.95 else f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} days"
