"""Faults of GCS, sent by a real server to a real daemon: the right bytes or an error, and every promise holds."""

import gzip
import itertools
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from threading import Thread

import pytest

from gcs_prefetchd.testing import (
    Close,
    Cut,
    Drip,
    EmptyBody,
    Fault,
    FlippedByte,
    HtmlPage,
    LongBody,
    MalformedHash,
    MissingHash,
    Partial,
    Reset,
    ServingGCS,
    Stall,
    Status,
    serving,
)
from support.daemons import BUCKET, DATA_ROOT, put_items
from support.faults import DaemonProcess, Tally, faulted_daemon, promises
from support.origin_faults import DATA, FIRST, HUGE, PASSING, RETRIED

pytestmark = pytest.mark.xdist_group("origin_faults")  # in one process: they share a costly fixture

DEADLINE_S = 3
BUFFERED_BYTES = 1 << 20  # received but not yet processed when a connection breaks

LASTING: list[tuple[Fault, str]] = [
    (FlippedByte(), "crc32c"),
    (Cut(FIRST, "close"), f"received {FIRST} of {len(DATA)} bytes"),
    (Cut(FIRST, "http/1.0"), f"received {FIRST} of {len(DATA)} bytes"),
    (Cut(0), "the connection was lost after 0 bytes"),
    (LongBody(), f"more than the object's {len(DATA)} bytes"),
    (Partial(0, FIRST - 1), "GCS returned 206"),
    (EmptyBody(), f"received 0 of {len(DATA)} bytes"),
    (HtmlPage(), r"crc32c|received \d+ of \d+ bytes"),
    (MalformedHash("crc32c=AAAAAA=="), "crc32c"),
    (Reset(), "the connection was lost before a response arrived"),
    (Close(), "the connection was lost before a response arrived"),
    (Stall(None), "no response"),
    (Stall(1000), f"000 of {len(DATA)} bytes received"),
    (Drip(1, 0.1), f"of {len(DATA)} bytes received"),
    *((Status(status), f"GCS returned {status}") for status in (204, 304, *RETRIED)),
]


class Bench:
    """One daemon that gives up after 3 s and one server, for many cases, each with objects of its own."""

    def __init__(self, server: ServingGCS, daemon: DaemonProcess) -> None:
        self.server = server
        self.daemon = daemon
        self._numbers = itertools.count()

    def put(self, *faults: Fault, always: bool = False, data: bytes = DATA, content_encoding: str | None = None) -> str:
        """Store an object whose first GETs hit these faults one after another; with `always` every GET hits the only one."""
        name = f"train/other/{next(self._numbers):05}"
        self.server.put(BUCKET, name, data, content_encoding=content_encoding)
        for request, fault in enumerate(faults, 1):
            self.server.faults.add(fault, f"{BUCKET}/{name}", requests=None if always else request)
        return f"gs://{BUCKET}/{name}"

    @contextmanager
    def promises(self) -> Iterator[None]:
        with promises(self.daemon, self.put(), DATA):
            yield

    def gets(self, uri: str) -> int:
        """The number of requests for the object."""
        return self.server.counts.media[uri.removeprefix("gs://")]

    def memory_bytes(self) -> int:
        return int(self.daemon.stats()["process"]["memory_bytes"])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with serving() as server:
        put_items(server, 2)
        with faulted_daemon(
            tmp_path_factory.mktemp("origin") / "cache", server.url, ["--set", f"deadline_s={DEADLINE_S}"]
        ) as daemon:
            for item in range(2):
                assert daemon.client.fetch([f"{DATA_ROOT}/images/{item:05}.jpg"]) == [""]
            yield Bench(server, daemon)


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: repr(fault)[:40])
def test_after_any_passing_fault_the_reader_gets_the_right_bytes(bench: Bench, fault: Fault) -> None:
    uri = bench.put(fault)
    with bench.promises():
        assert bench.daemon.read(uri) == DATA
    assert bench.gets(uri) >= 2
    assert bench.daemon.lines_about(uri) == []


def test_a_lasting_fault_is_an_error_and_one_line_with_the_object_and_the_cause(bench: Bench) -> None:
    causes = {bench.put(fault, always=True): (fault, cause) for fault, cause in LASTING}
    with bench.promises():
        errors = bench.daemon.client.fetch(list(causes))
    for (uri, (fault, cause)), error in zip(causes.items(), errors, strict=True):
        assert error.startswith(f"fetch {uri}: gave up after {DEADLINE_S} s"), fault
        assert re.search(cause, error), (fault, error)
        (line,) = bench.daemon.lines_about(uri)
        assert error in line


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (400, "GCS returned 400"),
        (401, "GCS returned 401 .the credentials are not accepted"),
        (403, "GCS returned 403 .these credentials may not read it"),
        (404, "GCS returned 404 .there is no such object"),
    ],
)
def test_a_refused_object_is_an_error_after_one_request_and_is_read_once_gcs_allows_it(
    bench: Bench, status: int, cause: str
) -> None:
    uri = bench.put(Status(status))
    with bench.promises():
        assert re.search(f"fetch {uri}: {cause}", str(bench.daemon.read(uri)))
        assert bench.gets(uri) == 1
        assert bench.daemon.read(uri) == DATA
    (line,) = bench.daemon.lines_about(uri)
    assert re.search(cause, line)


def test_while_gcs_refuses_everything_cached_objects_are_still_read(bench: Bench) -> None:
    cached, good = bench.put(), bench.put()
    assert bench.daemon.read(cached) == DATA
    with promises(bench.daemon, good, DATA):
        bench.server.deny(BUCKET)
        try:
            assert "403" in str(bench.daemon.read(good))
            assert bench.daemon.read(cached) == DATA
            assert bench.daemon.client.fetch([cached]) == [""]
        finally:
            bench.server.allow(BUCKET)
    assert bench.gets(cached) == 1


def retry_afters() -> list[str]:
    now = datetime.now(UTC)
    dates = [format_datetime(now + timedelta(seconds=seconds), usegmt=True) for seconds in (-(10**6), 1, 10**9)]
    return ["0", "1", "1000000000", "9" * 400, "-1", "soon", "", *dates]


def test_no_retry_after_header_prevents_a_reader_from_getting_its_bytes(bench: Bench) -> None:
    retry_afters_of = {bench.put(Status(status, retry_after=value)): value for status in RETRIED for value in retry_afters()}
    with bench.promises():
        errors = bench.daemon.client.fetch(list(retry_afters_of))
        assert dict(zip(retry_afters_of.values(), errors, strict=True)) == dict.fromkeys(retry_afters_of.values(), "")
        assert {bench.daemon.cached(uri) for uri in retry_afters_of} == {DATA}
    assert {bench.gets(uri) for uri in retry_afters_of} == {2}


@pytest.mark.parametrize(
    "fault",
    [MissingHash(), *map(MalformedHash, ("crc32c=!!!!", "crc32c=AAAA", "crc32c", "", "md5=XrY7u+Ae7tCTyyK7j1rNww=="))],
    ids=str,
)
def test_a_response_without_a_crc32c_is_compared_with_the_metadata(bench: Bench, fault: Fault) -> None:
    uri = bench.put(fault, always=True)
    with bench.promises():
        assert bench.daemon.read(uri) == DATA
    assert bench.server.counts.metadata[uri.removeprefix("gs://")] == 1


def test_wrong_bytes_without_a_crc32c_are_requested_again(bench: Bench) -> None:
    uri = bench.put(MissingHash(), FlippedByte(), MissingHash())
    with bench.promises():
        assert bench.daemon.read(uri) == DATA
    assert bench.gets(uri) == 4


def test_an_object_replaced_during_its_download_is_of_one_generation(bench: Bench) -> None:
    uri = bench.put(Stall(FIRST))
    key = uri.removeprefix("gs://")
    results: list[bytes | str] = []
    with bench.promises():
        reading = Thread(target=lambda: results.append(bench.daemon.read(uri)))
        reading.start()
        bench.server.wait_for(lambda counts: counts.bytes[key] == FIRST)
        bench.server.put(BUCKET, key.removeprefix(f"{BUCKET}/"), DATA[::-1])
        reading.join()
    assert results == [DATA[::-1]]


def test_a_large_download_that_breaks_repeatedly_never_starts_again(bench: Bench) -> None:
    data = DATA * 100
    uri = bench.put(*[Cut(3_000_000)] * 3, data=data)
    with bench.promises():
        assert bench.daemon.read(uri) == data
    assert bench.gets(uri) == 4
    assert bench.server.counts.bytes[uri.removeprefix("gs://")] <= len(data) + 3 * BUFFERED_BYTES


def test_responses_of_30_mb_take_no_memory(bench: Bench) -> None:
    faults: list[Fault] = [
        Status(503, body=HUGE),
        Status(403, body=HUGE),
        Status(404, body=HUGE, content_type="application/json"),
    ]
    faults += [HtmlPage(HUGE), LongBody(len(HUGE))]
    uris = [bench.put(fault, always=True) for fault in faults]
    before = bench.memory_bytes()
    with bench.promises():
        most = max(_memory_while_fetching(bench, uris))
    assert most - before < len(HUGE)
    for uri in uris:
        (line,) = bench.daemon.lines_about(uri)
        assert len(line) < 1000


def test_a_gzip_bomb_is_stored_unchanged_and_takes_no_memory(bench: Bench) -> None:
    packed = gzip.compress(bytes(300_000_000), 1)
    uri = bench.put(data=packed, content_encoding="gzip")
    before = bench.memory_bytes()
    with bench.promises():
        most = max(_memory_while_fetching(bench, [uri]))
        assert bench.daemon.read(uri) == packed
    assert most - before < len(HUGE)


def _memory_while_fetching(bench: Bench, uris: list[str]) -> Iterator[int]:
    """The daemon's memory, measured repeatedly until it has fetched the objects or given up."""
    fetching = Thread(target=bench.daemon.client.fetch, args=[uris])
    fetching.start()
    while fetching.is_alive():
        fetching.join(0.02)
        yield bench.memory_bytes()


@pytest.mark.torture
def test_bytes_damaged_repeatedly_in_any_way_never_reach_a_reader(bench: Bench, tally: Tally) -> None:
    chance = random.Random(1)
    quick = [fault for fault in PASSING if not isinstance(fault, Drip | Stall) and fault != LongBody(len(HUGE))]
    with bench.promises():
        for _ in range(50):
            bodies = [chance.randbytes(chance.choice([0, 1, 10_000, 100_000, 2_000_000])) for _ in range(20)]
            uris = [bench.put(*chance.choices(quick, k=chance.randrange(1, 4)), data=data) for data in bodies]
            tally.failed_reads += sum(error != "" for error in bench.daemon.client.fetch(uris))
            tally.wrong_bytes += sum(
                bench.daemon.cached(uri) not in (data, None) for uri, data in zip(uris, bodies, strict=True)
            )
            tally.repetitions += len(uris)
    assert (tally.wrong_bytes, tally.failed_reads) == (0, 0)
