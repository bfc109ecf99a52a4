"""GCS's ramp rule, and tokens that come at a rate."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.fetch.ramp_rule import BURST_S, DOUBLING_S, RAMP_START_PER_S, Bucket, Meter, Ramp


def test_a_cold_start_is_allowed_5000_a_second() -> None:
    assert Ramp().per_s == RAMP_START_PER_S == 5000


def moved(ramp: Ramp, share_used: float, from_s: float, seconds: float) -> float:
    for step in range(int(seconds) + 1):
        ramp.move(share_used * ramp.per_s, from_s + step)
    return ramp.per_s


def test_what_is_used_doubles_in_20_minutes_and_no_sooner() -> None:
    ramp = Ramp()
    assert moved(ramp, 1.0, 0.0, DOUBLING_S) == pytest.approx(10_000, rel=1e-3)
    assert moved(ramp, 0.5, DOUBLING_S, DOUBLING_S) == pytest.approx(20_000, rel=1e-3)


def test_what_is_not_used_is_lost_as_fast_as_it_came_down_to_where_it_began() -> None:
    ramp = Ramp()
    moved(ramp, 1.0, 0.0, 2 * DOUBLING_S)
    assert moved(ramp, 0.1, 2 * DOUBLING_S, DOUBLING_S) == pytest.approx(10_000, rel=1e-3)
    ramp.move(0.0, 100 * DOUBLING_S)
    assert ramp.per_s == 5000


def test_a_clock_that_goes_back_changes_nothing() -> None:
    ramp = Ramp()
    ramp.move(9000, 50.0)
    ramp.move(9000, 20.0)
    assert ramp.per_s == 5000


@given(st.floats(1, 10_000), st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 400)), max_size=80))
def test_whoever_waits_as_told_never_exceeds_the_rate_and_its_burst(per_s: float, asks: list[tuple[float, int]]) -> None:
    bucket, now_s, spent = Bucket(per_s, 0.0), 0.0, 0
    for pause_s, count in asks:
        now_s += pause_s
        now_s += bucket.wait_s(now_s)
        assert spent <= per_s * now_s + max(1.0, per_s * BURST_S) + 1e-3
        bucket.spend(count, now_s)
        spent += count


def test_a_debt_is_paid_off_at_the_rate() -> None:
    bucket = Bucket(10.0, 0.0)
    assert bucket.wait_s(0.0) == 0
    bucket.spend(21, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(2.0, abs=1e-3)
    assert bucket.wait_s(1.5) == pytest.approx(0.5, abs=1e-3)
    assert bucket.wait_s(2.1) == 0


def test_what_is_given_back_never_makes_more_than_a_burst() -> None:
    bucket = Bucket(1000.0, 0.0)
    bucket.spend(-10_000, 0.0)
    bucket.spend(1000 * BURST_S, 0.0)
    assert bucket.wait_s(0.0) > 0


@pytest.mark.parametrize(("per_s", "wait_s"), [(100.0, 0.1), (1.0, 10.0), (math.inf, 0.0)])
def test_a_debt_is_paid_off_at_the_new_rate(per_s: float, wait_s: float) -> None:
    bucket = Bucket(10.0, 0.0)
    bucket.spend(11, 0.0)
    bucket.set_rate(per_s, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(wait_s, abs=1e-4)


def test_without_a_rate_there_is_no_debt() -> None:
    bucket = Bucket(math.inf, 0.0)
    bucket.spend(10**15, 0.0)
    assert bucket.wait_s(0.0) == 0


def test_a_meter_tells_of_the_last_second_that_is_over() -> None:
    meter = Meter()
    for now_s in (10.1, 10.2, 10.9):
        meter.add(5, now_s)
    assert meter.per_s(10.95) == 0
    assert meter.per_s(11.0) == 15
    meter.add(1, 11.5)
    assert (meter.per_s(11.9), meter.per_s(12.1), meter.per_s(13.0)) == (15, 1, 0)
    assert meter.per_s(500.0) == 0
