"""Training over a bucket, with every batch compared to the bucket's own bytes and the seed's order."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gcs_dataset import get_cached_dataloaders
from gcs_dataset.cached_loader import DEMAND_TIMEOUT_S
from support.daemons import DATA_ROOT

BATCH = 4


def pixels(data: bytes) -> torch.Tensor:
    """What the dataset must return for an object's bytes: uint8, shape (3, height, width)."""
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).copy()).permute(2, 0, 1)


class Run:
    """One epoch after the other over a bucket, with every batch compared to the bucket's own bytes."""

    def __init__(
        self, objects: dict[str, bytes], cache_dir: Path, workers: int, demand_timeout_s: float = DEMAND_TIMEOUT_S
    ) -> None:
        self.objects = objects
        self.loaders = get_cached_dataloaders(DATA_ROOT, cache_dir, BATCH, num_workers=workers, seed=3)
        self.loaders["train"].dataset.loader.demand_timeout_s = demand_timeout_s  # type: ignore[attr-defined]

    def batches(self, epoch: int) -> Iterator[int]:
        """Read an epoch; yields the number of each batch after its bytes have been checked."""
        sampler = self.loaders["train"].sampler
        sampler.set_epoch(epoch)
        order = self.order(epoch)
        for number, (images, labels) in enumerate(self.loaders["train"]):
            expected = order[number * BATCH : (number + 1) * BATCH]
            assert len(images) == len(expected)
            for item, image, label in zip(expected, images, labels, strict=True):
                assert torch.equal(image, pixels(self.objects[f"{DATA_ROOT}/images/{item}.jpg"])), item
                assert torch.equal(label, pixels(self.objects[f"{DATA_ROOT}/labels/{item}.png"])), item
            yield number

    def order(self, epoch: int) -> list[str]:
        """The ids that the epoch reads, in order."""
        loader = self.loaders["train"]
        loader.sampler.set_epoch(epoch)
        ids = loader.dataset.items  # type: ignore[attr-defined]
        order = [ids[index] for index in loader.sampler]
        loader.sampler.set_epoch(epoch)
        return order
