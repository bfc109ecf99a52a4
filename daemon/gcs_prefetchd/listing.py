"""Listing a data root into a manifest, and keeping the last one for a start without GCS."""

import asyncio
import contextlib
import logging
import shutil
from pathlib import Path

from gcs_prefetchd.errors import ItemError, ManifestError
from gcs_prefetchd.manifest import Layout, Manifest, ObjectVersion, build_manifest, load_manifest
from gcs_prefetchd.names import DataRoot
from gcs_prefetchd.origin import Origin

__all__ = ["list_manifest", "newest_manifest", "remove_old_manifests"]

log = logging.getLogger(__name__)

NAMED_AT_MOST = 5
# Training jobs map a manifest into memory by its path for as long as they run.
KEPT_PER_DATA_ROOT = 8
UNFINISHED = ".tmp"  # what a crash left of a manifest that was being written


async def list_manifest(origin: Origin, data_root: DataRoot, layout: Layout) -> Manifest:
    """List every page of the data root. Raises ItemError where it holds no complete item, and what `Origin.list` raises."""
    objects: list[ObjectVersion] = []

    async def collect(folder: str) -> None:
        async for page in origin.list(data_root.bucket, data_root.folder + folder):
            objects.extend(page)

    listings = [asyncio.create_task(collect(folder)) for folder in layout.folders()]
    try:
        await asyncio.gather(*listings)
    finally:
        for listing in listings:  # the others ask for nothing more once one has failed
            listing.cancel()
    manifest = await asyncio.to_thread(build_manifest, data_root, layout, objects)
    if manifest.incomplete:
        shown = ", ".join(manifest.incomplete[:NAMED_AT_MOST]) + (", ..." if len(manifest.incomplete) > NAMED_AT_MOST else "")
        log.warning("%s: items are left out, for %d objects are missing: %s", data_root.uri, len(manifest.incomplete), shown)
    if not len(manifest):
        raise ItemError(
            f"{data_root.uri}: no item has all of {', '.join(layout.patterns)} ({len(objects)} objects looked at); "
            "is the prefix right, or do the settings image_pattern and label_pattern differ?"
        )
    return manifest


def newest_manifest(manifests: Path, data_root: DataRoot, layout: Layout) -> Manifest | None:
    """The manifest of this data root that was saved last, or None."""
    for folder in _newest_first(manifests):
        with contextlib.suppress(ManifestError):
            manifest = load_manifest(folder)
            if manifest.data_root == data_root and manifest.layout == layout:
                return manifest
    return None


def remove_old_manifests(manifests: Path, data_root: DataRoot) -> None:
    """Keep the newest few of this data root."""
    kept = 0
    for folder in _newest_first(manifests):
        with contextlib.suppress(ManifestError):
            if load_manifest(folder).data_root == data_root:
                kept += 1
                if kept > KEPT_PER_DATA_ROOT:
                    shutil.rmtree(folder, ignore_errors=True)


def _newest_first(manifests: Path) -> list[Path]:
    folders = [folder for folder in manifests.iterdir() if folder.is_dir() and folder.suffix != UNFINISHED]
    return sorted(folders, key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
