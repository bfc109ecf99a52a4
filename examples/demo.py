"""`make demo`: train through gcs-prefetchd from a GCS-speaking server on this machine, and measure what it saves.

Makes 512 pairs of images and labels, serves them with 30 ms latency, starts the daemon as a user would, and trains for three
epochs with two workers through `get_cached_dataloaders`. For comparison it reads a sample with the sync streaming loader.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Subset

from gcs_dataset import get_cached_dataloaders, get_streamed_dataloaders
from segmentation import make_pairs, network

PAIRS = 512
EPOCHS = 3
WORKERS = 2
BATCH = 16
SAMPLE = 96  # items that the sync loader reads: all 512 would take most of a minute
LATENCY_MS = 30
DATA_ROOT = "gs://demo-bucket/shapes"

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Epoch:
    """The measurements of one pass over the data."""

    name: str
    items: int
    took_s: float
    waited_s: float
    hits: str
    gets: int
    loss: float

    def row(self) -> list[str]:
        """The cells of its line in the table."""
        rate, waiting = f"{self.items / self.took_s:,.0f}", f"{self.waited_s / self.took_s:.1%}"
        return [self.name, f"{self.items:,}", rate, waiting, self.hits, f"{self.gets:,}", f"{self.loss:.3f}"]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="gcs-prefetchd-demo-") as scratch:
        folder = Path(scratch)
        console.print(f"Making {PAIRS} pairs of images and labels ...")
        make_pairs(folder / "buckets" / "demo-bucket" / "shapes", PAIRS)
        with gcs_server(folder / "buckets") as endpoint:
            # Used by the loaders without the daemon and by the fallback; the daemon has a setting of its own.
            os.environ["STORAGE_EMULATOR_HOST"] = endpoint
            with daemon(folder / "cache", endpoint) as statistics_url:
                show(train(folder / "cache", endpoint, statistics_url), read_without_cache(endpoint))
    console.print(NEXT_STEPS)


@contextmanager
def gcs_server(buckets: Path) -> Iterator[str]:
    """A server that speaks GCS's API; yields its URL."""
    command = [sys.executable, "-m", "gcs_prefetchd.testing", "--root", str(buckets)]
    command += ["--port", "0", "--latency-ms", str(LATENCY_MS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline().strip()
        console.print(line)
        try:
            yield next(word.rstrip(":,") for word in line.split() if word.startswith("http"))
        finally:
            server.terminate()


@contextmanager
def daemon(cache_dir: Path, endpoint: str) -> Iterator[str]:
    """The daemon, started and stopped with its own commands; yields the URL of its statistics."""
    program = Path(sys.executable).with_name("gcs-prefetchd")
    arguments = ["--data-root", DATA_ROOT, "--cache-dir", str(cache_dir), "--cache-size", "1GB"]
    arguments += ["--endpoint", endpoint, "--anonymous", "--http", "127.0.0.1:0"]
    console.print(f"$ gcs-prefetchd start {' '.join(arguments)}")
    subprocess.run([program, "start", *arguments], check=True)
    try:
        yield json.loads((cache_dir / "daemon.json").read_text())["http"]
    finally:
        console.print(f"$ gcs-prefetchd stop --cache-dir {cache_dir}")
        subprocess.run([program, "stop", "--cache-dir", cache_dir], check=True)


def train(cache_dir: Path, endpoint: str, statistics_url: str) -> list[Epoch]:
    """Train for all epochs through the cache."""
    loaders = get_cached_dataloaders(DATA_ROOT, cache_dir, BATCH, num_workers=WORKERS, label_mode="index")
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    epochs = []
    gets_before, hits_before, reads_before = 0, 0, 0  # GETs from before the training count in the first epoch
    for epoch in range(EPOCHS):
        items, took_s, waited_s, loss = one_epoch(loaders["train"], model, optimizer)
        reads = fetch_json(f"{statistics_url}/stats")["reads"]
        total = reads["hits"] + reads["misses"] + reads["fallbacks"]
        hits = f"{(reads['hits'] - hits_before) / max(1, total - reads_before):.1%}"
        gets = media_gets(endpoint)
        epochs.append(Epoch(f"cached, epoch {epoch + 1}", items, took_s, waited_s, hits, gets - gets_before, loss))
        gets_before, hits_before, reads_before = gets, reads["hits"], total
        console.print(f"epoch {epoch + 1} of {EPOCHS}: loss {loss:.3f}")
    return epochs


def read_without_cache(endpoint: str) -> Epoch:
    """The sync streaming loader on a sample, with the same network."""
    everything = get_streamed_dataloaders(DATA_ROOT, BATCH, num_workers=WORKERS, label_mode="index")["train"].dataset
    loader: DataLoader[Any] = DataLoader(Subset(everything, range(SAMPLE)), BATCH, shuffle=True, num_workers=WORKERS)
    model = network()
    gets_before = media_gets(endpoint)
    items, took_s, waited_s, loss = one_epoch(loader, model, torch.optim.AdamW(model.parameters(), 3e-3))
    return Epoch("sync loader, sample", items, took_s, waited_s, "none", media_gets(endpoint) - gets_before, loss)


def one_epoch(
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]], model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float, float, float]:
    """Train on every batch; returns the items, the seconds in total and waiting for data, and the mean loss."""
    items, waited_s, losses = 0, 0.0, []
    started_s = waiting_since_s = time.perf_counter()
    for images, labels in loader:
        waited_s += time.perf_counter() - waiting_since_s
        loss = nn.functional.cross_entropy(model(images.float() / 255), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        losses.append(loss.item())
        items += len(images)
        waiting_since_s = time.perf_counter()
    waited_s += time.perf_counter() - waiting_since_s
    return items, time.perf_counter() - started_s, waited_s, sum(losses) / len(losses)


def media_gets(endpoint: str) -> int:
    """How many GETs of objects the server has received, from all clients."""
    return int(fetch_json(f"{endpoint}/_counts?objects=false")["requests"]["media"])


def fetch_json(url: str) -> dict[str, Any]:
    """The JSON object at the URL."""
    with urllib.request.urlopen(url) as response:
        return dict(json.loads(response.read()))


def show(epochs: list[Epoch], sample: Epoch) -> None:
    """Print the table."""
    table = Table("", "items", "items/s", "waiting", "hits", "GETs", "loss", box=None, padding=(0, 3, 0, 0))
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[0] else "right"
    for epoch in [*epochs, sample]:
        table.add_row(*epoch.row())
    console.print()
    console.print(table)
    console.print(LEGEND)


LEGEND = f"""
An item is an image and its label: two GETs to GCS, {LATENCY_MS} ms each. "waiting" is the share of the time in which the
training waited for a batch. The daemon started to fetch before the training started; its GETs count in epoch 1, including
those for the tenth of the items that is held back for testing.
"""

NEXT_STEPS = """
The same with your own bucket, which holds images/<id>.jpg and labels/<id>.png:
  gcs-prefetchd start --data-root gs://YOUR-BUCKET/PREFIX --cache-dir /local/ssd/cache --cache-size 200GB
and in the training script:
  from gcs_dataset import get_cached_dataloaders
  loaders = get_cached_dataloaders("gs://YOUR-BUCKET/PREFIX", "/local/ssd/cache", batch_size=32)
"""

if __name__ == "__main__":
    main()
