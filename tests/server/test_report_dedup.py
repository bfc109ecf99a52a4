"""Reports that come again."""

from gcs_prefetchd.server.report_dedup import Reporters


def test_a_report_is_new_once() -> None:
    reporters = Reporters()
    assert [reporters.is_new("a", number) for number in (1, 1, 2, 1, 2, 5, 4)] == [True, False, True, False, False, True, False]


def test_each_reporter_counts_for_itself() -> None:
    reporters = Reporters()
    assert reporters.is_new("a", 7)
    assert reporters.is_new("b", 1)
    assert not reporters.is_new("a", 7)


def test_those_that_reported_last_are_remembered() -> None:
    reporters = Reporters(most=2)
    for reporter in "abac":
        reporters.is_new(reporter, 3)
    assert not reporters.is_new("a", 3)
    assert reporters.is_new("b", 3)
