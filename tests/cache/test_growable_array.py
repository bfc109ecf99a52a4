"""Arrays grow in place, and new numbers are 0."""

from typing import Literal

import pytest

from gcs_prefetchd.cache.growable_array import GrowableArray


@pytest.mark.parametrize(("kind", "largest"), [("B", 2**8 - 1), ("I", 2**32 - 1), ("Q", 2**64 - 1)])
def test_an_array_keeps_its_numbers_when_it_grows(kind: Literal["B", "I", "Q"], largest: int) -> None:
    array = GrowableArray(kind, 4)
    array.view[0] = array.view[3] = largest
    view = array.grow(10_000)
    assert len(view) == 10_000
    assert list(view[:5]) == [largest, 0, 0, largest, 0]
    assert not any(view[4:])


def test_the_previous_view_is_invalid_after_growing() -> None:
    array = GrowableArray("I", 4)
    before = array.view
    assert array.grow(8) is array.view
    with pytest.raises(ValueError, match="released"):
        before[0]
