"""Follows a data root from epoch to epoch: its readers use the daemon's newest listing, or the one of a checkpoint."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from gcs_dataset.cached_loader import CachedLoader
from gcs_dataset.image_dataset import ImageDataset
from gcs_dataset.manifest_source import load_saved_manifest, newer_manifest
from gcs_dataset.planned_sampler import PlannedSampler
from gcs_dataset.sampler_checkpoint import Checkpoint
from gcs_prefetchd.shared.epoch_order import Indices
from gcs_prefetchd.shared.errors import PrefetchdError
from gcs_prefetchd.shared.manifest import Ids, Manifest, is_digest

__all__ = ["Relisting"]

log = logging.getLogger("gcs_dataset")


class Relisting:
    """Switches a dataset, its loader and its sampler to another listing of their data root, all three together.

    - `manifest`: the listing that they use at first; afterwards, the one that they use now.
    - `dataset`, `loader`, `sampler`: not shared with anything else, because a switch changes them for all their users.
    - `choose(ids)`: the indices of those of a listing's items that the sampler is for. It must decide by each id alone.
    - `name`: what the log calls them.

    A PlannedDataLoader calls it. It sends no request to GCS, and no daemon makes it raise or wait longer than about a second.
    """

    def __init__(
        self,
        manifest: Manifest,
        dataset: ImageDataset,
        loader: CachedLoader,
        sampler: PlannedSampler,
        choose: Callable[[Ids], torch.Tensor],
        *,
        name: str,
    ) -> None:
        self.manifest = manifest
        self._dataset = dataset
        self._loader = loader
        self._sampler = sampler
        self._choose = choose
        self._name = name
        self._rejected_digest = ""  # of the newest listing that was not used
        self._logged_reason = ""  # why not

    def use_newest_listing(self) -> None:
        """Switch to the daemon's newest listing before an epoch, if there is a newer one and it can be used."""
        newest = newer_manifest(self.manifest, self._loader.cache_dir, self._rejected_digest)
        if newest is None:
            return
        current, indices = self._sampler.indices, self._sampler.indices
        if newest.ids != self.manifest.ids:
            indices = self._chosen_indices(newest)
            reason = _reason_to_reject(current, indices, self._sampler.world)
            if reason:
                self._reject(newest, reason)
                return
            added, removed = _difference(self.manifest.ids, current, newest.ids, indices)
            log.warning(
                "%s: %d items were added and %d removed; %d from this epoch on", self._name, added, removed, len(indices)
            )
        self._use(newest, indices)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the sampler continue where a state was saved, with the state's own listing if only that one has its items.

        Raises what PlannedSampler's `load_state_dict` raises; nothing has changed then.
        """
        current, indices = self.manifest, self._sampler.indices
        saved = self._listing_of(Checkpoint.from_state(state))
        if saved is not None:
            self._use(saved, self._chosen_indices(saved))
        try:
            self._sampler.load_state_dict(state)
        except PrefetchdError:
            if saved is not None:
                self._use(current, indices)
            raise

    def _listing_of(self, checkpoint: Checkpoint) -> Manifest | None:
        """The listing to go back to for a checkpoint in the middle of an epoch of other items; None if there is none."""
        is_same_root = checkpoint.data_root == self.manifest.data_root.uri
        needs_own_listing = checkpoint.ids != self.manifest.ids.digest and not checkpoint.is_at_epoch_start
        if not is_same_root or not needs_own_listing or not is_digest(checkpoint.manifest):
            return None
        return load_saved_manifest(self._loader.cache_dir / "manifests" / checkpoint.manifest, self.manifest)

    def _chosen_indices(self, manifest: Manifest) -> Indices:
        return self._choose(manifest.ids).numpy().astype(np.uint32)

    def _use(self, manifest: Manifest, indices: Indices) -> None:
        self._sampler.use_manifest(manifest, indices)
        self._loader.use_manifest(manifest)
        self._dataset.items = manifest.ids
        self.manifest, self._rejected_digest, self._logged_reason = manifest, "", ""

    def _reject(self, newest: Manifest, reason: str) -> None:
        self._rejected_digest = newest.digest
        if reason != self._logged_reason:
            self._logged_reason = reason
            log.warning("%s: the items have changed in the bucket, but are not updated: %s", self._name, reason)


def _reason_to_reject(current: Indices, newest: Indices, world: int) -> str:
    """Why the items of a newer listing cannot replace the current ones; empty if they can."""
    if world > 1:
        # A collective operation would hang if only some of the ranks read this side, as for an evaluation.
        return f"{world} ranks must agree on them, and may learn of it at different times; a restart reads the new ones"
    if not len(newest):
        return "nothing would be left to read"
    if not len(current):
        return "there was nothing to read, and so no order to read it in; a restart reads the new ones"
    return ""


def _difference(current_ids: Ids, current: Indices, newest_ids: Ids, newest: Indices) -> tuple[int, int]:
    """How many of the newest items were added, and how many of the current ones were removed."""
    common, _ = newest_ids.common_with(current_ids)
    is_common = np.zeros(len(newest_ids), dtype=np.bool_)
    is_common[common] = True
    kept = int(np.count_nonzero(is_common[newest]))
    return len(newest) - kept, len(current) - kept
