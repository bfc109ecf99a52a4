"""Moving averages of rates and durations."""

import math

import pytest

from gcs_prefetchd.shared.moving_average import ASSUMED_DOWNLOAD_S, ASSUMED_PER_S, MIN_PER_S, MovingDuration, MovingRate


def rate_of(per_s: float, seconds: float, step_s: float = 0.1) -> MovingRate:
    rate = MovingRate()
    for step in range(round(seconds / step_s) + 1):
        rate.add(round(per_s * step_s), step * step_s)
    return rate


def test_before_a_second_count_a_rate_is_assumed() -> None:
    rate = MovingRate()
    assert rate.per_s(0.0) == ASSUMED_PER_S
    rate.add(5, 1.0)
    assert rate.per_s(1.0) == rate.per_s(50.0) == ASSUMED_PER_S


@pytest.mark.parametrize("per_s", [10, 200, 5000])
def test_a_steady_rate_is_reported_exactly(per_s: int) -> None:
    assert rate_of(per_s, 60).per_s(60.0) == pytest.approx(per_s, rel=0.02)


def test_a_steady_rate_is_known_after_two_counts() -> None:
    assert rate_of(200, 0.1).per_s(0.1) == pytest.approx(200, rel=0.02)


def test_a_change_of_the_rate_is_followed_within_a_minute() -> None:
    rate = rate_of(100, 60)
    for step in range(1, 601):
        rate.add(100, 60 + step / 10)
    assert rate.per_s(120.0) == pytest.approx(1000, rel=0.05)


def test_the_rate_falls_without_events_and_never_reaches_zero() -> None:
    rate = rate_of(100, 60)
    rates = [rate.per_s(60.0 + silent_s) for silent_s in (0, 1, 10, 100, 1e9)]
    assert rates == sorted(rates, reverse=True)
    assert rates[2] == pytest.approx(50, rel=0.1)
    assert rates[-1] == MIN_PER_S


def test_reading_the_rate_does_not_change_it() -> None:
    rate = rate_of(100, 60)
    rate.per_s(10_000.0)
    assert rate.per_s(60.0) == pytest.approx(100, rel=0.02)


def test_events_at_the_same_moment_and_a_stopped_clock_are_not_an_error() -> None:
    rate = MovingRate()
    for _ in range(5):
        rate.add(3, 7.0)
    assert math.isfinite(rate.per_s(7.0))
    assert rate.per_s(6.0) > 0


def test_a_moving_duration_starts_from_the_assumed_value() -> None:
    spread = MovingDuration()
    assert (spread.mean_s, spread.deviation_s) == (ASSUMED_DOWNLOAD_S, ASSUMED_DOWNLOAD_S)


@pytest.mark.parametrize("low_s", [0.02, 0.2, 2.0])
def test_mean_and_deviation_approach_the_measured_ones(low_s: float) -> None:
    spread = MovingDuration()
    for step in range(1000):
        spread.add(low_s if step % 2 else 3 * low_s)
    assert spread.mean_s == pytest.approx(2 * low_s, rel=0.05)
    assert spread.deviation_s == pytest.approx(low_s, rel=0.05)


def test_equal_durations_have_no_deviation() -> None:
    spread = MovingDuration()
    for _ in range(2000):
        spread.add(0.05)
    assert spread.mean_s == pytest.approx(0.05)
    assert spread.deviation_s < 1e-6
