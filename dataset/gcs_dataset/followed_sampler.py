"""Sends any sampler's epochs to the daemon before they are read, and yields them unchanged."""

import logging
import operator
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from gcs_dataset.background_call import call_in_background
from gcs_dataset.cached_loader import CachedLoader
from gcs_dataset.manifest_source import daemon_manifest, newer_manifest
from gcs_dataset.plan_registration import CHECK_PAUSE_S, FIRST_ITEM_WAIT_S, PlanSender, Share
from gcs_prefetchd.shared.epoch_order import Indices
from gcs_prefetchd.shared.errors import PrefetchdError, SettingsError
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.objects import DataRoot

__all__ = ["FollowedSampler", "follow"]

MOST_ITEMS = 1 << 26  # the largest plan that a daemon accepts

log = logging.getLogger("gcs_dataset")


def follow(
    sampler: Iterable[Any], loader: CachedLoader, data_root: str | None = None, *, read_ahead: int = 0
) -> "FollowedSampler":
    """Let the daemon prefetch along any sampler: `DataLoader(dataset, sampler=follow(sampler, loader, data_root))`.

    - `sampler`: yields dataset indices, or lists of them (a batch sampler); each iteration must end.
    - `loader`: the dataset's loader, which names the cache directory and the job that reads.
    - `data_root`: what the dataset reads; not needed if the loader has a manifest.
    - `read_ahead`: how many indices the DataLoader takes before their items are read.

    The dataset's items must be all those of the data root's manifest, in its order (sorted by id, as `get_manifest` and
    `load_items_gcs` return them), because an index must mean the same item here and in the daemon. A loader's manifest is never
    replaced; without one each epoch is sent as one of the daemon's newest listing, as long as that has the same items. Without
    a daemon the same indices are yielded, and nothing is sent. Raises SettingsError if no data root is named; iterating raises
    it if an index is beyond the manifest, or the sampler does not end.
    """
    return FollowedSampler(sampler, loader, data_root, read_ahead=read_ahead)


class FollowedSampler(Sampler[Any]):
    """What `follow` returns. It has the length of the sampler that it follows, and forwards `set_epoch` to it."""

    def __init__(
        self,
        sampler: Iterable[Any],
        loader: CachedLoader,
        data_root: str | None = None,
        *,
        read_ahead: int = 0,
        most_items: int = MOST_ITEMS,
        check_pause_s: float = CHECK_PAUSE_S,
    ) -> None:
        self.sampler = sampler
        if data_root is None and loader.manifest is None:
            raise SettingsError("data_root must name what the sampler's indices refer to, because the loader has no manifest")
        root = loader.manifest.data_root if data_root is None and loader.manifest else DataRoot.parse(str(data_root))
        if loader.manifest is not None and loader.manifest.data_root != root:
            raise SettingsError(f"data_root is {root.uri}, and the loader's manifest is of {loader.manifest.data_root.uri}")
        self._data_root = root
        self._loader = loader
        self._read_ahead = read_ahead
        self._most_items = most_items
        self._check_pause_s = check_pause_s
        self._stream = f"follow-{uuid.uuid4().hex[:8]}"
        self._next_epoch = 0
        self._sender: PlanSender | None = None
        self._manifest_request: Future[Manifest] | None = None
        self._rejected_digest = ""  # of a listing of other items

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # one without a length raises TypeError

    def set_epoch(self, epoch: int) -> None:
        """Forward the epoch, if the sampler accepts one."""
        self._next_epoch = epoch
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        # A generator: DataLoader creates iterators that it never uses, and a sampler may draw random numbers for each.
        yielded = list(islice(self.sampler, self._most_items + 1))
        if len(yielded) > self._most_items:
            raise SettingsError(f"sampler yields more than {self._most_items} times; an endless sampler cannot be followed")
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        order, sizes = _flat(yielded)
        sender = self._start_plan(epoch, order)
        if sender is None:
            yield from yielded
            return
        read = 0
        for value, size in zip(yielded, sizes, strict=True):
            sender.ensure_sent(max(read - self._read_ahead, 0))
            read += size
            yield value

    def _start_plan(self, epoch: int, order: list[int]) -> PlanSender | None:
        """Send what will be yielded; None while there is no manifest that defines what the indices mean."""
        if self._sender is None:
            manifest = self._manifest()
            if manifest is None:
                return None
            self._sender = PlanSender(
                self._loader.cache_dir,
                manifest,
                job=self._loader.job,
                stream=self._stream,
                check_pause_s=self._check_pause_s,
            )
        elif self._loader.manifest is None:
            self._update_manifest(self._sender)
        indices = _checked_indices(order, self._sender.manifest)
        if len(indices):
            self._sender.start_plan(Share("listed", 0, epoch, indices), indices)
        return self._sender

    def _update_manifest(self, sender: PlanSender) -> None:
        """Use the daemon's newest listing for the plans if it has the same items, which the indices refer to."""
        newest = newer_manifest(sender.manifest, self._loader.cache_dir, self._rejected_digest)
        if newest is None:
            return
        if newest.ids == sender.manifest.ids:
            sender.use_manifest(newest)
            return
        if not self._rejected_digest:
            log.warning(
                "%s: the items have changed in the bucket, but the sampler's indices refer to the earlier ones, so the daemon"
                " prefetches these; create the dataset and its sampler again to read the new ones",
                self._data_root.uri,
            )
        self._rejected_digest = newest.digest

    def _manifest(self) -> Manifest | None:
        """The loader's manifest, else the daemon's. Waits for the daemon a second at most, once an epoch."""
        if self._loader.manifest is not None:
            return self._loader.manifest
        if self._manifest_request is None:
            self._manifest_request = call_in_background(partial(daemon_manifest, self._data_root, self._loader.cache_dir))
        if not wait([self._manifest_request], FIRST_ITEM_WAIT_S).done:
            return None
        request, self._manifest_request = self._manifest_request, None
        try:
            return request.result()
        except PrefetchdError:
            return None  # the readers log that there is no daemon


def _flat(yielded: list[Any]) -> tuple[list[int], list[int]]:
    """The indices one by one, and how many of them each value of the sampler holds."""
    order: list[int] = []
    sizes: list[int] = []
    for value in yielded:
        before = len(order)
        try:
            order.append(operator.index(value))
        except TypeError:
            try:
                order.extend(map(operator.index, value))
            except TypeError:
                raise SettingsError(f"sampler yields {value!r:.80}, which is neither an index nor a list of indices") from None
        sizes.append(len(order) - before)
    return order, sizes


def _checked_indices(order: list[int], manifest: Manifest) -> Indices:
    items = len(manifest)
    wrong = next((index for index in order if not 0 <= index < items), None)
    if wrong is not None:
        raise SettingsError(
            f"sampler yields the index {wrong}, but {manifest.data_root.uri} has {items} items: the dataset's items must be"
            " those of the manifest"
        )
    return np.array(order, dtype=np.uint32)
