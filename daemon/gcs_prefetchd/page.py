"""The page at `/`: the statistics for a person with a browser, without a script."""

import html
from collections.abc import Mapping
from typing import Any

from gcs_prefetchd.sizes import format_size

__all__ = ["render_page"]


def render_page(snapshot: Mapping[str, Any]) -> str:
    """The snapshot as a page that loads itself anew every two seconds."""
    cache, reads, origin, prefetch = snapshot["cache"], snapshot["reads"], snapshot["origin"], snapshot["prefetch"]
    errors = ", ".join(f"{count:,} {kind}" for kind, count in origin["errors"].items()) or "none"
    rows = {
        "Cache": f"{format_size(cache['bytes'])} of {format_size(cache['limit_bytes'])} in {cache['objects']:,} objects",
        "Evictions": f"{cache['evictions']:,} objects",
        "Reads": f"{reads['hits']:,} hits, {reads['misses']:,} misses, {reads['fallbacks']:,} fallbacks",
        "Hit ratio": f"{reads['hit_ratio']:.1%}",
        "Waited": f"{reads['wait_s']:,.1f} s, summed over readers",
        "From GCS": f"{origin['requests']:,} requests, {format_size(origin['bytes'])}",
        "Downloads under way": f"{origin['in_flight']:,}",
        "Failed tries": errors,
        "Prefetched": f"{prefetch['fetched']:,} objects; {prefetch['demand_fetched']:,} while a reader waited",
        "Runway": f"{prefetch['runway_items']:,} items",
        "Up": f"{snapshot['uptime_s']:,.0f} s",
    }
    facts = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items())
    streams = "".join(
        f"<tr><td>{html.escape(one['id'])}</td><td>{html.escape(one['data_root'])}</td><td>{one['epoch']}</td>"
        f"<td>{one['position']:,} of {one['length']:,}</td><td>{one['runway_items']:,}</td></tr>"
        for one in snapshot["streams"]
    )
    return _PAGE.format(version=html.escape(snapshot["version"]), facts=facts, streams=streams)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>gcs-prefetchd</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 56rem; padding: 0 1rem; color: #1c2733 }}
table {{ border-collapse: collapse; width: 100%; margin-bottom: 2rem }}
th, td {{ text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #dde3ea;
  font-variant-numeric: tabular-nums }}
th {{ font-weight: 600; white-space: nowrap }} small {{ color: #5b6b7b }}
</style></head><body>
<h1>gcs-prefetchd <small>{version}</small></h1>
<table>{facts}</table>
<h2>Streams</h2>
<table><tr><th>Stream</th><th>Data root</th><th>Epoch</th><th>Items read</th><th>Runway in items</th></tr>{streams}</table>
<p><small>As JSON: <a href="/stats">/stats</a>. For Prometheus: <a href="/metrics">/metrics</a>.</small></p>
</body></html>
"""
