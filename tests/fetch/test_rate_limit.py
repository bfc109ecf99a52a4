"""How fast requests are sent: the ramp rule, token buckets, and both together as the rate limit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.fetch.rate_limit import (
    BURST_S,
    DOUBLING_S,
    RAMP_START_PER_S,
    RampRule,
    RateLimit,
    RateMeter,
    TokenBucket,
)

# The rate limit


def prefetches_in(rate: RateLimit, seconds: float, size_bytes: int = 0, from_s: float = 0.0) -> int:
    """How many prefetches start within this many seconds if there are always more."""
    now_s, count = from_s, 0
    while True:
        now_s += rate.wait_s(now_s)
        if now_s >= from_s + seconds:
            return count
        rate.consume(1, size_bytes, now_s)
        rate.count_request(now_s)
        count += 1


def test_without_settings_the_ramp_rule_holds() -> None:
    rate = RateLimit()
    assert rate.allowed_requests_per_s == 5000
    assert 5000 <= prefetches_in(rate, 1.0) <= 5300
    assert 9900 <= prefetches_in(rate, 2.0, from_s=1.0) <= 10_100


def test_a_used_rate_grows_and_never_doubles_within_20_minutes() -> None:
    rate = RateLimit()
    for second in range(1200):
        for part in range(200):
            for _ in range(25):
                rate.count_request(second + part / 200)
    assert 9900 <= rate.allowed_requests_per_s <= 10_000


@pytest.mark.parametrize("per_s", [1.0, 7.5, 400.0])
def test_requests_keep_to_the_setting(per_s: float) -> None:
    assert prefetches_in(RateLimit(per_s), 60.0) == pytest.approx(60 * per_s, rel=0.02, abs=1.5)


def test_a_setting_above_the_ramp_rule_does_not_lift_it() -> None:
    assert RateLimit(50_000.0).allowed_requests_per_s == 5000


@pytest.mark.parametrize("size_bytes", [10_000, 100_000, 50_000_000])
def test_bytes_keep_to_the_setting_however_large_an_object_is(size_bytes: int) -> None:
    prefetches = prefetches_in(RateLimit(None, 1e7), 60.0, size_bytes)
    assert prefetches * size_bytes == pytest.approx(6e8, rel=0.02, abs=size_bytes)


def test_the_stricter_of_both_limits_holds() -> None:
    assert prefetches_in(RateLimit(100.0, 1e7), 10.0, 1_000_000) == pytest.approx(100, abs=3)
    assert prefetches_in(RateLimit(10.0, 1e9), 10.0, 1_000_000) == pytest.approx(100, abs=3)


def test_new_limits_hold_from_now_on() -> None:
    rate = RateLimit(10.0, 1e3)
    prefetches_in(rate, 1.0)
    rate.set_limits(100.0, None, 1.0)
    assert prefetches_in(rate, 10.0, 10**6, from_s=1.0) == pytest.approx(1000, abs=10)
    rate.set_limits(None, None, 11.0)
    assert rate.allowed_requests_per_s == 5000


def test_the_measured_rates_are_what_was_really_sent_and_received() -> None:
    rate = RateLimit()
    rate.consume(10, 10**6, 5.0)
    for _ in range(3):
        rate.count_request(5.5)
    rate.received_bytes.add(700, 5.5)
    assert (rate.requests.per_s(6.0), rate.received_bytes.per_s(6.0)) == (3, 700)


# The ramp rule


def test_a_cold_start_is_allowed_5000_per_second() -> None:
    assert RampRule().allowed_per_s == RAMP_START_PER_S == 5000


def used(ramp: RampRule, share: float, from_s: float, seconds: float) -> float:
    """Use this share of the allowed rate for this many seconds; returns the rate that is allowed then."""
    for step in range(int(seconds) + 1):
        ramp.update(share * ramp.allowed_per_s, from_s + step)
    return ramp.allowed_per_s


def test_a_used_rate_doubles_in_20_minutes_and_no_sooner() -> None:
    ramp = RampRule()
    assert used(ramp, 1.0, 0.0, DOUBLING_S) == pytest.approx(10_000, rel=1e-3)
    assert used(ramp, 0.5, DOUBLING_S, DOUBLING_S) == pytest.approx(20_000, rel=1e-3)


def test_an_unused_rate_shrinks_as_fast_as_it_grew_down_to_the_start() -> None:
    ramp = RampRule()
    used(ramp, 1.0, 0.0, 2 * DOUBLING_S)
    assert used(ramp, 0.1, 2 * DOUBLING_S, DOUBLING_S) == pytest.approx(10_000, rel=1e-3)
    ramp.update(0.0, 100 * DOUBLING_S)
    assert ramp.allowed_per_s == 5000


def test_a_clock_that_goes_back_changes_nothing() -> None:
    ramp = RampRule()
    ramp.update(9000, 50.0)
    ramp.update(9000, 20.0)
    assert ramp.allowed_per_s == 5000


# Token buckets


@given(st.floats(1, 10_000), st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 400)), max_size=80))
def test_a_caller_that_waits_as_long_as_it_must_never_exceeds_the_rate_and_its_burst(
    per_s: float, requests: list[tuple[float, int]]
) -> None:
    bucket, now_s, consumed = TokenBucket(per_s, 0.0), 0.0, 0
    for pause_s, count in requests:
        now_s += pause_s
        now_s += bucket.wait_s(now_s)
        assert consumed <= per_s * now_s + max(1.0, per_s * BURST_S) + 1e-3
        bucket.consume(count, now_s)
        consumed += count


def test_a_debt_is_paid_off_at_the_rate() -> None:
    bucket = TokenBucket(10.0, 0.0)
    assert bucket.wait_s(0.0) == 0
    bucket.consume(21, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(2.0, abs=1e-3)
    assert bucket.wait_s(1.5) == pytest.approx(0.5, abs=1e-3)
    assert bucket.wait_s(2.1) == 0


def test_a_refund_never_makes_more_than_a_burst() -> None:
    bucket = TokenBucket(1000.0, 0.0)
    bucket.consume(-10_000, 0.0)
    bucket.consume(1000 * BURST_S, 0.0)
    assert bucket.wait_s(0.0) > 0


@pytest.mark.parametrize(("per_s", "wait_s"), [(100.0, 0.1), (1.0, 10.0), (math.inf, 0.0)])
def test_a_debt_is_paid_off_at_the_new_rate(per_s: float, wait_s: float) -> None:
    bucket = TokenBucket(10.0, 0.0)
    bucket.consume(11, 0.0)
    bucket.set_rate(per_s, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(wait_s, abs=1e-4)


def test_without_a_rate_there_is_no_debt() -> None:
    bucket = TokenBucket(math.inf, 0.0)
    bucket.consume(10**15, 0.0)
    assert bucket.wait_s(0.0) == 0


# The meter


def test_a_meter_shows_the_last_full_second() -> None:
    meter = RateMeter()
    for now_s in (10.1, 10.2, 10.9):
        meter.add(5, now_s)
    assert meter.per_s(10.95) == 0
    assert meter.per_s(11.0) == 15
    meter.add(1, 11.5)
    assert (meter.per_s(11.9), meter.per_s(12.1), meter.per_s(13.0)) == (15, 1, 0)
    assert meter.per_s(500.0) == 0
