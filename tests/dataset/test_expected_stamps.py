"""The stamps that a manifest expects. test_cached_loader.py tests what they accept and refuse."""

import time

from gcs_dataset.expected_stamps import ExpectedStamps
from support.datasets import manifest_of


def test_finding_an_items_generations_takes_microseconds() -> None:
    manifest = manifest_of(500)
    stamps = ExpectedStamps(manifest)
    uris = [version.name.uri for version in manifest.versions(333)]
    expected = stamps.of(uris)
    assert None not in expected
    started_s = time.thread_time()
    for _ in range(2000):
        assert stamps.of(uris, 333) == expected
    assert (time.thread_time() - started_s) / 2000 < 20e-6
