"""Faults of listings, hit by a real daemon while it relists and at its start: the last listing stays in force."""

import asyncio
import base64
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from gcs_prefetchd.service.daemon import Daemon
from gcs_prefetchd.shared.checked_read import crc32c_of
from gcs_prefetchd.shared.errors import PrefetchdError
from gcs_prefetchd.testing import Close, Cut, Fault, GCSServer, HtmlPage, Kind, Reset, ServingGCS, Stall, Status, serving
from support.daemons import BUCKET, DATA_ROOT, make_settings, put_items, running
from support.faults import DATA, DaemonProcess, faulted_daemon, promises

pytestmark = pytest.mark.xdist_group("listing_faults")  # in one process: they share a costly fixture

GOOD = f"gs://{BUCKET}/train/good"
GENERATION = 7
MIB = 1 << 20


def page(*names: str, token: str = "", **changes: object) -> Status:
    """A page of a listing with changes to its entries; None removes a field.

    Unchanged entries match the stored objects: a listing whose last pages arrive after the faults have ended is correct.
    """
    crc32c = base64.b64encode(crc32c_of(DATA).to_bytes(4)).decode()
    entry = {"generation": str(GENERATION), "size": str(len(DATA)), "crc32c": crc32c} | changes
    items = [{"name": name} | {key: value for key, value in entry.items() if value is not None} for name in names]
    return json_response(json.dumps({"items": items} | ({"nextPageToken": token} if token else {})))


def json_response(body: str, content_type: str = "application/json") -> Status:
    return Status(200, body=body, content_type=content_type)


@dataclass(frozen=True, slots=True)
class Case:
    """A fault that every listing hits, and what the daemon logs."""

    fault: Fault
    logged: str


# The page requested just after the faults end is refused.
REFUSED = "GCS returned 400 .Invalid value for: pageToken"

CASES = {
    "a page names an object twice": Case(page("train/images/1.jpg", "train/images/1.jpg"), "names on a page are not sorted"),
    "pages go back": Case(page("train/images/1.jpg", token="again"), f"goes back to 'train/images/1.jpg'|{REFUSED}"),
    "empty pages continue forever": Case(page(token="again"), f"its pages continue without a name|{REFUSED}"),
    "nothing is listed": Case(json_response("{}"), "no item has all of images"),
    "one part of all items is gone": Case(page("train/images/1.jpg"), "no item has all of images"),
    "access is denied": Case(Status(403), r"GCS returned 403"),
    "the bucket is gone": Case(Status(404), r"GCS returned 404"),
    "an entry has no size": Case(page("train/images/1.jpg", size=None), "lacks name, generation or size"),
    "an entry has no generation": Case(page("train/images/1.jpg", generation=None), "lacks name, generation or size"),
    "the JSON is truncated": Case(json_response('{"items": [{"name": "train/im'), "the page is not JSON"),
    "the JSON is nested without end": Case(json_response("[" * 200_000), "the page is not JSON"),
    "the charset is invalid": Case(json_response('{"items": 5}', "application/json; charset=hex"), "the page is not a listing"),
    "an error in an invalid charset": Case(
        Status(503, body="{}", content_type="application/json; charset=hex"), "GCS returned 503"
    ),
    "the connection is closed in the middle of a page": Case(Cut(60), "ClientPayloadError"),
    "the end of a page is cut off silently": Case(Cut(60, "close"), "the page is not JSON"),
    "a login page arrives": Case(HtmlPage(), "the page is not JSON"),
    "the connection is reset": Case(Reset(), "ClientOSError|ServerDisconnected"),
    "the connection is closed": Case(Close(), "ServerDisconnected"),
    "GCS is silent": Case(Stall(None), "no response"),
    "GCS is overloaded": Case(Status(503), "GCS returned 503"),
}
ROOTS = {name: f"gs://bucket-{number}/train" for number, name in enumerate(CASES)}
AT_THE_START = (
    "pages go back",
    "nothing is listed",
    "access is denied",
    "the JSON is nested without end",
    "GCS is silent",
)
PARTS = ("images/1.jpg", "labels/1.png")
IN_FORCE = "the last listing stays in force; retry in 1 s"


@pytest.fixture(scope="module")
def server() -> Iterator[ServingGCS]:
    """A server with a data root for each fault, so that the daemon hits all of them at the same time."""
    with serving() as server:
        put_items(server, 1)
        for name in ("after all", "after a long error", "after a long page"):
            server.put(BUCKET, f"train/good/{name}", DATA)
        for root in ROOTS.values():
            put_item(server, root, 1)
        yield server


def put_item(server: ServingGCS, root: str, number: int) -> None:
    bucket = root.split("/")[2]
    server.put(bucket, f"train/images/{number}.jpg", DATA, generation=GENERATION)
    server.put(bucket, f"train/labels/{number}.png", DATA, generation=GENERATION)


@pytest.fixture(scope="module")
def daemon(server: ServingGCS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that lists every second, gives up a page after one, has cached everything, and has hit every fault."""
    extra = [argument for root in ROOTS.values() for argument in ("--data-root", root)]
    extra += ["--set", "relist_s=1", "--set", "deadline_s=1"]
    with faulted_daemon(tmp_path_factory.mktemp("listing") / "cache", server.url, extra) as daemon:
        assert set(daemon.client.fetch([f"{root}/{part}" for root in ROOTS.values() for part in PARTS])) == {""}
        listed = [daemon.client.manifest(root) for root in ROOTS.values()]
        with promises(daemon, f"{GOOD}/after all", DATA):
            for name, root in ROOTS.items():
                server.faults.add(CASES[name].fault, root.split("/")[2], kind=Kind.LIST)
            for root in ROOTS.values():
                daemon.wait_for_line(f"WARNING .*{root}[/:].*{IN_FORCE}")
            assert [daemon.client.manifest(root) for root in ROOTS.values()] == listed
            server.faults.clear()
            server.release()
        yield daemon


@pytest.mark.parametrize("name", CASES)
def test_a_failed_listing_leaves_the_last_one_in_force_and_evicts_nothing(daemon: DaemonProcess, name: str) -> None:
    root = ROOTS[name]
    assert [daemon.cached(f"{root}/{part}") for part in PARTS] == [DATA, DATA]
    lines = [line for line in daemon.lines() if re.search(f" (WARNING|ERROR) .*{root}[/:]", line)]
    assert lines
    assert [line for line in lines if not re.search(f"({CASES[name].logged}).*{IN_FORCE}", line)] == []
    times = [datetime.fromisoformat(line[:23].replace(",", ".")) for line in lines]
    assert all((later - earlier).total_seconds() > 0.9 for earlier, later in pairwise(times))  # one line for each listing


def test_after_a_failed_listing_the_next_successful_one_is_used(daemon: DaemonProcess, server: ServingGCS) -> None:
    for root in ROOTS.values():
        put_item(server, root, 2)
    for root in ROOTS.values():
        daemon.wait_for_line(f"INFO {root}: 2 items")


class Logged(logging.Handler):
    """Queues the log lines that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.lines: asyncio.Queue[str] = asyncio.Queue()
        self._text = text

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self.lines.put_nowait(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def kept() -> Iterator[asyncio.Queue[str]]:
    """The log lines about listings that stay in force."""
    handler = Logged("stays in force")
    logging.getLogger("gcs_prefetchd").addHandler(handler)
    yield handler.lines
    logging.getLogger("gcs_prefetchd").removeHandler(handler)


@pytest.mark.parametrize("name", AT_THE_START)
async def test_a_first_start_that_cannot_list_names_the_cause_and_a_later_one_serves_the_last_listing(
    name: str, gcs: GCSServer, tmp_path: Path, kept: asyncio.Queue[str]
) -> None:
    put_items(gcs, 1)
    settings = make_settings(tmp_path / "cache", gcs.url, deadline_s=0.3)
    gcs.faults.add(CASES[name].fault, kind=Kind.LIST)
    with pytest.raises(PrefetchdError, match=f"{DATA_ROOT}[/:].*{CASES[name].logged}"):
        async with running(settings):
            pass
    gcs.faults.clear()
    async with running(settings) as daemon:
        await daemon.prefetcher.settled()
        listed = digest_in_force(daemon)
    gcs.faults.add(CASES[name].fault, kind=Kind.LIST)
    async with running(settings) as daemon:
        async with asyncio.timeout(20):
            assert (await kept.get()).startswith("WARNING")
        assert digest_in_force(daemon) == listed
        assert len(daemon.cache) == 2
    assert kept.empty()


def digest_in_force(daemon: Daemon) -> str:
    manifest = daemon.registry.catalog.newest_manifest(DATA_ROOT)
    assert manifest is not None
    return manifest.digest


@pytest.mark.parametrize(
    ("fault", "what"),
    [(Status(503, body="x" * (30 * MIB)), "error"), (json_response('{"items": [' + " " * (30 * MIB) + "]}"), "page")],
    ids=["error", "page"],
)
def test_a_response_of_many_megabytes_takes_almost_no_memory(
    server: ServingGCS, tmp_path: Path, fault: Status, what: str
) -> None:
    with faulted_daemon(tmp_path / "cache", server.url, ["--set", "relist_s=1", "--set", "deadline_s=2"]) as daemon:
        before_bytes = peak_memory_bytes(daemon)
        with promises(daemon, f"{GOOD}/after a long {what}", DATA):
            server.faults.add(fault, BUCKET, kind=Kind.LIST)
            daemon.wait_for_line(IN_FORCE)
            server.faults.clear()
        assert peak_memory_bytes(daemon) - before_bytes < {"error": 10 * MIB, "page": 70 * MIB}[what]


def peak_memory_bytes(daemon: DaemonProcess) -> int:
    """The most memory that the daemon ever used."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{daemon.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
