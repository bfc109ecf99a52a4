"""A registry over ten items, and its clock."""

import pytest

from gcs_prefetchd.planning.registry import Registry
from support.registries import LARGE_BYTES, MANIFEST, FakeClock, put_in_force


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def registry(clock: FakeClock) -> Registry:
    registry = Registry(5, LARGE_BYTES, window_items=4, clock=clock)
    put_in_force(registry, MANIFEST)
    return registry
