"""The command line, as a user types it."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcs_prefetchd import __version__
from gcs_prefetchd.testing import ServingGCS, serving
from support.caches import run_script
from support.daemons import BUCKET, DATA_ROOT, daemon_process, put_items, run_command, start_arguments
from support.datasets import RecordingDaemon


@pytest.fixture(scope="module")
def server() -> Iterator[ServingGCS]:
    """A server with six items."""
    with serving() as server:
        put_items(server, 6)
        yield server


@pytest.fixture(scope="module")
def running(server: ServingGCS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache directory of a running daemon."""
    cache_dir = tmp_path_factory.mktemp("running") / "cache"
    with daemon_process(cache_dir, server.url):
        yield cache_dir


def test_start_returns_when_the_daemon_is_ready_and_prints_where_its_statistics_are(server: ServingGCS, tmp_path: Path) -> None:
    started = run_command("start", *start_arguments(tmp_path / "cache", server.url))
    assert (started.returncode, started.stderr) == (0, "")
    about = json.loads((tmp_path / "cache/daemon.json").read_text())
    assert about.keys() >= {"pid", "instance_id", "http", "socket", "data_roots"}
    assert f"statistics  {about['http']}/" in started.stdout
    with urllib.request.urlopen(f"{about['http']}/readyz") as response:
        assert response.status == 200
    stopped = run_command("stop", "--cache-dir", tmp_path / "cache")
    assert (stopped.returncode, stopped.stdout) == (0, f"stopped (pid {about['pid']}); the cache in {tmp_path}/cache is kept\n")
    assert not (tmp_path / "cache/daemon.json").exists()
    assert run_command("status", "--cache-dir", tmp_path / "cache").returncode == 1


def test_status_and_stats_show_a_running_daemon(server: ServingGCS, tmp_path: Path) -> None:
    with daemon_process(tmp_path / "cache", server.url) as client:
        pid = client.status().pid
        status = run_command("status", "--cache-dir", tmp_path / "cache")
        assert (status.returncode, f"running: pid {pid}" in status.stdout, DATA_ROOT in status.stdout) == (0, True, True)
        stats = run_command("stats", "--cache-dir", tmp_path / "cache", "--json")
        assert json.loads(stats.stdout)["cache"]["limit_bytes"] == 10**9
        shown = run_command("stats", "--cache-dir", tmp_path / "cache").stdout
        assert "of 1.0 GB" in shown
        assert "\nHit ratio        0.0%\n" in shown
        assert f"\nseeded {DATA_ROOT}: epoch 0 of {DATA_ROOT}\nRead             0 of 6 items\n" in shown
        assert max(map(len, shown.splitlines())) <= 100
        assert re.search(r"downloads: \d+ in progress; limit 128 \(8 to 256\), set at the start .* ago\n", status.stdout)
        assert " requests/s (5,000 allowed)" in status.stdout


def test_a_running_daemon_of_another_version_is_reported_as_running(tmp_path: Path) -> None:
    with RecordingDaemon(tmp_path / "cache"):
        status = run_command("status", "--cache-dir", tmp_path / "cache")
        stats = run_command("stats", "--cache-dir", tmp_path / "cache")
    assert (status.returncode, status.stdout.splitlines()[0]) == (0, "running: pid 1, version 0")
    assert "field 'version' is missing; is the daemon of another version?" in status.stdout
    assert (stats.returncode, len(stats.stderr.splitlines())) == (1, 1)


def test_set_changes_a_running_daemon_and_shows_the_new_values(server: ServingGCS, tmp_path: Path) -> None:
    with daemon_process(tmp_path / "cache", server.url, ["--set", "concurrency=64"]) as client:
        shown = run_command("set", "--cache-dir", tmp_path / "cache")
        assert (shown.returncode, shown.stdout) == (
            0,
            "concurrency = 64 downloads\nmin_concurrency = 8 downloads\nmax_requests_per_s = none\nmax_bytes_per_s = none\n",
        )
        pairs = ["concurrency=32", "max-requests-per-s=1500.5", "max_bytes_per_s=500MB"]
        changed = run_command("set", "--cache-dir", tmp_path / "cache", *pairs)
        assert changed.stdout.splitlines() == [
            "concurrency = 32 downloads",
            "min_concurrency = 8 downloads",
            "max_requests_per_s = 1500.5 requests/s",
            "max_bytes_per_s = 500 MB/s",
        ]
        limits = client.stats()["limits"]
        assert (limits["max_concurrency"], limits["allowed_requests_per_s"], limits["allowed_bytes_per_s"]) == (32, 1500.5, 5e8)
        assert run_command("set", "--cache-dir", tmp_path / "cache", "max_bytes_per_s=").returncode == 0
        assert client.settings()["max_bytes_per_s"] is None
    assert "setting concurrency: changed from 64 downloads to 32 downloads" in (tmp_path / "cache/daemon.log").read_text()


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("concurrency=0", "setting concurrency in the request: 0 should be greater than or equal to 1"),
        ("concurrency=many", "setting concurrency: must be a number or null, not str"),
        ("seed=5", "setting 'seed' cannot be changed while the daemon runs; these can: concurrency, "),
        ("concurrency", "'concurrency': write NAME=VALUE, as in concurrency=64"),
    ],
)
def test_set_names_a_setting_that_it_refuses_and_exits_with_status_2(running: Path, pair: str, expected: str) -> None:
    result = run_command("set", "--cache-dir", running, pair)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert expected in result.stderr


def test_the_cache_survives_a_stop_and_a_start(server: ServingGCS, tmp_path: Path) -> None:
    with daemon_process(tmp_path / "cache", server.url) as client:
        assert client.fetch([f"{DATA_ROOT}/images/00001.jpg"]) == [""]
    server.reset()
    with daemon_process(tmp_path / "cache", server.url) as client:
        assert client.fetch([f"{DATA_ROOT}/images/00001.jpg"]) == [""]
        assert server.counts.media[f"{BUCKET}/train/images/00001.jpg"] == 0


def test_without_a_daemon_every_command_reports_that_none_runs(tmp_path: Path) -> None:
    results = {name: run_command(name, "--cache-dir", tmp_path) for name in ("status", "stats", "set", "stop")}
    assert {name: result.returncode for name, result in results.items()} == {"status": 1, "stats": 1, "set": 1, "stop": 0}
    assert results["status"].stdout.startswith("not running: ")
    assert results["stop"].stdout == f"no daemon is running for {tmp_path}\n"


def test_check_config_prints_the_settings_as_a_user_writes_them_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('cache_size = "1GB"\nseed = 5\nconcurrency = 7\n')
    flags = ["--data-root", "gs://bucket/a", "--cache-dir", str(tmp_path / "cache"), "--seed", "9", "--check-config"]
    environment = {"GCS_PREFETCHD_SEED": "8", "GCS_PREFETCHD_CONCURRENCY": "12"}
    result = run_command("start", "--config", tmp_path / "config.toml", *flags, environment=environment)
    assert result.returncode == 0, result.stderr
    shown = dict(line.split(" = ", 1) for line in result.stdout.splitlines())
    assert (shown["seed"], shown["concurrency"], shown["cache_size"], shown["data_roots"]) == (
        "9",
        "12",
        "1.0 GB",
        "gs://bucket/a",
    )
    assert (shown["read_ahead"], shown["anonymous"], shown["window_items"]) == ("true", "false", "")
    again = run_command("start", "--check-config", *(part for line in shown.items() for part in ("--set", "=".join(line))))
    assert (again.returncode, again.stdout) == (0, result.stdout)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("extra", "environment", "expected"),
    [
        (["--cache-size", "0"], {}, "setting cache_size on the command line: '0' must be more than 0"),
        (
            ["--cache-size", "10 Q"],
            {},
            "setting cache_size on the command line: '10 Q' is not a valid size; write a number and a unit",
        ),
        (["--cache-size", "900PB"], {}, "setting cache_size: 900.0 PB is more than the disk"),
        (["--set", "windows=5"], {}, "setting windows on the command line is unknown"),
        ([], {"GCS_PREFETCHD_COLOUR": "red"}, "setting colour in the environment is unknown"),
        (["--http", "8484"], {}, "setting http on the command line: '8484' is not a valid address; write HOST:PORT"),
        (["--seed", "one"], {}, "setting seed on the command line: 'one' should be a valid integer"),
        (["--data-root", "s3://bucket"], {}, "setting data_roots"),
        (["--config", "/none.toml"], {}, "setting config: /none.toml: No such file or directory"),
        (["--set", "concurrency"], {}, "--set 'concurrency': write NAME=VALUE"),
    ],
)
def test_a_bad_setting_is_named_in_one_line_with_status_2(
    tmp_path: Path, extra: list[str], environment: dict[str, str], expected: str
) -> None:
    arguments = ["--data-root", DATA_ROOT, "--cache-dir", str(tmp_path / "cache"), "--cache-size", "1GB", "--anonymous"]
    result = run_command("start", *arguments, *extra, environment=environment)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("data_root", "expected"),
    [
        (
            "gs://no-such-bucket/train",
            "/: GCS returned 404 (there is no such object or bucket)",
        ),
        (f"gs://{BUCKET}/tests", f"gs://{BUCKET}/tests: no item has all of images/{{id}}.jpg, labels/{{id}}.png"),
    ],
)
def test_a_data_root_that_does_not_exist_is_named_with_status_1(
    server: ServingGCS, tmp_path: Path, data_root: str, expected: str
) -> None:
    arguments = start_arguments(tmp_path / "cache", server.url)
    arguments[1] = data_root
    result = run_command("start", *arguments)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert expected in result.stderr
    assert not (tmp_path / "cache/daemon.json").exists()


def test_a_port_in_use_is_named_with_status_1(server: ServingGCS, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run_command("start", *start_arguments(tmp_path / "cache", server.url, ["--http", address]))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"setting http: {address}: the port is in use" in result.stderr


def test_a_foreign_directory_is_refused_and_left_unchanged(server: ServingGCS, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run_command("start", *start_arguments(tmp_path, server.url))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "not empty and not ours (it holds 'thesis.txt')" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_second_daemon_for_the_same_directory_is_refused_and_the_first_keeps_running(
    server: ServingGCS, tmp_path: Path
) -> None:
    with daemon_process(tmp_path / "cache", server.url) as client:
        result = run_command("start", *start_arguments(tmp_path / "cache", server.url))
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert f"held by another daemon (pid {client.status().pid})" in result.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ('{"type": "service_account"}', "client_email, private_key, token_uri missing"),
    ],
)
def test_an_unusable_key_file_is_named(tmp_path: Path, content: str | None, expected: str) -> None:
    key = tmp_path / "key.json"
    if content is not None:
        key.write_text(content)
    arguments = ["--data-root", DATA_ROOT, "--cache-dir", str(tmp_path / "cache"), "--cache-size", "1GB", "--set", "min_free=0"]
    result = run_command("start", *arguments, "--http", "127.0.0.1:0", "--credentials", str(key))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"credentials {key}: " in result.stderr
    assert expected in result.stderr


def test_without_credentials_the_error_explains_what_to_do(tmp_path: Path) -> None:
    arguments = [
        "--data-root",
        DATA_ROOT,
        "--cache-dir",
        str(tmp_path / "cache"),
        "--cache-size",
        "1GB",
        "--http",
        "127.0.0.1:0",
    ]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        unused_address = f"127.0.0.1:{closed.getsockname()[1]}"
    result = run_command(
        "start", *arguments, "--http", "127.0.0.1:0", environment={"GCE_METADATA_HOST": unused_address, "HOME": str(tmp_path)}
    )
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "no credentials: " in result.stderr
    assert "--anonymous for a public bucket" in result.stderr


def test_the_log_names_the_missing_parts_of_incomplete_items(tmp_path: Path) -> None:
    with serving() as server:
        put_items(server, 2)
        server.put(BUCKET, "train/images/alone.jpg", b"x")
        with daemon_process(tmp_path / "cache", server.url) as client:
            assert client.manifest(DATA_ROOT).items == 2
    log = (tmp_path / "cache/daemon.log").read_text()
    assert f"1 objects are missing, and their items are left out: {DATA_ROOT}/labels/alone.png" in log


def test_the_daemon_survives_the_terminal_that_started_it(server: ServingGCS, tmp_path: Path) -> None:
    with daemon_process(tmp_path / "cache", server.url) as client:
        pid = client.status().pid
        assert os.getsid(pid) == pid  # its own session: no hangup reaches it
        assert {Path(f"/proc/{pid}/fd/{fd}").readlink() for fd in (1, 2)} == {tmp_path / "cache/daemon.log"}


@pytest.mark.parametrize(
    "command", [[Path(sys.executable).with_name("gcs-prefetchd")], [sys.executable, "-m", "gcs_prefetchd"]]
)
def test_the_version_is_printed(command: list[str]) -> None:
    """By the console script of this environment and by the package."""
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == (f"gcs-prefetchd {__version__}\n", "")


def test_help_names_every_command_with_a_complete_sentence() -> None:
    shown = run_command("--help").stdout
    commands = re.findall(r"^  (\w+) +(\S.*)$", shown.partition("Commands:")[2], re.MULTILINE)
    assert [name for name, _ in commands] == ["start", "stop", "status", "stats", "set"]
    assert all(sentence.endswith(".") and not sentence.endswith("...") for _, sentence in commands)
    assert run_command("-h").stdout == shown


@pytest.mark.parametrize("command", ["start", "stop", "status", "stats", "set"])
def test_help_of_a_command_names_values_in_capitals_and_no_types_of_python(command: str) -> None:
    shown = run_command(command, "--help").stdout
    assert not re.search(r"[<>]|\bTEXT\b", shown)
    assert "--cache-dir PATH" in shown


def test_help_of_start_shows_which_value_each_flag_expects() -> None:
    shown = run_command("start", "--help").stdout
    flags = dict(re.findall(r"^  (--[a-z-]+) ([A-Z:=]+) ", shown, re.MULTILINE))
    assert flags == {
        "--data-root": "URI",
        "--cache-dir": "PATH",
        "--cache-size": "SIZE",
        "--seed": "NUMBER",
        "--endpoint": "URL",
        "--credentials": "PATH",
        "--http": "HOST:PORT",
        "--set": "NAME=VALUE",
        "--config": "PATH",
    }


WITHOUT_MEMORY = """
import sys, time
from gcs_prefetchd import cli
from gcs_prefetchd.service import daemon

async def serve(*arguments):
    raise MemoryError

daemon.serve = serve
cli.asyncio.Runner.close = lambda runner: time.sleep(60)
sys.argv = ["gcs-prefetchd", "start", "--foreground", "--data-root", "gs://pictures/train", "--anonymous"]
sys.argv += ["--cache-size", "1MB", "--cache-dir", CACHE_DIR]
cli.main()
"""


def test_an_event_loop_without_memory_ends_the_process_at_once(tmp_path: Path) -> None:
    """Closing such a loop can hang, and a daemon that neither responds nor exits is the worst case."""
    script = WITHOUT_MEMORY.replace("CACHE_DIR", repr(str(tmp_path / "cache")))
    assert run_script(script).returncode == 1
