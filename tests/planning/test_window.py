"""The size of the prefetch window: fixed, or computed from measurements."""

import pytest

from gcs_prefetchd.planning.registry import Registry
from gcs_prefetchd.planning.window import MAX_SPARE_ITEMS, MAX_WINDOW_ITEMS
from gcs_prefetchd.shared.moving_average import MovingDuration
from support.registries import LARGE_BYTES, MANIFEST, FakeClock, manifest_of_items, put_in_force, register, report_reads


def test_a_fixed_window_is_as_long_as_it_is_set(registry: Registry) -> None:
    assert registry.window_items(register(registry, [1, 2])) == 4


def test_a_measured_window_covers_the_reads_during_a_download(clock: FakeClock) -> None:
    took = MovingDuration(0.05)
    for _ in range(2000):
        took.add(0.05)
    registry = Registry(5, LARGE_BYTES, download_s=took, clock=clock)
    manifest = manifest_of_items(5000)
    put_in_force(registry, manifest)
    reader = register(registry, range(5000), listed=manifest)
    for start in range(0, 4000, 10):
        clock.now_s += 0.01
        report_reads(registry, "job", *range(start, start + 10), manifest=manifest)
    assert registry.window_items(reader) == pytest.approx(1000 * (0.05 + 0.01) + MAX_SPARE_ITEMS, rel=0.1)
    report_reads(registry, "job", 4900, manifest=manifest)  # a worker that is far ahead
    assert registry.window_items(reader) > 900


def test_a_lost_report_does_not_lengthen_the_window(clock: FakeClock) -> None:
    registry, manifest = Registry(5, LARGE_BYTES, clock=clock), manifest_of_items(5000)
    put_in_force(registry, manifest)
    reader = register(registry, range(5000), listed=manifest)
    for start in range(1, 4000, 10):  # all but the first item
        clock.now_s += 0.01
        report_reads(registry, "job", *range(start, start + 10), manifest=manifest)
        if start == 1001:
            early = registry.window_items(reader)
    assert (reader.stream.first_unread, reader.stream.front) == (0, 4001)
    assert registry.window_items(reader) == pytest.approx(early, rel=0.2)


def test_a_small_cache_has_fewer_spare_items(clock: FakeClock) -> None:
    manifest = manifest_of_items(5000)
    item_bytes = int(manifest.size.sum()) / len(manifest)
    windows = []
    for items in (10, 200, 800, 5000):
        registry = Registry(5, int(items * item_bytes), download_s=MovingDuration(0.0), clock=clock)
        put_in_force(registry, manifest)
        windows.append(registry.window_items(register(registry, range(5000), listed=manifest)))
    assert [window - windows[0] for window in windows] == [0, 1, 7, 15]


@pytest.mark.parametrize(
    ("took_s", "shortest", "longest"), [(0.0, MAX_SPARE_ITEMS, 100), (1e9, MAX_WINDOW_ITEMS, MAX_WINDOW_ITEMS)]
)
def test_a_window_is_never_shorter_than_the_spare_items_or_longer_than_the_maximum(
    clock: FakeClock, took_s: float, shortest: int, longest: int
) -> None:
    registry = Registry(5, LARGE_BYTES, download_s=MovingDuration(took_s), clock=clock)
    put_in_force(registry, MANIFEST)
    assert shortest <= registry.window_items(register(registry, range(10))) <= longest
