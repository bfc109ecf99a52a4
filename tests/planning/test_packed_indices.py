"""Packed indices are unpacked unchanged."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.planning.packed_indices import PackedIndices
from support.plans import indices_of


@given(st.lists(st.integers(0, 300), max_size=40))
def test_unpacked_indices_equal_the_packed_ones(indices: list[int]) -> None:
    for some in (indices, sorted(indices), sorted(set(indices))):
        unpacked = PackedIndices(indices_of(some)).unpack()
        assert unpacked.tolist() == some
        assert unpacked.dtype == np.uint32


def test_the_largest_possible_index_can_be_packed() -> None:
    assert PackedIndices(indices_of([7, 0xFFFF_FFFF])).unpack().tolist() == [7, 0xFFFF_FFFF]
