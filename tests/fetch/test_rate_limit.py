"""How fast requests may go out, in requests and bytes a second."""

import pytest

from gcs_prefetchd.fetch.rate_limit import Governor


def sent_in(governor: Governor, seconds: float, size_bytes: int = 0, from_s: float = 0.0) -> int:
    """How many prefetches go in so long where there are always more."""
    now_s, count = from_s, 0
    while True:
        now_s += governor.wait_s(now_s)
        if now_s >= from_s + seconds:
            return count
        governor.spend(1, size_bytes, now_s)
        governor.sent(now_s)
        count += 1


def test_without_settings_the_ramp_holds() -> None:
    governor = Governor()
    assert governor.allowed_requests_per_s == 5000
    assert 5000 <= sent_in(governor, 1.0) <= 5300
    assert 9900 <= sent_in(governor, 2.0, from_s=1.0) <= 10_100


def test_what_is_used_grows_and_never_doubles_within_20_minutes() -> None:
    governor = Governor()
    for second in range(1200):
        for part in range(200):
            for _ in range(25):
                governor.sent(second + part / 200)
    assert 9900 <= governor.allowed_requests_per_s <= 10_000


@pytest.mark.parametrize("per_s", [1.0, 7.5, 400.0])
def test_requests_keep_to_the_setting(per_s: float) -> None:
    assert sent_in(Governor(per_s), 60.0) == pytest.approx(60 * per_s, rel=0.02, abs=1.5)


def test_a_setting_above_the_ramp_does_not_lift_it() -> None:
    assert Governor(50_000.0).allowed_requests_per_s == 5000


@pytest.mark.parametrize("size_bytes", [10_000, 100_000, 50_000_000])
def test_bytes_keep_to_the_setting_however_large_an_object_is(size_bytes: int) -> None:
    sent = sent_in(Governor(None, 1e7), 60.0, size_bytes)
    assert sent * size_bytes == pytest.approx(6e8, rel=0.02, abs=size_bytes)


def test_the_stricter_of_both_holds() -> None:
    assert sent_in(Governor(100.0, 1e7), 10.0, 1_000_000) == pytest.approx(100, abs=3)
    assert sent_in(Governor(10.0, 1e9), 10.0, 1_000_000) == pytest.approx(100, abs=3)


def test_other_bounds_hold_from_now_on() -> None:
    governor = Governor(10.0, 1e3)
    sent_in(governor, 1.0)
    governor.bound(100.0, None, 1.0)
    assert sent_in(governor, 10.0, 10**6, from_s=1.0) == pytest.approx(1000, abs=10)
    governor.bound(None, None, 11.0)
    assert governor.allowed_requests_per_s == 5000


def test_what_was_really_sent_is_what_is_told() -> None:
    governor = Governor()
    governor.spend(10, 10**6, 5.0)
    for _ in range(3):
        governor.sent(5.5)
    governor.received_bytes.add(700, 5.5)
    assert (governor.requests.per_s(6.0), governor.received_bytes.per_s(6.0)) == (3, 700)
