"""Shared by several test modules: buckets with items, settings for a daemon, a daemon as a process."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

from PIL import Image

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.service.daemon import Daemon
from gcs_prefetchd.settings import Settings
from gcs_prefetchd.shared.daemon_client import DaemonClient

BUCKET = "pictures"
DATA_ROOT = f"gs://{BUCKET}/train"
COMMAND = [sys.executable, "-m", "gcs_prefetchd"]


class Bucket(Protocol):
    """What the in-process server and the threaded server have in common."""

    def put(self, bucket: str, name: str, data: bytes) -> object: ...


def jpeg(shade: int, side: int = 32) -> bytes:
    """A small JPEG image of one colour."""
    return _encoded(Image.new("RGB", (side, side), (shade % 256, shade // 256 % 256, 128)), "JPEG")


def png(label: int, side: int = 32) -> bytes:
    """A small PNG of one class index."""
    return _encoded(Image.new("L", (side, side), label % 256), "PNG")


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def put_items(server: Bucket, count: int, *, size_bytes: int | None = None) -> dict[str, bytes]:
    """Put `count` items into the data root; returns every object's bytes by its URI.

    With a size, each part has that many bytes and is not an image.
    """
    objects: dict[str, bytes] = {}
    for i in range(count):
        image = jpeg(i) if size_bytes is None else bytes([i % 251]) * size_bytes
        label = png(i) if size_bytes is None else bytes([(i + 1) % 251]) * size_bytes
        objects |= {f"train/images/{i:05}.jpg": image, f"train/labels/{i:05}.png": label}
    for name, data in objects.items():
        server.put(BUCKET, name, data)
    return {f"gs://{BUCKET}/{name}": data for name, data in objects.items()}


def make_settings(cache_dir: Path, endpoint: str, **changes: object) -> Settings:
    """Settings of a daemon that serves the data root from a fake server, on any free port."""
    values: dict[str, object] = {
        "data_roots": [DATA_ROOT],
        "cache_dir": cache_dir,
        "cache_size": 10**9,
        "min_free": 0,
        "endpoint": endpoint,
        "anonymous": True,
        "http": "127.0.0.1:0",
        "deadline_s": 10.0,
        "fetch_processes": 0,
    }
    return Settings.model_validate(values | changes)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Daemon]:
    """A daemon in this event loop. After its stop, checks what it leaves behind."""
    daemon = Daemon(settings, lambda: None)
    async with daemon.running():
        yield daemon
    assert daemon.directory.leftover_files() == []
    await check_left_behind(settings)


async def check_left_behind(settings: Settings) -> None:
    """Open the cache of a stopped daemon, as the next one would, and assert that it is consistent."""
    directory = CacheDirectory(settings.cache_dir)
    directory.claim()
    cache = Cache(directory, settings.cache_size)
    await cache.open()
    await cache.wait_until_ready()
    await cache.rescan()
    problems = await cache.check()
    await cache.close()
    directory.close()
    assert problems == []


def run_command(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `gcs-prefetchd` as a user does, without the settings of our own environment."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=clean_environment() | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    """Only the variables that a process needs to run here."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in kept if name in os.environ}


def start_arguments(cache_dir: Path, endpoint: str, extra: Sequence[str] = ()) -> list[str]:
    """The flags of `gcs-prefetchd start` for the data root of `put_items`."""
    return [
        *("--data-root", DATA_ROOT, "--cache-dir", str(cache_dir), "--cache-size", "1GB", "--set", "min_free=0"),
        *("--endpoint", endpoint, "--anonymous", "--http", "127.0.0.1:0", *extra),
    ]


@contextmanager
def daemon_process(cache_dir: Path, endpoint: str, extra: Sequence[str] = ()) -> Iterator[DaemonClient]:
    """A daemon that is started and stopped with the command line, as a user does. Yields its client."""
    started = run_command("start", *start_arguments(cache_dir, endpoint, extra))
    assert started.returncode == 0, started.stderr
    with contextlib.closing(DaemonClient(cache_dir)) as client:
        try:
            yield client
        finally:
            run_command("stop", "--cache-dir", cache_dir)
