"""Resuming in the middle of an epoch, after the batches that a DataLoader has returned: ours and torchdata's."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from gcs_dataset import PlannedDataLoader, PlannedSampler

ITEMS = 23
DATASET: Any = list(range(ITEMS))  # a list is a dataset to torch

Make = Callable[..., Any]


def ours(sampler: PlannedSampler, **settings: Any) -> PlannedDataLoader:
    return PlannedDataLoader(DATASET, sampler=sampler, **settings)


def torchdatas(sampler: PlannedSampler, **settings: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(DATASET, sampler=sampler, **settings)


def items_of(batches: Any) -> list[int]:
    return [int(item) for batch in batches for item in torch.as_tensor(batch).reshape(-1)]


def loader_of(make: Make, **settings: Any) -> Any:
    workers = settings.get("num_workers", 0)
    return make(PlannedSampler(range(ITEMS), seed=5), persistent_workers=workers > 0, **settings)


@pytest.fixture(params=[ours, torchdatas], ids=["ours", "torchdata"])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 4},
        {"batch_size": 4, "num_workers": 2, "prefetch_factor": 5},
        {"batch_size": 4, "num_workers": 1, "drop_last": True},
        {"batch_size": None},
        {"batch_size": None, "num_workers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("returned", [0, 2, 6])
def test_exactly_the_batches_that_were_not_returned_are_read(make: Make, settings: dict[str, Any], returned: int) -> None:
    """However many batches the workers were given ahead. Six batches are the complete epoch: then nothing is left of it."""
    plain = ours(
        PlannedSampler(range(ITEMS), seed=5), batch_size=settings["batch_size"], drop_last=settings.get("drop_last", False)
    )
    expected = [items_of(plain) for _ in range(3)]
    loader = loader_of(make, **settings)
    items_of(loader)
    iterator = iter(loader)
    read = items_of(islice(iterator, min(returned, len(loader))))
    state = loader.state_dict()
    resumed = loader_of(make, **settings)
    resumed.load_state_dict(state)
    rest = items_of(resumed)
    assert read + rest == expected[1]
    assert items_of(resumed) == expected[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_from_after_an_epoch_is_that_of_the_next_epochs_start(make: Make, workers: int) -> None:
    loader, resumed = (loader_of(make, batch_size=4, num_workers=workers) for _ in range(2))
    items_of(loader)
    resumed.load_state_dict(loader.state_dict())
    assert items_of(resumed) == items_of(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_that_calls_set_epoch_resumes_where_it_was(make: Make, workers: int) -> None:
    """As training scripts do: the epoch is saved, and set before each iteration."""
    complete = loader_of(make, batch_size=4, num_workers=workers)
    expected = items_of(complete) + items_of(complete) + items_of(complete)
    for stop_after in (3, 6, 8):  # the sixth batch is the last of its epoch
        read: list[int] = []
        checkpoint: tuple[int, Any] = (0, None)
        for attempt in range(2):
            loader = loader_of(make, batch_size=4, num_workers=workers)
            first, state = checkpoint
            if state is not None:
                loader.load_state_dict(state)
            for epoch in range(first, 3):
                loader.sampler.set_epoch(epoch)
                for count, batch in enumerate(loader, len(read) // 4 + 1):
                    read += batch.tolist()
                    if attempt == 0 and count == stop_after:
                        checkpoint = (epoch, loader.state_dict())
                        break
                else:
                    continue
                break
        assert read == expected


def test_our_dataloader_and_torchs_yield_the_same_batches() -> None:
    for settings in ({"batch_size": 4}, {"batch_size": 4, "drop_last": True}, {"batch_size": None}):
        plain: DataLoader[Any] = DataLoader(DATASET, sampler=PlannedSampler(range(ITEMS), seed=5), **settings)
        planned = loader_of(ours, **settings)
        assert [items_of(planned) for _ in range(2)] == [items_of(plain) for _ in range(2)]
        assert len(planned) == len(plain)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_of_four_ranks_resumes_three(workers: int) -> None:
    """Each of the four has returned two batches of two; the state of any of them resumes the three."""
    complete = list(PlannedSampler(range(ITEMS), seed=5))
    loaders = [
        ours(PlannedSampler(range(ITEMS), seed=5, rank=rank, world=4), batch_size=2, num_workers=workers) for rank in range(4)
    ]
    read = [items_of(islice(iter(loader), 2)) for loader in loaders]
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    assert [item for turn in zip(*read, strict=True) for item in turn] == complete[:16]
    resumed = [
        ours(PlannedSampler(range(ITEMS), seed=5, rank=rank, world=3), batch_size=2, num_workers=workers) for rank in range(3)
    ]
    for loader in resumed:
        loader.load_state_dict(states[2])
    rest = [item for turn in zip(*map(items_of, resumed), strict=True) for item in turn]
    assert rest == [*complete[16:], *complete[16:18]]  # seven items are left for three ranks: two are repeated


def test_a_state_after_a_break_counts_the_last_batch() -> None:
    loader = loader_of(ours, batch_size=4, num_workers=2)
    for _ in loader:
        break
    assert loader.state_dict()["position"] == 4
    assert loader_of(ours, batch_size=4).state_dict()["position"] == 0
