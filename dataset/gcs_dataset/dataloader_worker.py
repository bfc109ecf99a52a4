"""The initialisation of a DataLoader worker."""

import random

import numpy as np
import torch

from gcs_prefetchd.shared.malloc import keep_freed_memory

__all__ = ["worker_init_fn"]


def worker_init_fn(worker_id: int) -> None:
    """Seed Python's and numpy's generators from torch's, which differs between workers, and let malloc keep freed memory.

    So transforms that use `random` or `numpy.random` draw different numbers in every worker, and repeat with torch's seed.
    """
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    keep_freed_memory()
