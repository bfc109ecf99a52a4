"""Indices stored in little memory: an eighth of a byte for each number, if they rise. Pure."""

import numpy as np
from numpy.typing import NDArray

from gcs_prefetchd.shared.epoch_order import Indices

__all__ = ["PackedIndices"]


class PackedIndices:
    """Indices as one bit for each number up to the largest, if they rise and that takes less memory; otherwise as they are."""

    def __init__(self, indices: Indices) -> None:
        self._bits: NDArray[np.uint8] | None = None
        self._indices: Indices | None = None
        if len(indices) and np.all(indices[1:] > indices[:-1]) and int(indices[-1]) < 32 * len(indices):
            is_in = np.zeros(int(indices[-1]) + 1, dtype=np.uint8)
            is_in[indices] = 1
            self._bits = np.packbits(is_in)
        else:
            self._indices = indices

    def unpack(self) -> Indices:
        """The indices, in their order."""
        if self._bits is not None:
            return np.flatnonzero(np.unpackbits(self._bits)).astype(np.uint32)
        assert self._indices is not None
        return self._indices
