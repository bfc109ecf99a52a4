"""The statistics in words, for the page and the command line. Pure."""

from collections.abc import Mapping
from typing import Any

from gcs_prefetchd.fetch.adaptive_concurrency import CHANGE_REASONS
from gcs_prefetchd.shared.byte_sizes import format_size

__all__ = ["daemon_facts", "stream_facts"]


def daemon_facts(snapshot: Mapping[str, Any]) -> dict[str, str]:
    """What a snapshot says of the daemon as a whole, by its name."""
    cache, reads, origin, limits, prefetch = (snapshot[key] for key in ("cache", "reads", "origin", "limits", "prefetch"))
    errors = ", ".join(f"{kind}: {count:,}" for kind, count in origin["errors"].items())
    return {
        "Cache": f"{format_size(cache['bytes'])} of {format_size(cache['limit_bytes'])}, {cache['objects']:,} objects",
        "Dropped": f"{cache['evictions']:,} objects to make room, {cache['damaged']:,} damaged",
        "Reads": f"{reads['hits']:,} hits, {reads['misses']:,} misses, {reads['fallbacks']:,} fallbacks",
        "Hit ratio": f"{reads['hit_ratio']:.1%}",
        "Waited": f"{reads['wait_s']:,.1f} s, summed over readers",
        "Waited for": _waits(reads["waits"]),
        "From GCS": f"{origin['requests']:,} requests, {format_size(origin['bytes'])}",
        "Failed tries": errors or "none",
        "Downloads": f"{origin['in_flight']:,} under way, {limits['concurrency']:,} at most ({_why(limits)})",
        "Rate": _rate(limits),
        "Held back": f"{_duration(limits['throttled_s'])} by the allowed rate",
        "Prefetched": f"{prefetch['fetched']:,} objects; {prefetch['demand_fetched']:,} more while a reader waited",
        "Runway": f"{prefetch['runway_items']:,} items, the shortest of all streams",
        "Takes": _takes(snapshot["process"]),
        "Up": _duration(snapshot["uptime_s"]),
    }


def stream_facts(stream: Mapping[str, Any]) -> dict[str, str]:
    """What a snapshot says of one stream, by its name."""
    is_read = stream["position"] > 0  # else its rate is an assumption
    runway_s, rate = (f", {_duration(stream['runway_s'])}", f", {stream['reads_per_s']:,.1f} items/s") if is_read else ("", "")
    missing = f"{stream['missing_at_epoch_start']:,} were missing at the epoch's start"
    return {
        "Read": f"{stream['position']:,} of {stream['length']:,} items{rate}",
        "Runway": f"{stream['runway_items']:,} items{runway_s}; window {stream['window_items']:,} items",
        "Prefetched": f"{stream['prefetched_items']:,} items; {missing}",
        "Waited for": _waits(stream["waits"]),
    }


def _takes(process: Mapping[str, int]) -> str:
    return f"{format_size(process['memory_bytes'])} of memory, {process['open_files']:,} open files"


def _why(limits: Mapping[str, Any]) -> str:
    bounds = f"{limits['min_concurrency']:,} to {limits['max_concurrency']:,}"
    return f"of {bounds}, {CHANGE_REASONS[limits['last_change_reason']]} {_duration(limits['last_change_age_s'])} ago"


def _rate(limits: Mapping[str, Any]) -> str:
    allowed_bytes = limits["allowed_bytes_per_s"]
    of_bytes = "" if allowed_bytes is None else f" of {format_size(allowed_bytes)}/s"
    of_requests = f"{limits['requests_per_s']:,.0f} of {limits['allowed_requests_per_s']:,.0f} requests/s"
    return f"{of_requests}, {format_size(limits['bytes_per_s'])}/s{of_bytes}"


def _waits(waits: Mapping[str, int]) -> str:
    whys = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in waits.items() if count)
    return f"{sum(waits.values()):,} objects: {whys}" if whys else "nothing"


def _duration(seconds: float) -> str:
    """In the unit that leaves two digits or three."""
    for unit, unit_s, below_s in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < below_s:
            return f"{seconds / unit_s:.1f} {unit}" if seconds < 9.95 else f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} days"
