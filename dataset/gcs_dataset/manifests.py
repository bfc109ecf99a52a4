"""The manifest that a data root's readers go by: the daemon's, else a listing of their own, which is the same."""

import logging
import os
from pathlib import Path

from gcs_dataset.items import Items, warn_of_incomplete
from gcs_dataset.listing import list_manifest
from gcs_prefetchd.client import DaemonClient
from gcs_prefetchd.errors import ManifestError, PrefetchdError
from gcs_prefetchd.manifest import IMAGE_PATTERN, LABEL_PATTERN, Layout, Manifest, load_manifest
from gcs_prefetchd.names import DataRoot

__all__ = ["get_manifest", "manifest_of_daemon"]

STATUS_TIMEOUT_S = 5.0
MANIFEST_TIMEOUT_S = 300.0  # the daemon may have to list a million objects first

log = logging.getLogger("gcs_dataset")


def get_manifest(
    gcs_data_root: str,
    cache_dir: str | os.PathLike[str],
    *,
    image_pattern: str = IMAGE_PATTERN,
    label_pattern: str = LABEL_PATTERN,
) -> Manifest:
    """The items of a data root, frozen: its `ids` for an ImageDataset, itself for a CachedLoader.

    The daemon's; without a daemon that has one of these patterns, a listing of our own, with a warning. Items that lack a
    part are named in a warning and left out. Raises ItemError where none is complete, ObjectMissingError where there is no
    such bucket.
    """
    data_root, layout = DataRoot.parse(gcs_data_root), Layout((image_pattern, label_pattern))
    try:
        manifest = manifest_of_daemon(data_root, Path(cache_dir))
        if manifest.layout != layout:
            raise ManifestError(f"manifest of {data_root.uri}: the daemon's patterns are {manifest.layout.patterns}")
    except PrefetchdError as exc:
        log.warning("%s; listing %s without the daemon", exc, data_root.uri)
        manifest = list_manifest(data_root, layout)
    warn_of_incomplete(Items(manifest.ids, manifest.incomplete), layout, data_root.uri)
    return manifest


def manifest_of_daemon(data_root: DataRoot, cache_dir: Path) -> Manifest:
    """The daemon's latest manifest, mapped into memory; raises DaemonUnavailableError, ProtocolError or ManifestError."""
    client = DaemonClient(cache_dir, STATUS_TIMEOUT_S)
    try:
        client.status()  # tells a daemon that hangs from one that lists
        client.close()
        client.timeout_s = MANIFEST_TIMEOUT_S
        return load_manifest(Path(client.manifest(data_root.uri).path))
    finally:
        client.close()
