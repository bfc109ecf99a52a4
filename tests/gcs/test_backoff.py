"""How long to wait before another try."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gcs_prefetchd.gcs.backoff import FIRST_S, LONGEST_S, delay_s, parse_retry_after

NOW = datetime(2026, 11, 5, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("attempt", "spread", "wait_s"),
    [
        (1, 0.0, 0.0),
        (1, 0.5, 0.1),
        (2, 0.5, 0.2),
        (3, 0.5, 0.4),
        (6, 0.5, 3.2),
        (7, 0.5, 5.0),
        (50, 0.5, 5.0),
        (5000, 0.5, 5.0),
    ],
)
def test_the_wait_doubles_up_to_a_bound(attempt: int, spread: float, wait_s: float) -> None:
    assert delay_s(attempt, spread=spread) == pytest.approx(wait_s)


@given(st.integers(1, 10**6))
@example(1024)
def test_the_wait_is_spread_over_the_whole_range(attempt: int) -> None:
    """Full jitter: readers that failed together do not come back together."""
    waits_s = [delay_s(attempt) for _ in range(200)]
    longest_s = min(LONGEST_S, FIRST_S * 2 ** min(attempt, 30))
    assert 0 <= min(waits_s) < 0.2 * longest_s
    assert 0.8 * longest_s < max(waits_s) <= longest_s


@given(st.integers(1, 100), st.floats(0, 60), st.floats(0, 1, exclude_max=True))
def test_it_is_never_sooner_than_the_server_asked_for(attempt: int, asked_s: float, spread: float) -> None:
    assert delay_s(attempt, asked_s, 60, spread) == max(asked_s, delay_s(attempt, spread=spread))


@pytest.mark.parametrize("asked_s", [31.0, 3600.0, 1e12, float("inf")])
def test_a_server_that_asks_for_hours_gets_the_patience_that_there_is(asked_s: float) -> None:
    assert delay_s(1, asked_s, 30.0) == 30.0


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("0", 0.0),
        ("5", 5.0),
        (" 120 ", 120.0),
        ("-5", None),
        ("1.5", None),
        ("²", None),
        ("٣", None),
        (format_datetime(NOW + timedelta(seconds=30), usegmt=True), 30.0),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0.0),
        ("Thu, 05 Nov 2026 13:00:10 +0100", 10.0),
        ("Thu, 05 Nov 2026 12:00:10 -0000", None),
        ("Thu, 05 Nov 2026 12:00:10 +99999999999999", None),
        ("Thu, 99 Nov 2026 12:00:10 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, wait_s: float | None) -> None:
    assert parse_retry_after(value, NOW) == wait_s


def test_a_date_is_held_against_the_clock() -> None:
    wait_s = parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))
    assert wait_s is not None
    assert 3500 < wait_s < 3700


@given(st.text(st.sampled_from("0123456789 -+:,ThuNovGMT."), max_size=40) | st.text(max_size=40))
@example("9" * 5000)
@example("1 Jan 2024")
@example("Thu, 05 Nov 0000 12:00:10 GMT")
def test_any_header_is_a_wait_or_nothing(value: str) -> None:
    wait_s = parse_retry_after(value, NOW)
    assert wait_s is None or 0 <= wait_s < float("inf")
