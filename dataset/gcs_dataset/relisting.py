"""Follows a data root from epoch to epoch: what reads it goes by the daemon's newest listing, or back to a checkpoint's."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from gcs_dataset.cached_loader import CachedLoader
from gcs_dataset.image_dataset import ImageDataset
from gcs_dataset.manifest_source import load_another, newer_manifest
from gcs_dataset.planned_sampler import PlannedSampler
from gcs_prefetchd.shared.epoch_order import Indices
from gcs_prefetchd.shared.errors import PrefetchdError
from gcs_prefetchd.shared.manifest import Ids, Manifest, is_digest

__all__ = ["Relisting"]

log = logging.getLogger("gcs_dataset")


class Relisting:
    """Has a dataset, its loader and its sampler go by another listing of their data root, all three together.

    - `manifest`: what they go by at first; afterwards, what they go by.
    - `dataset`, `loader`, `sampler`: of nobody else, for what this changes in them is changed for all who have them.
    - `choose(ids)`: the indices of those of a listing's items that the sampler is for. It must decide by each id alone.
    - `name`: what the log calls them.

    A PlannedDataLoader calls it. Nothing here asks GCS, and no daemon makes it raise or wait longer than about a second.
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
        self._passed_over = ""  # the digest of a listing that was not taken
        self._said = ""  # why not

    def take_newest(self) -> None:
        """An epoch begins: go by the daemon's newest listing, where there is one and it can be taken."""
        newest = newer_manifest(self.manifest, self._loader.cache_dir, self._passed_over)
        if newest is None:
            return
        held, indices = self._sampler.indices, self._sampler.indices
        if newest.ids != self.manifest.ids:
            indices = self._choose(newest.ids).numpy().astype(np.uint32)
            why_not = _why_not(held, indices, self._sampler.world)
            if why_not:
                self._pass_over(newest, why_not)
                return
            new, gone = _difference(self.manifest.ids, held, newest.ids, indices)
            log.warning("%s: %d items are new and %d are gone; %d from this epoch on", self._name, new, gone, len(indices))
        self._go_by(newest, indices)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the sampler go on where a state was taken, by the listing it was taken of where only that has its items.

        Raises what PlannedSampler's raises; everything is as before then.
        """
        held, indices = self.manifest, self._sampler.indices
        listed = self._listing_of(state)
        if listed is not None:
            self._go_by(listed, self._choose(listed.ids).numpy().astype(np.uint32))
        try:
            self._sampler.load_state_dict(state)
        except PrefetchdError:
            if listed is not None:
                self._go_by(held, indices)
            raise

    def _listing_of(self, state: Mapping[str, Any]) -> Manifest | None:
        """The listing to go back to for a state in the middle of an epoch of other items; None where there is none."""
        digest = state.get("manifest")
        is_ours = state.get("data_root") == self.manifest.data_root.uri
        if not is_ours or state.get("ids") == self.manifest.ids.digest or state.get("position") == 0:
            return None
        if not isinstance(digest, str) or not is_digest(digest):
            return None
        return load_another(self._loader.cache_dir / "manifests" / digest, self.manifest)

    def _go_by(self, manifest: Manifest, indices: Indices) -> None:
        self._sampler.go_by(manifest, indices)
        self._loader.go_by(manifest)
        self._dataset.items = manifest.ids
        self.manifest, self._passed_over, self._said = manifest, "", ""

    def _pass_over(self, newest: Manifest, why: str) -> None:
        self._passed_over = newest.digest
        if why != self._said:
            self._said = why
            log.warning("%s: the items have changed in the bucket, but stay as they are: %s", self._name, why)


def _why_not(held: Indices, newest: Indices, world: int) -> str:
    """Why the items of a newer listing cannot take the place of the held ones; empty where they can."""
    if world > 1:
        # Asking each other would hang where only some of the ranks read this side, as for an evaluation.
        return f"{world} ranks must agree on them, and may hear of it at different times; a restart reads the new ones"
    if not len(newest):
        return "nothing would be left to read"
    if not len(held):
        return "there was nothing to read, and so no order to read it in; a restart reads the new ones"
    return ""


def _difference(held_ids: Ids, held: Indices, newest_ids: Ids, newest: Indices) -> tuple[int, int]:
    """How many of the newest items were not held, and how many of the held are none of the newest."""
    common, _ = newest_ids.common_with(held_ids)
    is_common = np.zeros(len(newest_ids), dtype=np.bool_)
    is_common[common] = True
    kept = int(np.count_nonzero(is_common[newest]))
    return len(newest) - kept, len(held) - kept
