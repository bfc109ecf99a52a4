"""Settings that are changed while the daemon runs."""

import json
from pathlib import Path

import pytest

from gcs_prefetchd.fetch.download_slots import DownloadSlots
from gcs_prefetchd.server.runtime_settings import CHANGEABLE, RuntimeSettings, make_slots
from gcs_prefetchd.shared.errors import ProtocolError
from support.daemons import make_settings


def make(tmp_path: Path, **changes: object) -> tuple[RuntimeSettings, DownloadSlots]:
    settings = make_settings(tmp_path, "http://127.0.0.1:1", **changes)
    slots = make_slots(settings, lambda: None)
    return RuntimeSettings(settings, slots), slots


def limits(slots: DownloadSlots) -> tuple[int, int, float | None, float | None]:
    return slots.concurrency.minimum, slots.concurrency.maximum, slots.rate.max_requests_per_s, slots.rate.max_bytes_per_s


def test_the_slots_start_with_the_limits_of_the_settings(tmp_path: Path) -> None:
    assert limits(make(tmp_path)[1]) == (8, 256, None, None)
    _, slots = make(tmp_path, concurrency=64, min_concurrency=16, max_requests_per_s=100, max_bytes_per_s="1MB")
    assert limits(slots) == (16, 64, 100.0, 10**6)


def test_a_concurrency_below_min_concurrency_is_both_bounds(tmp_path: Path) -> None:
    assert limits(make(tmp_path, concurrency=4)[1])[:2] == (4, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"concurrency": 512}, (8, 512, None, 10**6)),
        ({"concurrency": 5}, (5, 5, None, 10**6)),
        ({"min_concurrency": 300}, (256, 256, None, 10**6)),
        ({"max_requests_per_s": 7.5, "max_bytes_per_s": "2MB"}, (8, 256, 7.5, 2 * 10**6)),
        ({"max_bytes_per_s": None}, (8, 256, None, None)),
        ({}, (8, 256, None, 10**6)),
    ],
)
def test_a_change_applies_at_once_and_leaves_the_other_settings(
    tmp_path: Path, changes: dict[str, object], expected: tuple[int, int, float | None, float | None]
) -> None:
    runtime_settings, slots = make(tmp_path, max_bytes_per_s="1MB")
    values = runtime_settings.change(json.dumps(changes).encode())
    assert limits(slots) == expected
    assert values == runtime_settings.values()
    assert list(values) == list(CHANGEABLE)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "settings: not valid JSON"),
        (b"\xff", "settings: not valid JSON"),
        (b"[" * 100_000, "settings: not valid JSON"),
        (b"[1]", "settings: not a JSON object"),
        (b'{"seed": 5}', "setting 'seed' cannot be changed while the daemon runs; these can: concurrency, min_concurrency"),
        (b'{"concurrency": 0}', "setting concurrency in the request: 0 should be greater than or equal to 1"),
        (b'{"concurrency": 1025}', "setting concurrency in the request: 1025 should be less than or equal to 1024"),
        (b'{"concurrency": 1.5}', "setting concurrency in the request: 1.5 should be a valid integer"),
        (b'{"concurrency": true}', "setting concurrency: must be a number or null, not bool"),
        (b'{"concurrency": "64"}', "setting concurrency: must be a number or null, not str"),
        (b'{"concurrency": null}', "setting concurrency in the request: None should be a valid integer"),
        (b'{"concurrency": 1e999}', "setting concurrency in the request: inf should be"),
        (b'{"max_requests_per_s": NaN}', "setting max_requests_per_s in the request: nan should be"),
        (b'{"max_requests_per_s": 0}', "setting max_requests_per_s in the request: 0 should be greater than or equal to 1"),
        (b'{"max_requests_per_s": []}', "setting max_requests_per_s: must be a number or null, not list"),
        (b'{"max_bytes_per_s": "fast"}', "setting max_bytes_per_s in the request: 'fast' is not a valid size"),
        (b'{"max_bytes_per_s": -1}', "setting max_bytes_per_s in the request: -1 is not a valid size"),
        (b'{"max_bytes_per_s": {}}', "setting max_bytes_per_s: must be a number, null or a size such as 500MB, not dict"),
    ],
)
def test_an_invalid_change_is_rejected_by_its_name_and_changes_nothing(tmp_path: Path, body: bytes, message: str) -> None:
    runtime_settings, slots = make(tmp_path, max_bytes_per_s="1MB")
    for rejected in (body, body.replace(b"{", b'{"min_concurrency": 9, ', 1)):
        with pytest.raises(ProtocolError) as raised:
            runtime_settings.change(rejected)
        if rejected is body:
            assert str(raised.value).startswith(message)
    assert limits(slots) == (8, 256, None, 10**6)
