"""The initialisation of DataLoader workers."""

import random
import subprocess
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gcs_dataset import worker_init_fn


class Draws(Dataset[tuple[float, float]]):
    """Each sample is one draw from each of the worker's two generators."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[float, float]:
        return random.random(), float(np.random.rand())


def drawn() -> list[tuple[float, float]]:
    torch.manual_seed(7)
    loader = DataLoader(Draws(), batch_size=None, num_workers=2, worker_init_fn=worker_init_fn)
    return [(float(a), float(b)) for a, b in loader]


def test_every_worker_draws_its_own_numbers_and_torchs_seed_repeats_them() -> None:
    first = drawn()
    assert len(set(first)) == len(first) == 4
    assert drawn() == first


def test_worker_seeds_equal_torchs() -> None:
    def draw() -> tuple[float, float]:
        torch.manual_seed(2**40 + 7)
        worker_init_fn(0)
        return random.random(), float(np.random.rand())

    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        assert draw() == draw()
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def test_memory_of_images_is_not_mapped_and_unmapped_each_time() -> None:
    """With glibc's defaults, arrays of this size are mapped separately."""
    script = """
import numpy as np
from gcs_dataset.dataloader_worker import keep_freed_memory
keep_freed_memory()
def mapped(array):
    address = array.__array_interface__["data"][0]
    ranges = (line.split()[0].split("-") for line in open("/proc/self/maps") if "[heap]" in line)
    return any(int(a, 16) <= address < int(b, 16) for a, b in ranges)
print(all(mapped(np.ones(30_000_000, dtype=np.uint8)) for _ in range(3)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
