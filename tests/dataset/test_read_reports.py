"""The reporter: batches, an absent daemon, the exit of a process."""

import gc
import threading
import time
from pathlib import Path

from PIL import Image

from gcs_dataset import CachedLoader
from gcs_dataset.read_reports import ReadCounts, ReadReporter
from support.datasets import RecordingDaemon


def reporting_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gcs-dataset-reports"]


def test_reads_are_summed_into_few_reports(tmp_path: Path) -> None:
    with RecordingDaemon(tmp_path) as daemon:
        reporter = ReadReporter(tmp_path, "job")
        for number in range(1000):
            reporter.add(ReadCounts(hits=2, wait_s=0.5), [f"gs://pictures/{number}", "gs://pictures/label"])
        reporter.close()
        assert daemon.reads() == (2000, 0, 0)
        assert sum(report.wait_s for report in daemon.reports) == 500
        assert sum(len(report.objects) for report in daemon.reports) == 2000
        assert len(daemon.reports) <= 3
        assert {report.job for report in daemon.reports} == {"job"}


def test_counts_from_before_a_daemon_started_arrive_later(tmp_path: Path) -> None:
    reporter = ReadReporter(tmp_path, "job")
    for number in range(10_500):
        reporter.add(ReadCounts(fallbacks=1), [f"gs://pictures/{number}"])
    reporter.add(ReadCounts(hits=1), ["gs://pictures/last"])
    with RecordingDaemon(tmp_path) as daemon:
        daemon.wait_for(lambda daemon: daemon.reads() == (1, 0, 10_500))
        named = [uri for report in daemon.reports for uri in report.objects]
        latest = [*(f"gs://pictures/{number}" for number in range(501, 10_500)), "gs://pictures/last"]
        assert named[-10_000:] == latest
        assert len(named) <= 20_000  # including those of the report that got no response
        reporter.close()


def test_counts_survive_a_restart_of_the_daemon(tmp_path: Path) -> None:
    reporter = ReadReporter(tmp_path, "job")
    with RecordingDaemon(tmp_path) as first:
        reporter.add(ReadCounts(hits=1), ["gs://pictures/1"])
        first.wait_for(lambda daemon: daemon.reads() == (1, 0, 0))
    reporter.add(ReadCounts(hits=2), ["gs://pictures/2"])
    with RecordingDaemon(tmp_path) as second:
        second.wait_for(lambda daemon: daemon.reads() == (2, 0, 0))
        reporter.close()


def test_a_report_whose_response_was_lost_is_sent_again_unchanged(tmp_path: Path) -> None:
    """So that the daemon, which may have received it, can recognise it."""
    reporter = ReadReporter(tmp_path, "job")
    with RecordingDaemon(tmp_path) as daemon:
        daemon.loses.add("/v1/reads")
        reporter.add(ReadCounts(hits=1, wait_s=0.5), ["gs://pictures/1"])
        daemon.wait_for(lambda daemon: len(daemon.reports) == 1)
        reporter.add(ReadCounts(misses=1), ["gs://pictures/2"])
        daemon.wait_for(lambda daemon: len(daemon.reports) == 3)
        daemon.loses.clear()
        daemon.wait_for(lambda daemon: daemon.reports[-1].misses == 1)
        first, *again, last = daemon.reports
        assert all(report == first for report in again)
        assert (last.reporter, last.number, last.hits, last.objects) == (
            first.reporter,
            first.number + 1,
            0,
            ["gs://pictures/2"],
        )
        reporter.close()


def test_a_rejected_report_blocks_no_later_one(tmp_path: Path) -> None:
    reporter = ReadReporter(tmp_path, "job")
    with RecordingDaemon(tmp_path) as daemon:
        daemon.refuses["/v1/reads"] = (400, "no such object")
        reporter.add(ReadCounts(hits=1), ["gs://pictures/strange"])
        daemon.wait_for(lambda daemon: daemon.refused > 0)
        daemon.refuses.clear()
        reporter.add(ReadCounts(hits=1), ["gs://pictures/2"])
        daemon.wait_for(lambda daemon: daemon.reads() == (2, 0, 0))
        assert [uri for report in daemon.reports for uri in report.objects] == ["gs://pictures/2"]
        reporter.close()


def test_closing_does_not_wait_for_a_daemon_that_hangs(tmp_path: Path) -> None:
    reporter = ReadReporter(tmp_path, "job")
    with RecordingDaemon(tmp_path) as daemon, daemon.hanging():
        reporter.add(ReadCounts(hits=1), ["gs://pictures/1"])
        started_s = time.monotonic()
        reporter.close()
        assert time.monotonic() - started_s < 4


def test_a_reporter_without_reads_has_no_thread(tmp_path: Path) -> None:
    before = len(reporting_threads())
    ReadReporter(tmp_path, "job").close()
    assert len(reporting_threads()) == before


def test_a_loader_that_is_garbage_collected_stops_its_thread(tmp_path: Path) -> None:
    def thread_of_a_collected_loader() -> threading.Thread:
        before = set(reporting_threads())
        loader = CachedLoader(tmp_path, fallback=lambda uri: Image.new("RGB", (1, 1)))
        loader("gs://pictures/images/7.jpg")
        [thread] = set(reporting_threads()) - before
        return thread

    thread = thread_of_a_collected_loader()
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_report_costs_its_reader_microseconds(tmp_path: Path) -> None:
    reporter = ReadReporter(tmp_path, "job")
    names = ["gs://pictures/images/7.jpg", "gs://pictures/labels/7.png"]
    started_s = time.thread_time()
    for _ in range(10_000):
        reporter.add(ReadCounts(hits=2), names)
    assert (time.thread_time() - started_s) / 10_000 < 20e-6
    reporter.close()
