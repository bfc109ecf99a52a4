"""Listing a data root into a manifest, and loading saved manifests, so that the daemon can start without GCS."""

import asyncio
import contextlib
import logging
import shutil
from pathlib import Path

from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.shared.errors import ItemError, ManifestError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, ManifestBuilder, is_abandoned, is_digest, load_manifest
from gcs_prefetchd.shared.objects import DataRoot

__all__ = ["list_manifest", "load_newest_manifest", "remove_old_manifests"]

log = logging.getLogger(__name__)

MAX_NAMED_OBJECTS = 5
# Training jobs map a manifest into memory by its path for as long as they run.
KEPT_PER_DATA_ROOT = 8


async def list_manifest(gcs_client: GCSClient, data_root: DataRoot, item_patterns: ItemPatterns) -> Manifest:
    """List every page of the data root. Raises ItemError if it contains no complete item, and what `GCSClient.list` raises."""
    listing = ManifestBuilder(data_root, item_patterns)

    async def collect(folder: str) -> None:
        async with contextlib.aclosing(gcs_client.list(data_root.bucket, data_root.folder + folder)) as pages:
            async for page in pages:
                listing.add(page)

    folders = [asyncio.create_task(collect(folder)) for folder in item_patterns.folders()]
    try:
        await asyncio.gather(*folders)
    finally:
        for task in folders:  # once one has failed, the others send no more requests
            task.cancel()
        await asyncio.gather(*folders, return_exceptions=True)
    manifest = await asyncio.to_thread(listing.build)
    if not len(manifest):
        raise ItemError(
            f"{data_root.uri}: no item has all of {', '.join(item_patterns.patterns)} "
            f"({listing.listed_objects} objects listed); is the prefix right, or do the settings "
            "image_pattern and label_pattern differ?"
        )
    if manifest.incomplete:
        shown = ", ".join(manifest.incomplete[:MAX_NAMED_OBJECTS]) + (
            ", ..." if len(manifest.incomplete) > MAX_NAMED_OBJECTS else ""
        )
        log.warning(
            "%s: %d objects are missing, and their items are left out: %s", data_root.uri, len(manifest.incomplete), shown
        )
    return manifest


def load_newest_manifest(manifests: Path, data_root: DataRoot, item_patterns: ItemPatterns) -> Manifest | None:
    """The manifest of this data root that was saved last, or None if there is none."""
    for folder in _newest_first(manifests):
        with contextlib.suppress(ManifestError):
            # Only the manifest that is returned is compared with its digest; those of other data roots are not read in full.
            found = load_manifest(folder, verify=False)
            if found.data_root == data_root and found.item_patterns == item_patterns:
                return load_manifest(folder)
    return None


def remove_old_manifests(manifests: Path, data_root: DataRoot) -> None:
    """Remove all but the newest `KEPT_PER_DATA_ROOT` manifests of this data root.

    Also removes manifests that a power cut damaged or a crash left unfinished, and nothing whose name is not a manifest's.
    """
    kept = 0
    for folder in _newest_first(manifests):
        try:
            is_ours, is_damaged = load_manifest(folder, verify=False).data_root == data_root, False
        except ManifestError as exc:
            is_ours, is_damaged = False, _proves_damage(exc)
        kept += is_ours
        if is_damaged or (is_ours and kept > KEPT_PER_DATA_ROOT):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in manifests.iterdir():
        if is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _proves_damage(error: ManifestError) -> bool:
    """Whether the manifest is at fault. A machine with too many open files or too little memory proves nothing."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return isinstance(cause, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return not isinstance(cause, MemoryError)


def _newest_first(manifests: Path) -> list[Path]:
    saved_ns = {}
    for folder in manifests.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing of another data root removed it
            if is_digest(folder.name) and folder.is_dir():
                saved_ns[folder] = folder.stat().st_mtime_ns
    return sorted(saved_ns, key=lambda folder: saved_ns[folder], reverse=True)
