"""The load of `soak.py`: pictures that show whether they are right, readers in processes, an origin that fails.

Every picture holds its item, part and version in its first bytes; all others follow from them. So a decoded picture alone shows
whether all its bytes are of one version.
"""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gcs_dataset import CachedLoader, generate_stream, get_cached_dataloaders
from gcs_prefetchd.shared.item_patterns import IMAGE_PATTERN, LABEL_PATTERN
from rig import BUCKET, DATA_ROOT

__all__ = ["Bucket", "OriginFaults", "Readers"]

SIDE = 40
BATCH = 8
PARTS = ((IMAGE_PATTERN, (SIDE, SIDE, 3)), (LABEL_PATTERN, (SIDE, SIDE)))
READS, WRONG, FAILED = range(3)
# No 401, 403 or 404: they are final, and no read could succeed.
FAULTS: list[dict[str, Any]] = [
    *({"fault": "Status", "status": status} for status in (408, 429, 500, 502, 504)),
    {"fault": "Status", "status": 503, "retry_after": "1"},
    *({"fault": "Cut", "after_bytes": 700, "framing": framing} for framing in ("length", "chunked", "close")),
    *({"fault": "Stall", "after_bytes": after} for after in (None, 0, 700)),
    *({"fault": "Reset", "after_bytes": after} for after in (None, 0, 700)),
    *({"fault": name} for name in ("FlippedByte", "LongBody", "EmptyBody", "MissingHash", "MalformedHash", "WrongGeneration")),
    {"fault": "HtmlPage"},
    {"fault": "Close"},
    {"fault": "Drip", "piece_bytes": 500, "interval_s": 0.05},
]


def pixels(number: int, part: int, version: int) -> NDArray[np.uint8]:
    """The picture of a part of an item in one of its versions."""
    drawn = np.random.default_rng([number, part, version]).integers(0, 256, PARTS[part][1], dtype=np.uint8)
    drawn.reshape(-1)[:6] = [number >> 8, number & 255, part, version >> 16, version >> 8 & 255, version & 255]
    return drawn


def number_of(picture: Image.Image, part: int) -> int | None:
    """The item that a picture shows, or None if any of its bytes is wrong."""
    shown = np.asarray(picture)
    high, low, _, *version = shown.reshape(-1)[:6].tolist()
    number = high << 8 | low
    right = pixels(number, part, int.from_bytes(bytes(version)))
    return number if shown.shape == right.shape and np.array_equal(shown, right) else None


def wrong(pair: tuple[Image.Image, Image.Image]) -> int:
    """The transform of decoded pairs: 1 if they are not image and label of one item."""
    image, label = (number_of(picture, part) for part, picture in enumerate(pair))
    return int(image is None or image != label)


class Bucket:
    """The objects on disk, as the origin serves them."""

    def __init__(self, folder: Path, items: int) -> None:
        self.items = items
        self._root = folder / "buckets" / BUCKET / "items"
        self._drawn = folder / "drawn"
        self._versions = itertools.count(1)
        self.bytes = 0
        for name in ("images", "labels"):
            (self._root / name).mkdir(parents=True)
        for number in range(items):
            self.overwrite(number)
        self.bytes = sum(path.stat().st_size for path in self._root.rglob("*.*"))

    @property
    def folder(self) -> Path:
        """The folder that the server serves."""
        return self._root.parent.parent

    def overwrite(self, number: int) -> None:
        """Put a new version of an item into the bucket, one part after the other, as relabelling does."""
        version = next(self._versions)
        for part, (pattern, _) in enumerate(PARTS):
            Image.fromarray(pixels(number, part, version)).save(self._drawn, "PNG")
            self._drawn.replace(self._root / pattern.format(id=f"{number:05}"))


class OriginFaults:
    """Makes the origin fail, one fault after another, and the bucket change, in a thread while the context is entered."""

    def __init__(self, endpoint: str, bucket: Bucket, seed: int) -> None:
        self._endpoint = endpoint
        self._bucket = bucket
        self._random = random.Random(seed)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._make)
        self.faults = self.overwritten = 0

    def __enter__(self) -> "OriginFaults":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()
        self._clear()

    def _make(self) -> None:
        while not self._ended.wait(self._random.uniform(0.2, 1.0)):
            self._clear()
            for fault in self._random.sample(FAULTS, 2):
                kind = self._random.choice(["media", "media", "list", "metadata"])
                rule = fault | {"kind": kind, "every": self._random.choice([1, 2, 5]), "together": True}
                self._request("POST", "/_faults", json.dumps(rule).encode())
                self.faults += 1
            for _ in range(self._random.randrange(3)):
                self._bucket.overwrite(self._random.randrange(self._bucket.items))
                self.overwritten += 1

    def _clear(self) -> None:
        self._request("DELETE", "/_faults")
        self._request("POST", "/_release")

    def _request(self, method: str, path: str, body: bytes = b"") -> None:
        with urllib.request.urlopen(urllib.request.Request(self._endpoint + path, body, method=method)) as response:
            response.read()


class Readers:
    """Processes that read and check until the end: one epoch after another with workers, and streams with replacement.

    They are forked: enter `reading` before any thread is started.
    """

    def __init__(self, cache_dir: Path, items: int) -> None:
        context = multiprocessing.get_context("fork")  # slow imports are done
        self._paused, self._ended = context.Event(), context.Event()
        jobs: list[tuple[Callable[..., None], int]] = [(read_epochs, 1), (read_endlessly, 2), (read_endlessly, 3)]
        self._counts = [context.Array("q", 3) for _ in jobs]
        self._processes = [
            context.Process(target=job, args=(cache_dir, items, seed, counts, self._paused, self._ended))
            for (job, seed), counts in zip(jobs, self._counts, strict=True)
        ]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """They read until the context is left, which waits for them to stop."""
        for process in self._processes:
            process.start()
        try:
            yield
        finally:
            self._ended.set()
            for process in self._processes:
                process.join(60)
                if process.is_alive():
                    process.kill()
                    process.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """They pause within the context, once each has finished its read."""
        self._paused.set()
        try:
            yield
        finally:
            self._paused.clear()

    @property
    def counts(self) -> list[int]:
        """Objects read, wrong objects and failed reads, over all processes."""
        return [sum(counts[which] for counts in self._counts) for which in (READS, WRONG, FAILED)]

    @property
    def all_read(self) -> bool:
        """Whether each of them has started and none has died."""
        return all(counts[READS] for counts in self._counts) and all(process.is_alive() for process in self._processes)


def read_epochs(cache_dir: Path, items: int, seed: int, counts: Any, paused: Event, ended: Event) -> None:
    """Read as a training job does."""
    expect_fallbacks()
    made = get_cached_dataloaders(DATA_ROOT, cache_dir, BATCH, wrong, 0.0, 2, seed, label_mode="index")
    while not ended.is_set():
        try:
            for batch in made["train"]:
                counts[READS] += 2 * len(batch)
                counts[WRONG] += int(batch.sum())
                wait_while(paused, ended)
                if ended.is_set():
                    break
        except Exception as exc:
            failed(counts, exc)


def read_endlessly(cache_dir: Path, items: int, seed: int, counts: Any, paused: Event, ended: Event) -> None:
    """Read as a job does that the daemon does not know in advance."""
    expect_fallbacks()
    loader = CachedLoader(cache_dir)
    ids = [f"{number:05}" for number in range(items)]
    with contextlib.closing(loader):
        for item in generate_stream(ids, seed):
            wait_while(paused, ended)
            if ended.is_set():
                return
            for part, (pattern, _) in enumerate(PARTS):
                try:
                    picture = loader(f"{DATA_ROOT}/{pattern.format(id=item)}", mode=None)
                except Exception as exc:
                    failed(counts, exc)
                else:
                    counts[READS] += 1
                    counts[WRONG] += number_of(picture, part) != int(item)


def expect_fallbacks() -> None:
    """They are counted; a line per failure of the daemon would hide the table."""
    logging.getLogger("gcs_dataset").setLevel(logging.ERROR)


def wait_while(paused: Event, ended: Event) -> None:
    """A reader's pause: the time that it trains."""
    time.sleep(0.002)
    while paused.is_set() and not ended.is_set():
        ended.wait(0.05)


def failed(counts: Any, exc: Exception) -> None:
    """Count a failed read and print why."""
    counts[FAILED] += 1
    print(f"reader {os.getpid()}: {type(exc).__name__}: {str(exc)[:500]}", flush=True)
