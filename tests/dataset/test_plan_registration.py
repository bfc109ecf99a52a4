"""The sender of plans: a new daemon, one that forgot the stream, shared leases, costs. test_planned_sampler.py has the rest."""

import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gcs_dataset.plan_registration import PlanSender, Share
from gcs_prefetchd.shared.manifest import Manifest
from support.datasets import RecordingDaemon, manifest_of


@pytest.fixture
def manifest() -> Manifest:
    return manifest_of(40)


def sender_of(cache_dir: Path, manifest: Manifest, check_pause_s: float = 1.0, confirm_pause_s: float = 1000.0) -> PlanSender:
    return PlanSender(
        cache_dir, manifest, job="job", stream="train-job", check_pause_s=check_pause_s, confirm_pause_s=confirm_pause_s
    )


def complete_share(count: int = 40) -> Share:
    return Share("listed", 0, 5, np.arange(count, dtype=np.uint32))


def test_a_new_daemon_gets_the_plan_and_the_position(tmp_path: Path, manifest: Manifest) -> None:
    sender = sender_of(tmp_path, manifest, check_pause_s=0)
    with RecordingDaemon(tmp_path, "first") as first:
        sender.start_plan(complete_share(), complete_share().order())
        sender.ensure_sent(1)
        assert [plan.position for plan, _ in first.plans] == [0]
    sender.ensure_sent(2)
    with RecordingDaemon(tmp_path, "second") as second:
        wait_until(lambda: sender.ensure_sent(17), lambda: len(second.plans) == 1)
        sender.ensure_sent(18)
        assert [(plan.epoch, plan.position) for plan, _ in second.plans] == [(5, 17)]
        assert (first.leases, second.leases) == (["job"], ["job"])


def test_a_daemon_that_forgot_the_stream_gets_the_plan_again(tmp_path: Path, manifest: Manifest) -> None:
    sender = sender_of(tmp_path, manifest, check_pause_s=0, confirm_pause_s=0)
    with RecordingDaemon(tmp_path) as daemon:
        sender.start_plan(complete_share(), complete_share().order())
        assert len(daemon.plans) == 1
        daemon.streams.clear()
        wait_until(lambda: sender.ensure_sent(7), lambda: len(daemon.plans) == 2)
        assert daemon.plans[1][0].position == 7
        assert daemon.leases == ["job"]


def test_senders_of_one_job_share_a_lease_that_ends_with_the_last_of_them(tmp_path: Path, manifest: Manifest) -> None:
    with RecordingDaemon(tmp_path) as daemon:
        first, second = (sender_of(tmp_path, manifest) for _ in range(2))
        for one in (first, second):
            one.start_plan(complete_share(), complete_share().order())
        assert daemon.leases == ["job"]
        lease = weakref.ref(first._lease)
        del first, one
        gc.collect()
        assert lease() is not None
        del second
        gc.collect()
        assert lease() is None


def test_a_sender_looks_for_a_new_daemon_once_a_second_at_most(tmp_path: Path, manifest: Manifest) -> None:
    sender = sender_of(tmp_path, manifest, check_pause_s=1000)
    with RecordingDaemon(tmp_path, "first"):
        sender.start_plan(complete_share(), complete_share().order())
    with RecordingDaemon(tmp_path, "second") as second:
        sender.ensure_sent(17)
        assert second.plans == []


def wait_until(step: Callable[[], object], condition: Callable[[], bool]) -> None:
    """Repeat the step until the condition is true."""
    deadline_at_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_at_s
        step()


def test_ensuring_that_the_plan_was_sent_costs_an_item_microseconds(tmp_path: Path, manifest: Manifest) -> None:
    sender = sender_of(tmp_path, manifest)
    with RecordingDaemon(tmp_path):
        sender.start_plan(complete_share(), complete_share().order())
        started_s = time.thread_time()
        for position in range(20_000):
            sender.ensure_sent(position)
        assert (time.thread_time() - started_s) / 20_000 < 5e-6
