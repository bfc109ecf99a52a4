"""The manifest that the readers of a data root use: the daemon's, else one of their own listing, which is the same."""

import logging
import os
from concurrent.futures import wait
from functools import partial
from pathlib import Path

from gcs_dataset.background_call import call_in_background
from gcs_dataset.gcs_listing import list_manifest
from gcs_dataset.item_listing import Items, warn_of_incomplete
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.errors import ManifestError, PrefetchdError
from gcs_prefetchd.shared.item_patterns import IMAGE_PATTERN, LABEL_PATTERN, ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, load_manifest
from gcs_prefetchd.shared.messages import ManifestResponse
from gcs_prefetchd.shared.objects import DataRoot

__all__ = ["daemon_manifest", "get_manifest", "load_saved_manifest", "newer_manifest"]

STATUS_TIMEOUT_S = 5.0
NEWEST_TIMEOUT_S = 1.0  # a daemon that has listed responds in a millisecond, and an epoch waits for it
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

    The daemon's manifest; if no daemon has one with these patterns, GCS is listed here, with a warning. Items that lack a part
    are named in a warning and left out. Raises ItemError if no item is complete, ObjectMissingError if there is no such bucket.
    """
    data_root, item_patterns = DataRoot.parse(gcs_data_root), ItemPatterns((image_pattern, label_pattern))
    try:
        manifest = daemon_manifest(data_root, Path(cache_dir))
        if manifest.item_patterns != item_patterns:
            raise ManifestError(f"manifest of {data_root.uri}: the daemon's patterns are {manifest.item_patterns.patterns}")
    except PrefetchdError as exc:
        log.warning("%s; listing %s without the daemon", exc, data_root.uri)
        manifest = list_manifest(data_root, item_patterns)
    warn_of_incomplete(Items(manifest.ids, manifest.incomplete), item_patterns, data_root.uri)
    return manifest


def daemon_manifest(data_root: DataRoot, cache_dir: Path) -> Manifest:
    """The daemon's latest manifest, mapped into memory; raises DaemonUnavailableError, ProtocolError or ManifestError."""
    client = DaemonClient(cache_dir, STATUS_TIMEOUT_S)
    try:
        client.status()  # finds out whether the daemon responds: its first listing may take minutes
        client.close()
        client.timeout_s = MANIFEST_TIMEOUT_S
        return load_manifest(Path(client.manifest(data_root.uri).path))
    finally:
        client.close()


def newer_manifest(current: Manifest, cache_dir: Path, rejected_digest: str = "") -> Manifest | None:
    """The daemon's latest manifest of the same data root; None if it is `current` or has the digest `rejected_digest`.

    Sends one request and waits a second at most. A daemon that is absent, slow or faulty has no newer one.
    """
    request = call_in_background(partial(_latest, current.data_root, cache_dir))
    if not wait([request], NEWEST_TIMEOUT_S).done:
        return None
    try:
        latest = request.result()
    except PrefetchdError:
        return None  # the readers log that there is no daemon
    return None if latest.digest in (current.digest, rejected_digest) else load_saved_manifest(Path(latest.path), current)


def load_saved_manifest(folder: Path, current: Manifest) -> Manifest | None:
    """Map a saved manifest of the same data root and patterns; None if it cannot be read or is of others."""
    try:
        manifest = load_manifest(folder)
        if (manifest.data_root, manifest.item_patterns) != (current.data_root, current.item_patterns):
            raise ManifestError(
                f"manifest {folder}: is of {manifest.data_root.uri}, patterns {manifest.item_patterns.patterns}"
            )
    except ManifestError as exc:
        log.info("%s; %s keeps its current listing", exc, current.data_root.uri)
        return None
    return manifest


def _latest(data_root: DataRoot, cache_dir: Path) -> ManifestResponse:
    client = DaemonClient(cache_dir, NEWEST_TIMEOUT_S)
    try:
        return client.manifest(data_root.uri)
    finally:
        client.close()
