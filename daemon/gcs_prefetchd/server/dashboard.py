"""The page at `/`: the statistics in a browser, without a script. Pure."""

import html
from collections.abc import Mapping

from gcs_prefetchd.server.statistics import Statistics, StreamStatistics
from gcs_prefetchd.server.statistics_summary import summarize, summarize_stream

__all__ = ["render_page"]


def render_page(statistics: Statistics) -> str:
    """The statistics as a page that reloads itself every two seconds."""
    streams = "".join(map(_stream, statistics.streams)) or "<p>None yet.</p>"
    return _PAGE.format(version=html.escape(statistics.version), summary=_table(summarize(statistics)), streams=streams)


def _stream(stream: StreamStatistics) -> str:
    epoch = f"epoch {stream.epoch} of {stream.data_root}"
    return (
        f"<h3>{html.escape(stream.id)} <small>{html.escape(epoch)}</small></h3>"
        f'<progress max="{max(1, stream.length)}" value="{stream.position}"></progress>{_table(summarize_stream(stream))}'
    )


def _table(summary: Mapping[str, str]) -> str:
    rows = (f"<tr><th>{heading}</th><td>{html.escape(text)}</td></tr>" for heading, text in summary.items())
    return f"<table>{''.join(rows)}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>gcs-prefetchd</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 56rem; padding: 0 1rem; color: #1c2733 }}
h2 {{ margin: 2rem 0 0 }} h3 {{ margin: 1rem 0 .25rem; overflow-wrap: anywhere }}
small {{ color: #5b6b7b; font-weight: normal }} progress {{ width: 100%; accent-color: #2f6f9f }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #dde3ea;
  font-variant-numeric: tabular-nums }}
th {{ font-weight: 600; white-space: nowrap; width: 9rem }} td {{ overflow-wrap: anywhere }}
</style></head><body>
<h1>gcs-prefetchd <small>{version}</small></h1>
{summary}
<h2>Streams</h2>
{streams}
<p><small>As JSON: <a href="/stats">/stats</a>. For Prometheus: <a href="/metrics">/metrics</a>.</small></p>
</body></html>
"""
