"""The stamps that the files of a manifest's items must have: generation, size and crc32c. Found without a dict of names."""

from collections.abc import Sequence

import numpy as np

from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.manifest import UNKNOWN_CRC32C, Manifest
from gcs_prefetchd.shared.objects import parse_object_uri

__all__ = ["ExpectedStamps"]


class ExpectedStamps:
    """Looks stamps up in a manifest's arrays, which all workers share."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        # A single number of an array costs several times that of a memoryview.
        self._generation, self._size, self._crc32c = (
            np.asarray(array).data for array in (manifest.generation, manifest.size, manifest.crc32c)
        )
        root = f"{manifest.data_root.uri}/"
        self._affixes = [(root + before, after) for before, after in (p.split("{id}") for p in manifest.item_patterns.patterns)]

    def of(self, uris: Sequence[str], index: int | None = None) -> list[Stamp | None]:
        """The stamp of each object; None if the manifest does not have the object or its crc32c.

        `index` is the item whose parts they probably are. With it a part is found in 2 us, without it in 6 us (of 400 items).
        """
        if index is not None and 0 <= index < len(self._manifest):
            item_id = self._manifest.ids[index]
            if [f"{before}{item_id}{after}" for before, after in self._affixes] == list(uris):
                return [self._stamp(index, part) for part in range(len(uris))]
        found = [self._manifest.find(parse_object_uri(uri)) for uri in uris]
        return [None if part is None else self._stamp(*part) for part in found]

    def _stamp(self, item: int, part: int) -> Stamp | None:
        crc32c = self._crc32c[item, part]
        return None if crc32c == UNKNOWN_CRC32C else Stamp(self._generation[item, part], self._size[item, part], crc32c)
