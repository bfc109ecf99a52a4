"""Faults of GCS, injected into a real daemon by a real server: right bytes or an error, and every promise holds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fault_support import Daemon, Tally, faulted_daemon, promises
from gcs_prefetchd.testing import FlippedByte, ServingGCS, serving
from support import BUCKET, DATA_ROOT, put_items

GOOD = f"gs://{BUCKET}/train/good"
BAD = f"gs://{BUCKET}/train/bad"
DATA = bytes(range(256)) * 400


@pytest.fixture
def server() -> Iterator[ServingGCS]:
    """A server with two items, and two objects beside them: one meets the faults, the other never does."""
    with serving() as server:
        put_items(server, 2)
        server.put(BUCKET, "train/good", DATA)
        server.put(BUCKET, "train/bad", DATA)
        yield server


@pytest.fixture
def daemon(server: ServingGCS, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that gives up after 3 s."""
    with faulted_daemon(tmp_path / "cache", server.url, ["--set", "deadline_s=3"]) as daemon:
        for item in range(2):
            assert daemon.client.fetch([f"{DATA_ROOT}/images/{item:05}.jpg"]) == [""]
        yield daemon


def test_a_byte_that_is_flipped_once_is_asked_for_again(daemon: Daemon, server: ServingGCS) -> None:
    server.faults.add(FlippedByte(), f"{BUCKET}/train/bad", requests=1)
    with promises(daemon, GOOD, DATA):
        assert daemon.read(BAD) == DATA
    assert server.counts.media[f"{BUCKET}/train/bad"] == 2


def test_a_byte_that_is_always_flipped_is_an_error_that_names_the_object(daemon: Daemon, server: ServingGCS) -> None:
    server.faults.add(FlippedByte(), f"{BUCKET}/train/bad")
    with promises(daemon, GOOD, DATA):
        assert "crc32c" in str(daemon.read(BAD))
    (line,) = daemon.lines_about(BAD)
    assert "crc32c" in line


@pytest.mark.torture
def test_bytes_that_are_flipped_again_and_again_never_reach_a_reader(daemon: Daemon, server: ServingGCS, tally: Tally) -> None:
    server.faults.add(FlippedByte(), f"{BUCKET}/train/bad/*", requests=range(1, 3))
    with promises(daemon, GOOD, DATA):
        for number in range(50):
            server.put(BUCKET, f"train/bad/{number}", DATA)
            data = daemon.read(f"{BAD}/{number}")
            tally.tried += 1
            tally.failed_reads += isinstance(data, str)
            tally.wrong_bytes += isinstance(data, bytes) and data != DATA
    assert (tally.wrong_bytes, tally.failed_reads) == (0, 0)
