"""The loaders that this project started from, for comparison: one request after another, and a flood of them.

Their way of loading is kept, not their code: the sync one creates a client and requests the bucket for every image, the async
one keeps 128 items in flight per worker, drawn at random without end, and yields them as they arrive.
"""

import asyncio
import io
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import janus
from gcloud.aio.storage import Storage
from google.api_core.retry import Retry
from google.cloud import storage
from PIL import Image
from torch.utils.data import IterableDataset

__all__ = ["AsyncSeed", "sync_seed_loader"]

IN_FLIGHT = 128  # items of each worker


@Retry()
def sync_seed_loader(uri: str) -> Image.Image:
    """One image: a client, its bucket, the object."""
    where = urlsplit(uri)
    # STORAGE_EMULATOR_HOST names the origin; the project would come from real credentials.
    bucket = storage.Client(project="bench").get_bucket(where.netloc)
    return Image.open(io.BytesIO(bucket.blob(where.path[1:]).download_as_bytes())).convert("RGB")


class AsyncSeed(IterableDataset[Any]):
    """`sample(image, label)` of the bytes of endless random items, in order of arrival."""

    def __init__(self, url: str, data_root: str, items: Sequence[str], sample: Callable[[bytes, bytes], Any]) -> None:
        self._url = url
        self._root = urlsplit(data_root)
        self._items = items
        self._sample = sample

    def __iter__(self) -> Iterator[Any]:
        made: list[janus.Queue[Any]] = []
        is_ready = threading.Event()

        async def stream() -> None:
            made.append(janus.Queue(IN_FLIGHT))
            is_ready.set()
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), raise_for_status=True) as session:
                await asyncio.gather(*(self._load(session, made[0]) for _ in range(IN_FLIGHT)))

        threading.Thread(target=asyncio.run, args=[stream()], daemon=True).start()
        is_ready.wait()
        while True:
            yield self._sample(*made[0].sync_q.get())

    async def _load(self, session: aiohttp.ClientSession, queue: "janus.Queue[Any]") -> None:
        while True:
            item = random.choice(self._items)
            store = Storage(session=session, api_root=self._url, token=object(), api_is_dev=True)  # type: ignore[arg-type]
            names = [f"{self._root.path[1:]}/images/{item}.jpg", f"{self._root.path[1:]}/labels/{item}.png"]
            with suppress(aiohttp.ClientError, TimeoutError):  # an item that fails is skipped
                await queue.async_q.put(await asyncio.gather(*(store.download(self._root.netloc, name) for name in names)))
