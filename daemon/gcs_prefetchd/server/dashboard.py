"""The page at `/`: the statistics for a person with a browser, without a script."""

import html
from collections.abc import Mapping
from typing import Any

from gcs_prefetchd.server.wording import daemon_facts, stream_facts

__all__ = ["render_page"]


def render_page(snapshot: Mapping[str, Any]) -> str:
    """The snapshot as a page that loads itself anew every two seconds."""
    streams = "".join(map(_stream, snapshot["streams"])) or "<p>None yet.</p>"
    return _PAGE.format(version=html.escape(snapshot["version"]), facts=_table(daemon_facts(snapshot)), streams=streams)


def _stream(stream: Mapping[str, Any]) -> str:
    where = f"epoch {stream['epoch']} of {stream['data_root']}"
    return (
        f"<h3>{html.escape(stream['id'])} <small>{html.escape(where)}</small></h3>"
        f'<progress max="{max(1, stream["length"])}" value="{stream["position"]}"></progress>{_table(stream_facts(stream))}'
    )


def _table(facts: Mapping[str, str]) -> str:
    rows = (f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items())
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
{facts}
<h2>Streams</h2>
{streams}
<p><small>As JSON: <a href="/stats">/stats</a>. For Prometheus: <a href="/metrics">/metrics</a>.</small></p>
</body></html>
"""
