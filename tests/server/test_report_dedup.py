"""Repeated read reports are recognized."""

from gcs_prefetchd.server.report_dedup import ReportDedup


def test_a_report_is_accepted_once() -> None:
    dedup = ReportDedup()
    assert [dedup.accept("a", number) for number in (1, 1, 2, 1, 2, 5, 4)] == [True, False, True, False, False, True, False]


def test_each_reporter_has_numbers_of_its_own() -> None:
    dedup = ReportDedup()
    assert dedup.accept("a", 7)
    assert dedup.accept("b", 1)
    assert not dedup.accept("a", 7)


def test_only_the_reporters_that_reported_last_are_remembered() -> None:
    dedup = ReportDedup(max_reporters=2)
    for reporter in "abac":
        dedup.accept(reporter, 3)
    assert not dedup.accept("a", 3)
    assert dedup.accept("b", 3)
