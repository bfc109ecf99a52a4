"""Log lines, as a process writes them. `setup_logging` replaces stdout and stderr, so each test runs a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gcs_prefetchd.service.log_setup import setup_logging
from gcs_prefetchd.shared.errors import StartError

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) (.*)")


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A program that logs with `log`."""
    head = """
import logging, sys
from pathlib import Path
from gcs_prefetchd.service.log_setup import setup_logging
log = logging.getLogger("gcs_prefetchd.x")
"""
    done = subprocess.run([sys.executable, "-c", head + program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def messages(text: str) -> list[tuple[str, str]]:
    """Level and message of each line. Every line must have the right format."""
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    return [(match[1], match[2]) for match in found if match is not None] if all(found) else pytest.fail(text)


def test_a_line_is_time_level_and_message_on_stderr() -> None:
    done = run("setup_logging(None, 'info'); log.info('fetch %s: %d', 'gs://b/ü.jpg', 503); log.warning('careful')")
    assert messages(done.stderr) == [("INFO", "fetch gs://b/ü.jpg: 503"), ("WARNING", "careful")]
    assert done.stdout == ""


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_nothing_below_the_level_is_logged(level: str, shown: int) -> None:
    done = run("setup_logging(None, sys.argv[1]); log.debug('a'); log.info('b'); log.warning('c'); log.error('d')", level)
    assert [message for _, message in messages(done.stderr)] == ["a", "b", "c", "d"][4 - shown :]


def test_of_other_libraries_only_warnings_are_logged() -> None:
    done = run(
        "setup_logging(None, 'debug'); other = logging.getLogger('aiohttp'); other.info('chatter'); other.warning('trouble')"
    )
    assert messages(done.stderr) == [("WARNING", "trouble")]


@pytest.mark.parametrize("length", [1, 1900, 2001, 30_000_000])
def test_a_long_line_is_cut(length: int) -> None:
    """An error's text may contain the complete response of a server."""
    done = run("setup_logging(None, 'info'); log.info('x' * int(sys.argv[1]))", str(length))
    ((_, message),) = messages(done.stderr)
    if length < 1950:
        assert message == "x" * length
    else:
        assert 1900 < len(message) < 2010
        assert message.endswith("x ...")


def test_a_message_is_one_line_whatever_it_contains() -> None:
    """So no client can forge a log line."""
    forged = "a\\n2026-01-01 00:00:00,000 ERROR forged\\r\\x1b[31m\\u2028b\\x85c\\x00"
    done = run(f"setup_logging(None, 'info'); log.info('%s', '{forged}')")
    assert messages(done.stderr) == [("INFO", r"a\n2026-01-01 00:00:00,000 ERROR forged\r\x1b[31m\u2028b\x85c\x00")]


def test_half_a_character_is_logged_escaped() -> None:
    done = run("setup_logging(None, 'info'); log.info('a\\ud800b')")
    assert messages(done.stderr) == [("INFO", r"a\ud800b")]


def test_a_traceback_stays_complete() -> None:
    done = run("setup_logging(None, 'info')\ntry: raise ValueError('why')\nexcept ValueError: log.exception('what')")
    first, *rest = done.stderr.splitlines()
    assert messages(first) == [("ERROR", "what")]
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: why"


def test_a_log_file_replaces_stdout_and_stderr(tmp_path: Path) -> None:
    file = tmp_path / "daemon.log"
    file.write_text("before\n")
    done = run(
        "setup_logging(Path(sys.argv[1]), 'info'); log.info('logged'); "
        "print('printed', flush=True); print('failed', file=sys.stderr)",
        file,
    )
    assert (done.stdout, done.stderr) == ("", "")
    before, logged, *others = file.read_text().splitlines()
    assert before == "before"
    assert messages(logged) == [("INFO", "logged")]
    assert others == ["printed", "failed"]


def test_a_new_log_file_is_not_readable_by_other_users(tmp_path: Path) -> None:
    run("setup_logging(Path(sys.argv[1]), 'info')", tmp_path / "daemon.log")
    assert (tmp_path / "daemon.log").stat().st_mode & 0o777 & ~0o640 == 0


def test_a_later_setup_leaves_one_handler(tmp_path: Path) -> None:
    """As the daemon does once it has claimed the cache directory."""
    done = run(
        "setup_logging(None, 'info'); log.info('early'); setup_logging(Path(sys.argv[1]), 'info'); log.info('late')",
        tmp_path / "log",
    )
    assert messages(done.stderr) == [("INFO", "early")]
    assert messages((tmp_path / "log").read_text()) == [("INFO", "late")]


@pytest.mark.parametrize(
    ("path", "reason"), [("", "Is a directory"), ("nowhere/log", "No such file or directory"), ("file/log", "Not a directory")]
)
def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "file").touch()
    before = os.fstat(2)
    with pytest.raises(StartError, match=rf"^setting log_file: .*: {reason}$") as caught:
        setup_logging(tmp_path / path, "info")
    assert str(tmp_path / path) in str(caught.value)
    assert os.fstat(2).st_ino == before.st_ino
