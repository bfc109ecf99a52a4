"""Lists GCS with google-cloud-storage: the ids below a folder, and a data root's manifest without a daemon."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from gcs_dataset.gcs_client import SOCKET_TIMEOUT_S, call_with_retries, storage_client
from gcs_dataset.gcs_loader import DEADLINE_S, checksum_of_base64
from gcs_dataset.item_listing import ids_of_names
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, build_manifest
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion

__all__ = ["list_manifest", "load_items_gcs"]

FIELDS = "items(name,generation,size,crc32c),nextPageToken"


def load_items_gcs(path: str) -> list[str]:
    """The sorted ids of the objects below `gs://bucket/prefix/images`: their names below it without the extension.

    Sub-folders stay in the ids (`images/a/7.jpg` is `a/7`). Raises ItemError if nothing is there or two objects have
    the same id, ObjectMissingError if there is no such bucket.
    """
    folder = DataRoot.parse(path)
    return ids_of_names((version.name.name.removeprefix(folder.folder) for version in _list(folder, "")), folder.uri)


def list_manifest(data_root: DataRoot, item_patterns: ItemPatterns) -> Manifest:
    """The manifest of a data root, the same as the daemon's. Raises ObjectMissingError if there is no such bucket."""
    versions = [version for folder in item_patterns.folders() for version in _list(data_root, folder)]
    return build_manifest(data_root, item_patterns, versions)


def _list(data_root: DataRoot, folder: str) -> Iterator[ObjectVersion]:
    prefix = data_root.folder + folder
    token: str | None = None
    while True:
        request = partial(_Page, data_root.bucket, prefix, token)
        page = call_with_retries(f"list gs://{data_root.bucket}/{prefix}", request, DEADLINE_S)
        for blob in page.blobs:
            if not blob.name.endswith("/"):
                yield _version(data_root.bucket, blob)
        token = page.next_token
        if token is None:
            return


class _Page:
    """One page of a listing, and the token of the next; creating it requests the page."""

    def __init__(self, bucket: str, prefix: str, token: str | None) -> None:
        pages = storage_client().list_blobs(
            bucket, prefix=prefix, page_token=token, fields=FIELDS, retry=None, timeout=SOCKET_TIMEOUT_S
        )
        self.blobs: list[Any] = list(next(pages.pages, ()))
        self.next_token: str | None = pages.next_page_token


def _version(bucket: str, blob: Any) -> ObjectVersion:
    crc32c = None if blob.crc32c is None else checksum_of_base64(blob.crc32c)
    return ObjectVersion(ObjectName(bucket, blob.name), int(blob.generation), int(blob.size), crc32c)
