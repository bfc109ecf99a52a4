"""Two ranks on one node with one daemon: torchrun and gloo, killed in the middle of an epoch and resumed with one process."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.epoch_order import epoch_order
from gcs_prefetchd.testing import ServingGCS, serving
from support.daemons import DATA_ROOT, clean_environment, daemon_process, put_items

ITEMS, BATCH, SEED = 31, 3, 7  # an odd number: two ranks repeat one item

# A user's training script. Each rank prints the batches that it got, as JSON lines; in epoch 1, after `pause_after` batches, it
# saves the state, prints "paused" and waits to be killed.
TRAINING = """
import json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from gcs_dataset import get_cached_dataloaders

root, cache_dir, checkpoint, pause_after, workers = sys.argv[1:]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")

def report(**fields):
    # One write for each line: both ranks share the pipe.
    os.write(1, (json.dumps({"rank": rank, "pid": os.getpid(), **fields}) + "\\n").encode())

def label_of(pair):
    return pair[1].getpixel((0, 0))

loader = get_cached_dataloaders(
    root, cache_dir, BATCH, label_of, 0.0, int(workers), SEED, label_mode="index"
)["train"]
first = 0
if Path(checkpoint).exists():
    state = json.loads(Path(checkpoint).read_text())
    loader.load_state_dict(state)
    first = state["epoch"]
for epoch in range(first, 2):
    loader.set_epoch(epoch)
    for count, batch in enumerate(loader, 1):
        report(epoch=epoch, items=batch.tolist())
        if epoch == 1 and count == int(pause_after):
            states = [None] * world
            dist.all_gather_object(states, loader.state_dict())
            assert all(state == states[0] for state in states)
            if rank == 1:  # the state of either rank resumes both
                Path(checkpoint).write_text(json.dumps(loader.state_dict()))
            dist.barrier()
            report(event="paused")
            signal.pause()
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.fixture
def server() -> Iterator[ServingGCS]:
    with serving(latency_s=0.005) as server:
        yield server


class Training:
    """Runs of the training script over one cache directory and checkpoint."""

    def __init__(self, folder: Path, server: ServingGCS) -> None:
        self.cache_dir = folder / "cache"
        self.environment = clean_environment() | {"STORAGE_EMULATOR_HOST": server.url, "OMP_NUM_THREADS": "1"}
        self.script = folder / "training.py"
        self.script.write_text(TRAINING.replace("BATCH", str(BATCH)).replace("SEED", str(SEED)))
        self.checkpoint = folder / "checkpoint.json"

    @contextmanager
    def running(self, ranks: int, *, pause_after: int = -1, workers: int = 0) -> Iterator["subprocess.Popen[str]"]:
        """The script under torchrun, or alone; all processes that it started are killed at the end."""
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]  # any free port
        arguments = [DATA_ROOT, str(self.cache_dir), str(self.checkpoint), str(pause_after), str(workers)]
        command = [sys.executable, *((*torchrun, *rendezvous) if ranks > 1 else ()), str(self.script), *arguments]
        with subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def run(self, ranks: int, workers: int = 0) -> list[dict[str, Any]]:
        """Run it until it exits; returns what it reported."""
        with self.running(ranks, workers=workers) as process:
            reported = lines_of(process)
            assert process.wait(60) == 0
        return reported

    def run_until_killed(self, ranks: int, pause_after: int, client: DaemonClient) -> tuple[list[dict[str, Any]], set[str]]:
        """Run it until every rank has paused, and kill everything at once, workers too.

        Returns what it reported, and the streams that the daemon knew then.
        """
        reported: list[dict[str, Any]] = []
        with self.running(ranks, pause_after=pause_after, workers=1) as process:
            assert process.stdout is not None
            while sum(line.get("event") == "paused" for line in reported) < ranks:
                reported.append(json.loads(process.stdout.readline()))
            streams = set(client.status().streams)
            groups = {os.getpgid(line["pid"]) for line in reported} | {os.getpgid(process.pid)}
            for group in groups:  # torchrun gives each rank a session of its own
                os.killpg(group, signal.SIGKILL)
        return [line for line in reported if "items" in line], streams


def lines_of(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    assert process.stdout is not None
    return [json.loads(line) for line in process.stdout]


def order_of(epoch: int) -> list[int]:
    """The global order: the labels are the items' numbers."""
    return [int(item) for item in epoch_order(SEED, epoch, np.arange(ITEMS, dtype=np.uint32))]


def read_in(reported: list[dict[str, Any]], epoch: int, ranks: int) -> list[int]:
    """What the ranks read in an epoch, in rounds of one item for each rank."""
    shares = [
        [item for line in reported if (line["rank"], line["epoch"]) == (rank, epoch) for item in line["items"]]
        for rank in range(ranks)
    ]
    return [item for turn in zip(*shares, strict=True) for item in turn]


def wait_until_no_stream_of(client: DaemonClient, streams: set[str]) -> None:
    for _ in range(100_000):
        if not streams & set(client.status().streams):
            return
    raise AssertionError(f"the daemon still knows {streams & set(client.status().streams)}")


def test_two_ranks_read_every_item_once_an_epoch_and_cost_one_get_an_object(server: ServingGCS, tmp_path: Path) -> None:
    put_items(server, ITEMS)
    training = Training(tmp_path, server)
    with daemon_process(training.cache_dir, server.url) as client:
        reported = training.run(ranks=2)
        for epoch in range(2):
            order = order_of(epoch)
            read = read_in(reported, epoch, ranks=2)
            assert read == [*order, order[0]]  # the odd one is repeated, as by torch's DistributedSampler
            assert Counter(read) == Counter(range(ITEMS)) + Counter([order[0]])
        assert len(server.counts.media) == 2 * ITEMS
        assert set(server.counts.media.values()) == {1}
        reads = client.stats()["reads"]
        assert reads["fallbacks"] == 0
        assert reads["hits"] + reads["misses"] == 2 * 2 * (ITEMS + 1)


def test_after_a_kill_mid_epoch_one_process_continues_the_same_global_order(server: ServingGCS, tmp_path: Path) -> None:
    put_items(server, ITEMS)
    training = Training(tmp_path, server)
    with daemon_process(training.cache_dir, server.url) as client:
        killed, streams = training.run_until_killed(ranks=2, pause_after=2, client=client)
        assert len(streams) == 2
        wait_until_no_stream_of(client, streams)
        resumed = training.run(ranks=1)
        assert read_in(killed, 0, ranks=2)[:ITEMS] == order_of(0)
        before_the_kill, after_it = read_in(killed, 1, ranks=2), read_in(resumed, 1, ranks=1)
        assert len(before_the_kill) == 2 * 2 * BATCH
        assert before_the_kill + after_it == order_of(1)
        assert {line["epoch"] for line in resumed} == {1}
        assert set(server.counts.media.values()) == {1}
