"""SIGKILL at random moments while readers check every file that they open: no wrong byte, and nothing published is lost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from gcs_prefetchd.service.daemonize import wait_for_exit
from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient, read_daemon_file
from gcs_prefetchd.shared.errors import DaemonUnavailableError
from gcs_prefetchd.shared.paths import cache_path_of_uri
from gcs_prefetchd.testing import Kind, ServingGCS, serving
from support.daemons import BUCKET, DATA_ROOT, check_left_behind, clean_environment, make_settings, start_arguments
from support.faults import Tally

READERS = 4
NEW_ITEMS = 8  # a round, so that there is always something to download
# Imports everything once: a start by exec spends nine tenths of its time on imports, where a kill proves nothing.
LAUNCHER = """
import json, os, sys
import uvloop, gcs_prefetchd.service.daemon
from gcs_prefetchd.cli import main
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.argv = ["gcs-prefetchd", *json.loads(line)]
        main()
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[str]]:
    """A process that runs `gcs-prefetchd` for each line of arguments, and prints the exit status."""
    command = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment()
    ) as process:
        yield process
        process.kill()


class Rounds:
    """One daemon after the other on one cache directory and a bucket that grows and changes; each is killed while it works."""

    def __init__(self, server: ServingGCS, launcher: subprocess.Popen[str], cache_dir: Path, tally: Tally) -> None:
        self._server = server
        self._launcher = launcher
        self._cache_dir = cache_dir
        self._tally = tally
        self._random = random.Random(7)
        self._bytes: dict[str, set[bytes]] = {}  # of each object, those of every generation
        self._published: dict[str, int] = {}  # the GETs for each object whose file existed when the last daemon died

    def kill_one(self) -> None:
        """Start a daemon, which must become ready, read through it and kill it in the middle of downloads."""
        self._change_the_bucket()
        gets = self._server.counts.total(Kind.MEDIA) + self._random.randint(1, 2 * NEW_ITEMS)
        pid = self._start()
        dead = threading.Event()
        with ThreadPoolExecutor(READERS) as pool:
            reading = [pool.submit(self._read, random.Random(number), dead) for number in range(READERS)]
            try:
                self._server.wait_for(lambda counts: counts.total(Kind.MEDIA) >= gets)
            finally:
                with wait_for_exit(pid) as ended:
                    os.kill(pid, signal.SIGKILL)
                    dead.set()
                    assert ended()
        for reader in reading:
            reader.result()
        self._tally.repetitions += 1
        self._check_files()

    def _start(self) -> int:
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.write(json.dumps(["start", *start_arguments(self._cache_dir, self._server.url)]) + "\n")
        self._launcher.stdin.flush()
        output: list[str] = []
        while not output or not output[-1].startswith("ended"):
            output.append(self._launcher.stdout.readline())
            assert output[-1], "the launcher has ended"
        assert output[-1] == "ended 0\n", output
        return int(str(read_daemon_file(self._cache_dir)["pid"]))

    def _change_the_bucket(self) -> None:
        """Add some items, and another generation of an old object."""
        number = len(self._bytes) // 2
        new = [f"{part}/{item:05}.{kind}" for item in range(number, number + NEW_ITEMS) for part, kind in PARTS]
        old = [self._random.choice(list(self._published)).removeprefix(f"{DATA_ROOT}/")] if self._published else []
        for name in new + old:
            data = self._random.randbytes(self._random.randrange(1, 50_000))
            self._bytes.setdefault(f"{DATA_ROOT}/{name}", set()).add(data)
            self._published.pop(f"{DATA_ROOT}/{name}", None)
            self._server.put(BUCKET, f"train/{name}", data)

    def _read(self, chance: random.Random, dead: threading.Event) -> None:
        """Read objects, the new ones first, until the daemon is dead: from their files, or else by a demand."""
        uris = list(self._bytes)
        order = [*uris[-2 * NEW_ITEMS :], *chance.choices(uris, k=10_000)]
        with closing(DaemonClient(self._cache_dir)) as client, contextlib.suppress(DaemonUnavailableError):
            for uri in order:
                if dead.is_set():
                    return
                if not self._check(uri):
                    (error,) = client.fetch([uri])
                    self._tally.failed_reads += bool(error)
                    self._check(uri)

    def _check(self, uri: str) -> bool:
        """Whether the object's file exists and is complete; counts it if its bytes are wrong."""
        data = read_checked(self._cache_dir / "objects", cache_path_of_uri(uri))
        self._tally.wrong_bytes += data is not None and data not in self._bytes[uri]
        return data is not None

    def _check_files(self) -> None:
        """Every file is complete, and what was published before the last start was not downloaded since."""
        media = self._server.counts.media
        self._tally.lost_objects += sum(media[uri.removeprefix("gs://")] > gets for uri, gets in self._published.items())
        for uri in self._bytes:
            if (self._cache_dir / "objects" / cache_path_of_uri(uri)).exists():
                if uri not in self._published:
                    self._tally.wrong_bytes += not self._check(uri)
                if len(self._bytes[uri]) == 1:  # the others are requested again, in their new generation
                    self._published[uri] = media[uri.removeprefix("gs://")]


PARTS = (("images", "jpg"), ("labels", "png"))


async def _kill(times: int, launcher: subprocess.Popen[str], cache_dir: Path, tally: Tally) -> None:
    with serving(latency_s=0.003, latency_sigma=1.0) as server:
        rounds = Rounds(server, launcher, cache_dir, tally)
        for _ in range(times):
            rounds.kill_one()
        await check_left_behind(make_settings(cache_dir, server.url))
    assert (tally.repetitions, tally.wrong_bytes, tally.lost_objects, tally.failed_reads) == (times, 0, 0, 0)


async def test_a_daemon_killed_at_any_moment_loses_nothing(launcher: subprocess.Popen[str], tmp_path: Path) -> None:
    await _kill(3, launcher, tmp_path / "cache", Tally("kills"))


@pytest.mark.torture
async def test_a_daemon_killed_200_times_loses_nothing(launcher: subprocess.Popen[str], tmp_path: Path, tally: Tally) -> None:
    await _kill(200, launcher, tmp_path / "cache", tally)
