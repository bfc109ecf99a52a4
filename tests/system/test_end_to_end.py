"""Training through a real daemon: the bytes, the order, and the effect of killing the daemon."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcs_dataset import get_cached_dataloaders
from gcs_prefetchd.testing import ServingGCS, serving
from support.daemons import DATA_ROOT, check_left_behind, daemon_process, make_settings, put_items, run_command, start_arguments
from support.training import BATCH, Run

ITEMS = 60


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingGCS]:
    """A server with a latency of 10 ms, which the fallback finds by google-cloud-storage's own variable."""
    with serving(latency_s=0.01) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def test_an_epoch_reads_the_buckets_bytes_in_the_seeded_order(server: ServingGCS, tmp_path: Path) -> None:
    objects = put_items(server, ITEMS)
    with daemon_process(tmp_path / "cache", server.url) as client:
        run = Run(objects, tmp_path / "cache", workers=2)
        for epoch in range(2):
            assert len(list(run.batches(epoch))) == len(run.loaders["train"])
        assert run.order(0) != run.order(1)
        assert sorted(run.order(0)) == sorted(run.order(1))
        assert max(server.counts.media.values()) == 1  # one GET an object, whichever process needed it
        del run
        reads = client.stats()["reads"]
        assert reads["fallbacks"] == 0
        assert reads["hits"] + reads["misses"] > 0


def test_training_continues_while_the_daemon_is_killed_and_restarted(server: ServingGCS, tmp_path: Path) -> None:
    objects = put_items(server, ITEMS)
    cache_dir = tmp_path / "cache"
    extra = ["--set", "window_items=8"]
    with daemon_process(cache_dir, server.url, extra) as client:
        run = Run(objects, cache_dir, workers=2)
        batches = run.batches(0)
        for number in batches:
            if number == 2:
                os.kill(client.status().pid, signal.SIGKILL)
            if number == 6:
                assert run_command("start", *start_arguments(cache_dir, server.url, extra)).returncode == 0
        assert number == len(run.loaders["train"]) - 1
    with_a_kill = dict(server.counts.media)
    assert set(with_a_kill) >= {uri.removeprefix("gs://") for uri in objects if uri.split("/")[-1][:5] in run.order(0)}


async def test_the_cache_is_intact_after_a_kill_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_dir = tmp_path / "cache"
    with serving(latency_s=0.01) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        objects = put_items(server, ITEMS)
        with daemon_process(cache_dir, server.url) as client:
            for number in Run(objects, cache_dir, workers=0).batches(0):
                if number == 3:
                    os.kill(client.status().pid, signal.SIGKILL)
        await check_left_behind(make_settings(cache_dir, server.url))


def test_without_a_daemon_the_batches_and_their_order_are_the_same(server: ServingGCS, tmp_path: Path) -> None:
    objects = put_items(server, ITEMS)
    with daemon_process(tmp_path / "cache", server.url):
        with_daemon = Run(objects, tmp_path / "cache", workers=0).order(5)
    run = Run(objects, tmp_path / "elsewhere", workers=2)
    assert run.order(5) == with_daemon
    assert len(list(run.batches(5))) == len(run.loaders["train"])


def test_the_test_side_is_read_through_the_cache_too(server: ServingGCS, tmp_path: Path) -> None:
    put_items(server, ITEMS)
    with daemon_process(tmp_path / "cache", server.url):
        loaders = get_cached_dataloaders(DATA_ROOT, tmp_path / "cache", BATCH, num_workers=0, test_ratio=0.3)
        sides = {name: {int(index) for index in loader.sampler} for name, loader in loaders.items()}
        assert sides["train"] | sides["test"] == set(range(ITEMS))
        assert not sides["train"] & sides["test"]
        assert sum(len(images) for images, _ in loaders["test"]) == len(sides["test"]) > 0
        assert max(server.counts.media.values()) == 1
