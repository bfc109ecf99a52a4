"""Forking into the background, what the parent process gets reported, and waiting for an exit."""

import json
import os
import signal
import subprocess
import sys

import pytest

from gcs_prefetchd.service.daemonize import ForkedDaemon, ParentProcess, wait_for_exit
from gcs_prefetchd.shared.errors import DaemonUnavailableError, SettingsError, StartError

FORK = """
import os, sys
from gcs_prefetchd.service.daemonize import ForkedDaemon, fork_daemon

other = fork_daemon()
if isinstance(other, ForkedDaemon):
    print(other.wait_until_ready())
else:
    assert os.getsid(0) == os.getpid()
    assert sys.stdin.read() == ""
    other.report({"pid": os.getpid(), "http": "http://127.0.0.1:1"})
    os._exit(0)
"""


def reported(report: bytes) -> dict[str, object]:
    """What `wait_until_ready` returns after this report of a daemon that has exited with status 3."""
    read_end, write_end = os.pipe()
    os.write(write_end, report)
    os.close(write_end)
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "raise SystemExit(3)"], os.environ)
    try:
        return ForkedDaemon(pid, read_end).wait_until_ready()
    finally:
        if report:  # without a report it reads the exit status itself
            os.waitpid(pid, 0)


def test_the_parent_waits_for_the_report_of_a_daemon_in_its_own_session() -> None:
    result = subprocess.run([sys.executable, "-c", FORK], input="typed", capture_output=True, text=True, check=True)
    assert result.stdout.endswith("'http': 'http://127.0.0.1:1'}\n")


def test_the_parent_raises_the_daemons_own_error() -> None:
    assert reported(b'{"pid": 1}') == {"pid": 1}
    with pytest.raises(SettingsError, match=r"^setting seed: no$"):
        reported(json.dumps({"error": "setting seed: no", "status": 2}).encode())
    with pytest.raises(StartError, match=r"^the port is in use$"):
        reported(json.dumps({"error": "the port is in use", "status": 1}).encode())


def test_a_daemon_that_exits_without_a_report_is_an_error_with_its_status() -> None:
    with pytest.raises(StartError, match=r"^the daemon exited before it was ready, with status 3$"):
        reported(b"")


def test_only_the_first_report_is_sent() -> None:
    """Later errors go to the log: by then the descriptor may belong to another file."""
    read_end, write_end = os.pipe()
    parent = ParentProcess(write_end)
    parent.report({"pid": 1})
    parent.report({"error": "it failed later"})
    with os.fdopen(read_end) as pipe:
        assert pipe.read() == '{"pid": 1}'
    assert parent.exists


def test_a_parent_that_was_killed_stops_no_daemon() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    ParentProcess(write_end).report({"pid": 1})


def test_without_a_parent_a_report_goes_nowhere() -> None:
    parent = ParentProcess()
    assert not parent.exists
    parent.report({"pid": 1})


def test_an_exit_is_waited_for() -> None:
    with subprocess.Popen(["sleep", "60"]) as process, wait_for_exit(process.pid) as wait:
        process.send_signal(signal.SIGKILL)
        assert wait()


def test_a_process_that_has_exited_is_an_error_that_names_it() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(DaemonUnavailableError, match=f"^process {process.pid} has exited$"), wait_for_exit(process.pid):
        pass
