"""Any sampler's epochs told to the daemon before they are read, and yielded as they are."""

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

MOST_ITEMS = 1 << 26  # the largest plan that a daemon takes

log = logging.getLogger("gcs_dataset")


def follow(
    sampler: Iterable[Any], loader: CachedLoader, data_root: str | None = None, *, read_ahead: int = 0
) -> "FollowedSampler":
    """Have the daemon prefetch along any sampler: `DataLoader(dataset, sampler=follow(sampler, loader, data_root))`.

    - `sampler`: yields dataset indices, or lists of them (a batch sampler); each iteration must end.
    - `loader`: the dataset's loader, which names the cache directory and the job that reads.
    - `data_root`: what the dataset reads; not needed where the loader has a manifest.
    - `read_ahead`: how many indices the DataLoader takes before their items are read.

    The dataset's items must be all those of the data root's manifest, in its order (sorted by id, as `get_manifest` and
    `load_items_gcs` give them), for an index means the same item here and in the daemon. A loader's manifest stays what it
    is; without one each epoch is told as one of the daemon's newest listing, as long as that has the same items. Without a
    daemon the indices are yielded just the same, and nobody is told. Raises SettingsError where no data root is named;
    iterating raises it where an index is beyond the manifest, or the sampler does not end.
    """
    return FollowedSampler(sampler, loader, data_root, read_ahead=read_ahead)


class FollowedSampler(Sampler[Any]):
    """What `follow` returns. It has the length of the sampler that it follows, and passes `set_epoch` on to it."""

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
            raise SettingsError("data_root must say what the sampler's indices are of; the loader has no manifest that does")
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
        self._asking: Future[Manifest] | None = None
        self._passed_over = ""  # the digest of a listing of other items

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # one without a length says so itself

    def set_epoch(self, epoch: int) -> None:
        """Pass it on, where the sampler takes it."""
        self._next_epoch = epoch
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        # A generator: DataLoader makes iterators that it never uses, and a sampler may draw at random for each.
        yielded = list(islice(self.sampler, self._most_items + 1))
        if len(yielded) > self._most_items:
            raise SettingsError(f"sampler yields more than {self._most_items} times; one that never ends cannot be followed")
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        order, sizes = _flat(yielded)
        sender = self._begin(epoch, order)
        if sender is None:
            yield from yielded
            return
        read = 0
        for one, size in zip(yielded, sizes, strict=True):
            sender.ensure_sent(max(read - self._read_ahead, 0))
            read += size
            yield one

    def _begin(self, epoch: int, order: list[int]) -> PlanSender | None:
        """Tell what will be yielded; None while there is no manifest that says what the indices mean."""
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
            self._follow_listing(self._sender)
        indices = _checked(order, self._sender.manifest)
        if len(indices):
            self._sender.start_plan(Share("listed", 0, epoch, indices), indices)
        return self._sender

    def _follow_listing(self, sender: PlanSender) -> None:
        """Have the plans be of the daemon's newest listing, where it has the same items: of those are the indices."""
        newest = newer_manifest(sender.manifest, self._loader.cache_dir, self._passed_over)
        if newest is None:
            return
        if newest.ids == sender.manifest.ids:
            sender.use_manifest(newest)
            return
        if not self._passed_over:
            log.warning(
                "%s: the items have changed in the bucket, and the sampler's indices are of those before: the daemon goes by"
                " these; make the dataset and its sampler anew to read the new ones",
                self._data_root.uri,
            )
        self._passed_over = newest.digest

    def _manifest(self) -> Manifest | None:
        """The loader's manifest; else the daemon's, for which a second at most is waited, once an epoch."""
        if self._loader.manifest is not None:
            return self._loader.manifest
        if self._asking is None:
            self._asking = call_in_background(partial(daemon_manifest, self._data_root, self._loader.cache_dir))
        if not wait([self._asking], FIRST_ITEM_WAIT_S).done:
            return None
        asked, self._asking = self._asking, None
        try:
            return asked.result()
        except PrefetchdError:
            return None  # the readers say that there is no daemon


def _flat(yielded: list[Any]) -> tuple[list[int], list[int]]:
    """The indices one by one, and how many of them each of the sampler's values holds."""
    order: list[int] = []
    sizes: list[int] = []
    for one in yielded:
        before = len(order)
        try:
            order.append(operator.index(one))
        except TypeError:
            try:
                order.extend(map(operator.index, one))
            except TypeError:
                raise SettingsError(f"sampler yields {one!r:.80}, which is neither an index nor a list of indices") from None
        sizes.append(len(order) - before)
    return order, sizes


def _checked(order: list[int], manifest: Manifest) -> Indices:
    items = len(manifest)
    wrong = next((index for index in order if not 0 <= index < items), None)
    if wrong is not None:
        raise SettingsError(
            f"sampler yields the index {wrong}, and {manifest.data_root.uri} has {items} items: the dataset's items must be"
            " those of the manifest"
        )
    return np.array(order, dtype=np.uint32)
