"""Fixtures that several test modules use."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.directory import CacheDirectory
from gcs_prefetchd.testing import GCSServer, ServingGCS, serving
from support.caches import RecordingObserver
from support.daemons import BUCKET, put_items
from support.faults import DATA, Tally, table_of

# How long an example takes depends more on the machine than on the code.
settings.register_profile("tests", deadline=None)
settings.register_profile("torture", deadline=None, max_examples=2000, database=None)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials and emulators but those that a test sets itself."""
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "no-gcloud"))
    monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")


@pytest.fixture
async def gcs() -> AsyncIterator[GCSServer]:
    """A GCS-speaking server in this event loop."""
    async with GCSServer() as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[ServingGCS]:
    """A server with two items, in a thread; all tests of a module share it, and put more objects beside them."""
    with serving() as server:
        put_items(server, 2)
        yield server


@pytest.fixture
def good(server: ServingGCS, request: pytest.FixtureRequest) -> str:
    """The URI of an object that no fault touches, of this test alone; it holds `support.faults.DATA`."""
    name = f"train/good/{abs(hash(request.node.name))}"
    server.put(BUCKET, name, DATA)
    return f"gs://{BUCKET}/{name}"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[CacheDirectory]:
    """A claimed cache directory."""
    claimed = CacheDirectory(tmp_path / "cache")
    claimed.claim()
    yield claimed
    claimed.close()


@pytest.fixture
async def cache(directory: CacheDirectory) -> AsyncIterator[Cache]:
    """An open cache of 1 MB, which must pass its own check at the end."""
    opened = Cache(directory, limit_bytes=1_000_000, observer=RecordingObserver())
    await opened.open()
    await opened.wait_until_ready()
    yield opened
    assert await opened.check() == []
    await opened.close()


_TALLIES = pytest.StashKey[list[Tally]]()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """A row of the table that `make torture` prints; the test counts in it."""
    row = Tally(request.node.name.removeprefix("test_").replace("_", " "))
    request.config.stash.setdefault(_TALLIES, []).append(row)
    return row


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of those long loops that ran."""
    if rows := config.stash.get(_TALLIES, []):
        terminalreporter.section("torture")
        terminalreporter.write_line(table_of(rows))
