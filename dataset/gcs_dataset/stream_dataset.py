"""The streaming dataset: many downloads in flight in one event loop per worker, delivered in the stream's order."""

import itertools
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from gcs_dataset.decode import decode
from gcs_dataset.image_label_pairs import LabelMode, Pairs, pillow_mode
from gcs_prefetchd.shared.epoch_order import endless_order
from gcs_prefetchd.shared.errors import SettingsError
from gcs_prefetchd.shared.item_patterns import IMAGE_PATTERN, LABEL_PATTERN

__all__ = ["AsyncImageDataset", "generate_stream"]

CHUNK_ITEMS = 1024


def generate_stream(items: Sequence[str], seed: int | None = None, worker: int = 0, workers: int = 1) -> Iterator[str]:
    """Endless ids, drawn with replacement: positions `worker`, `worker + workers`, ... of the stream of `seed`.

    The workers' shares never overlap, and interleaved they are the stream of a single worker. `seed=None` uses a random seed.
    Raises SettingsError if `items` is empty or there is no such worker.
    """
    if not items:
        raise SettingsError("items must hold at least one id to draw from")
    if not 0 <= worker < workers:
        raise SettingsError(f"worker must be between 0 and {workers - 1} of {workers} workers, not {worker}")
    return _draw(items, secrets.randbits(63) if seed is None else seed, worker, workers)


def _draw(items: Sequence[str], seed: int, worker: int, workers: int) -> Iterator[str]:
    count = CHUNK_ITEMS * workers
    for start in itertools.count(0, count):
        for index in endless_order(seed, start, count, len(items))[worker::workers].tolist():
            yield items[index]


class AsyncImageDataset(IterableDataset[Any]):
    """Pairs of a PIL image and a PIL label from GCS, `concurrency` items of each worker in flight.

    - `passes=None` draws from `items` without end and with replacement; a number reads them in order that many times.
      In both cases each worker reads its own share.
    - `seed` fixes the draw; None uses torch's seed, and each iteration draws other items.
    - `transform`, `label_mode` and the patterns are those of ImageDataset.

    Uses application default credentials, or none with STORAGE_EMULATOR_HOST. An item that cannot be read raises an error that
    names its object, at the item's position in the stream. However the iteration ends, its thread stops and its connections are
    closed.
    """

    def __init__(
        self,
        data_root: str | os.PathLike[str],
        items: Sequence[str],
        transform: Callable[[tuple[Image.Image, Image.Image]], Any] | None = None,
        concurrency: int = 64,
        *,
        passes: int | None = None,
        seed: int | None = None,
        label_mode: LabelMode = "RGB",
        image_pattern: str = IMAGE_PATTERN,
        label_pattern: str = LABEL_PATTERN,
    ) -> None:
        if concurrency < 1:
            raise SettingsError(f"concurrency must be at least 1, not {concurrency}")
        self.data_root = data_root
        self.items = items
        self.transform = transform
        self.concurrency = concurrency
        self.passes = passes
        self.seed = seed
        self.label_mode = label_mode
        self._label_mode = pillow_mode(label_mode)
        self._pairs = Pairs.below(data_root, image_pattern, label_pattern)
        self._iterations: Counter[int] = Counter()  # by worker, because workers can be threads that share this object

    def __iter__(self) -> Iterator[Any]:
        """Pairs, or what the transform returns for them."""
        from gcs_dataset.async_download import Downloads  # loads aiohttp, which only streaming needs

        pairs = map(self._pairs.paths_of, self._share())
        with Downloads(pairs, self.concurrency) as downloads:
            for uris, data in downloads:
                image, label = map(decode, data, uris, ["RGB", self._label_mode])
                yield (image, label) if self.transform is None else self.transform((image, label))

    def _share(self) -> Iterator[str]:
        """The ids of this worker, in its order."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if self.passes is None:
            return generate_stream(self.items, self._stream_seed(), worker, workers)
        return itertools.chain.from_iterable(
            map(self.items.__getitem__, range(worker, len(self.items), workers)) for _ in range(self.passes)
        )

    def _stream_seed(self) -> int:
        if self.seed is not None:
            return self.seed
        info = get_worker_info()
        if info is None:
            return int(torch.empty((), dtype=torch.int64).random_().item())
        # Shared by all workers of one iteration. Persistent workers keep it, so they count their iterations.
        self._iterations[info.id] += 1
        return info.seed - info.id + self._iterations[info.id] - 1
