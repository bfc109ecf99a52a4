"""The async dataset: shares, order, errors at their position, and nothing left behind.

The module async_download has no tests of its own: this dataset is its only user.
"""

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gcs_dataset import AsyncImageDataset, generate_stream
from gcs_prefetchd.shared.errors import CredentialsError, InvalidNameError, ItemError, ObjectMissingError, SettingsError
from gcs_prefetchd.shared.manifest import Ids
from gcs_prefetchd.testing import FlippedByte, Kind, Pace, ServingGCS, Stall, Status
from support.datasets import ROOT, fill, gcs, number_of, read_all

IDS = [f"{number:04d}" for number in range(20)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingGCS]:
    with gcs(monkeypatch) as server:
        fill(server, 20)
        yield server


def numbers(pair: tuple[Any, Any]) -> tuple[int, int]:
    image, label = pair
    return number_of(image), label.getpixel((0, 0))


def as_item_numbers(samples: object) -> list[int]:
    return [int(image) for image, _ in samples]  # type: ignore[attr-defined]


def download_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gcs-dataset-downloads"]


@given(st.integers(1, 50), st.integers(0, 2**64), st.integers(1, 5))
def test_the_workers_shares_together_are_the_stream_of_one_worker(count: int, seed: int, workers: int) -> None:
    items = [str(number) for number in range(count)]
    complete = list(islice(generate_stream(items, seed), 60))
    shares = [generate_stream(items, seed, worker, workers) for worker in range(workers)]
    assert [next(shares[position % workers]) for position in range(60)] == complete


def test_a_long_share_continues_past_one_chunk() -> None:
    complete = list(islice(generate_stream(IDS, 7), 9000))
    assert list(islice(generate_stream(IDS, 7, 1, 3), 3000)) == complete[1::3]


def test_all_items_are_drawn_about_equally_often() -> None:
    drawn = list(islice(generate_stream(IDS, 1), 20_000))
    assert all(850 < drawn.count(item) < 1150 for item in IDS)


def test_streams_without_a_seed_differ() -> None:
    assert list(islice(generate_stream(IDS), 30)) != list(islice(generate_stream(IDS), 30))


def test_an_empty_stream_and_an_invalid_worker_are_refused() -> None:
    with pytest.raises(SettingsError, match="items must hold at least one id"):
        generate_stream([])
    with pytest.raises(SettingsError, match="worker must be between 0 and 1 of 2 workers, not 2"):
        generate_stream(IDS, worker=2, workers=2)
    with pytest.raises(SettingsError, match="concurrency must be at least 1, not 0"):
        AsyncImageDataset(ROOT, IDS, concurrency=0)


def test_pairs_arrive_in_the_order_of_the_stream(server: ServingGCS) -> None:
    server.pace = Pace(latency_s=0.005, latency_sigma=1.0)
    dataset = AsyncImageDataset(ROOT, IDS, numbers, seed=7, label_mode="index")
    got = list(islice(dataset, 100))
    assert [f"{image:04d}" for image, _ in got] == list(islice(generate_stream(IDS, 7), 100))
    assert all(label == image % 7 for image, label in got)


def test_without_a_transform_pairs_are_rgb_images(server: ServingGCS) -> None:
    image, label = next(iter(AsyncImageDataset(ROOT, ["0003"], passes=1)))
    assert (image.mode, label.mode, label.getpixel((0, 0))) == ("RGB", "RGB", (3, 6, 252))


def test_as_many_items_are_in_flight_as_configured(server: ServingGCS) -> None:
    server.faults.add(Stall(None))
    iterator = iter(AsyncImageDataset(ROOT, IDS, numbers, concurrency=5, passes=1))
    reading = threading.Thread(target=next, args=(iterator,))
    reading.start()
    server.wait_for(lambda counts: counts.open_media == 10)
    server.faults.clear()
    server.release()
    reading.join()
    assert server.counts.peak_open_media == 10
    iterator.close()  # type: ignore[attr-defined]


def test_a_slow_reader_pauses_the_downloads(server: ServingGCS) -> None:
    iterator: Any = iter(AsyncImageDataset(ROOT, IDS, numbers, concurrency=2))
    next(iterator)
    # Items: the one that was read, 8 in the queue, one that waits for space in it, and one in flight behind that.
    server.wait_for(lambda counts: counts.total(Kind.MEDIA) == 2 * 11)
    for _ in range(5):
        next(iterator)
    server.wait_for(lambda counts: counts.total(Kind.MEDIA) == 2 * 16)
    iterator.close()
    assert server.counts.total(Kind.MEDIA) == 2 * 16


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_every_worker_has_its_own_share_of_one_pass(server: ServingGCS, context: str) -> None:
    dataset = AsyncImageDataset(ROOT, Ids.from_sorted(IDS), numbers, passes=1)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context, persistent_workers=True)
    assert sorted(as_item_numbers(loader)) == list(range(20))
    assert sorted(as_item_numbers(loader)) == list(range(20))
    assert server.counts.total(Kind.MEDIA) == 2 * 40


def test_a_number_of_passes_ends_after_them(server: ServingGCS) -> None:
    assert as_item_numbers(AsyncImageDataset(ROOT, IDS[:3], numbers, passes=2)) == [0, 1, 2, 0, 1, 2]
    assert list(AsyncImageDataset(ROOT, [], numbers, passes=1)) == []


def test_a_seed_repeats_its_draw_and_without_one_every_iteration_differs(server: ServingGCS) -> None:
    def drawn(dataset: AsyncImageDataset, times: int, workers: int) -> list[list[int]]:
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        return [as_item_numbers(islice(loader, 20)) for _ in range(times)]

    for workers in [0, 2]:
        fixed = drawn(AsyncImageDataset(ROOT, IDS, numbers, seed=7), 2, workers)
        assert fixed[0] == fixed[1]
        torch.manual_seed(1)
        free = drawn(AsyncImageDataset(ROOT, IDS, numbers), 2, workers)
        assert free[0] != free[1]
        torch.manual_seed(1)
        assert drawn(AsyncImageDataset(ROOT, IDS, numbers), 2, workers) == free


def test_transient_errors_are_retried(server: ServingGCS) -> None:
    server.faults.add(Status(503), "*/0003.jpg", requests=1)
    server.faults.add(FlippedByte(), "*/0004.png", requests=1)
    assert as_item_numbers(AsyncImageDataset(ROOT, IDS[:6], numbers, passes=1)) == list(range(6))


def test_a_missing_object_raises_at_its_position_and_is_named(server: ServingGCS) -> None:
    server.delete("pictures", "set/labels/0003.png")
    iterator = iter(AsyncImageDataset(ROOT, IDS, numbers, passes=1))
    assert as_item_numbers(islice(iterator, 3)) == [0, 1, 2]
    with pytest.raises(ObjectMissingError, match=f"{ROOT}/labels/0003.png"):
        next(iterator)
    assert download_threads() == []


def test_an_error_reaches_the_main_process_unchanged(server: ServingGCS) -> None:
    server.put("pictures", "set/images/0003.jpg", b"not an image")
    with pytest.raises(ItemError, match=f"{ROOT}/images/0003.jpg: is not an image"):
        read_all(DataLoader(AsyncImageDataset(ROOT, IDS, numbers, passes=1), batch_size=None, num_workers=2))


def test_an_invalid_name_raises_in_the_reader(server: ServingGCS) -> None:
    with pytest.raises(InvalidNameError, match="not a valid object name"):
        list(AsyncImageDataset(ROOT, ["x" * 2000], numbers, passes=1))


def test_missing_credentials_raise_in_the_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", f"{tmp_path}/none.json")
    with pytest.raises(CredentialsError, match=r"none\.json"):
        list(AsyncImageDataset(ROOT, IDS, numbers, passes=1))


@pytest.mark.parametrize("how", ["exhausted", "closed", "collected", "collected in a cycle"])
def test_the_end_of_an_iteration_stops_its_thread(server: ServingGCS, how: str) -> None:
    iterator: Any = iter(AsyncImageDataset(ROOT, IDS, numbers, passes=1 if how == "exhausted" else None))
    next(iterator)
    assert len(download_threads()) == 1
    if how == "exhausted":
        list(iterator)
    elif how == "closed":
        iterator.close()
    elif how == "collected in a cycle":
        cycle: list[Any] = [iterator]
        cycle.append(cycle)
        del cycle
    del iterator
    gc.collect()
    assert download_threads() == []


def test_an_iteration_that_is_closed_while_it_waits_stops_its_thread(server: ServingGCS) -> None:
    server.faults.add(Stall(None), "*", requests={2})
    iterator: Any = iter(AsyncImageDataset(ROOT, IDS[:1], numbers, concurrency=1))
    next(iterator)
    server.wait_for(lambda counts: counts.open_media > 0)
    iterator.close()
    assert download_threads() == []


def test_a_program_that_exits_while_streaming_prints_nothing(server: ServingGCS) -> None:
    # asyncio warns of slow steps, which mean nothing on a loaded machine; it logs failures as errors.
    script = f"""
import logging
logging.getLogger("asyncio").setLevel(logging.ERROR)
from gcs_dataset import AsyncImageDataset
iterator = iter(AsyncImageDataset({ROOT!r}, {IDS!r}))
print(next(iterator)[0].mode)
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "RGB\n", "")


def test_an_endless_dataloader_can_be_abandoned_at_any_time(server: ServingGCS) -> None:
    loader = DataLoader(AsyncImageDataset(ROOT, IDS, numbers, seed=1), batch_size=None, num_workers=2)
    assert len(as_item_numbers(islice(loader, 50))) == 50
