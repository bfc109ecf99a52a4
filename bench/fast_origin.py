"""GCS-speaking origins for benchmarks, each in its own process: nginx with lua if it is installed, else our server.

Debian packages: `nginx libnginx-mod-http-lua`. On two cores it serves about 35,000 objects of 100 KB per second, or
900 listing pages; our own server serves about 60 pages.
"""

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c

__all__ = ["computed_origin", "counts", "file_origin", "has_nginx"]

HERE = Path(__file__).parent
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
MODULES = Path("/usr/lib/nginx/modules")
START_DEADLINE_S = 60.0


def has_nginx() -> bool:
    """Whether nginx and its lua module are installed."""
    return NGINX is not None and (MODULES / "ngx_http_lua_module.so").exists()


@contextmanager
def computed_origin(run: Path, pairs: int, latency_ms: float) -> Iterator[str]:
    """Serve `gs://bench/train` with this many pairs, which can be listed but not read; yields the origin's URL."""
    if has_nginx():
        with _nginx(run, f"origin.compute({pairs})", run, latency_ms) as url:
            yield url
        return
    port = _free_port()
    command = [sys.executable, str(HERE / "synthetic_origin.py"), str(pairs), str(latency_ms), str(port)]
    with subprocess.Popen(command) as process:
        yield from _until_done(process, port, "/storage/v1/b")


@contextmanager
def file_origin(
    run: Path, data: Path, latency_ms: float, *, bytes_per_s: int = 0, tls: tuple[Path, Path] | None = None
) -> Iterator[str]:
    """Serve the objects `data/<bucket>/<object>` by nginx; `tls` is the certificate and its key. Yields the origin's URL.

    One bucket only, because objects are found by name alone. Names must need no escape in JSON.
    """
    _write_index(data, run / "objects.tsv")
    with _nginx(run, f'origin.load("{run}/objects.tsv")', data, latency_ms, bytes_per_s, tls) as url:
        yield url


def counts(url: str) -> dict[str, int]:
    """Requests and bytes sent by kind (`list_requests`, `media_bytes`, ...) since the start of an nginx origin."""
    counts: dict[str, Any] = json.loads(_get(f"{url}/_counts"))
    return counts


@contextmanager
def _nginx(
    run: Path, objects: str, data: Path, latency_ms: float, bytes_per_s: int = 0, tls: tuple[Path, Path] | None = None
) -> Iterator[str]:
    assert NGINX is not None
    port = _free_port()
    values = {
        "modules": MODULES,
        "user": "user root;" if os.geteuid() == 0 else "",
        "run": run,
        "here": HERE / "origin",
        "objects": objects,
        "port": f"{port} ssl" if tls else port,
        "tls": f"ssl_certificate {tls[0]}; ssl_certificate_key {tls[1]};" if tls else "",
        "latency_ms": latency_ms,
        "bytes_per_s": bytes_per_s,
        "data": data,
    }
    text = (HERE / "origin" / "nginx.conf").read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    (run / "nginx.conf").write_text(text)
    with subprocess.Popen([NGINX, "-p", run, "-c", run / "nginx.conf", "-e", run / "error.log"]) as process:
        for url in _until_done(process, port, "/_counts"):
            yield url.replace("http:", "https:") if tls else url


def _until_done(process: subprocess.Popen[bytes], port: int, path: str) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_DEADLINE_S
        while not _responds(f"{url}{path}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no origin at {url}")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()


def _responds(url: str) -> bool:
    try:
        _get(url)
    except urllib.error.HTTPError:
        return True  # 400: a plain request to a TLS port
    except OSError:
        return False
    return True


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:
        return bytes(response.read())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _write_index(data: Path, target: Path) -> None:
    lines = []
    for path in data.glob("*/**/*"):
        if path.is_file():
            body = path.read_bytes()
            crc32c = base64.b64encode(google_crc32c.value(body).to_bytes(4)).decode()
            md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
            name = "/".join(path.relative_to(data).parts[1:])
            lines.append(f"{name}\t{len(body)}\t{crc32c}\t{md5}\t{path.stat().st_mtime_ns // 1000}\n")
    target.write_text("".join(sorted(lines)))
