"""The readers' client, against real servers on real Unix sockets: good ones, absent ones and wrong ones."""

import contextlib
import gc
import itertools
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from gcs_prefetchd.shared.daemon_client import FIRST_PAUSE_S, MAX_PAUSE_S, DaemonClient, read_daemon_file, short_address
from gcs_prefetchd.shared.errors import DaemonUnavailableError, ProtocolError
from gcs_prefetchd.shared.messages import ManifestResponse, Plan, ReadReport, Status, pack_indices

STATUS = Status(42, "instance", "1.0", ["gs://pictures/train"], ["train-1"])
PLAN = Plan("job", "job/0", "gs://pictures/train", "d", "shuffled", 7, 1, 2, 0, 1, 0, 0, "0")
HANG = b"hang"  # in the place of an answer: never send one


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    body: bytes


Answer = Callable[[Request], bytes]


def http(body: str | bytes, status: int = 200) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    return f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers each request with whatever bytes `answer` makes of it, and counts."""

    daemon_threads = True

    def __init__(self, path: Path, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.connections: list[socket.socket] = []
        self.ending = threading.Event()
        self.gone = threading.Semaphore(0)  # released for each client that hung up
        with short_address(path) as address:
            super().__init__(address, Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is none."""


class Connection(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        try:
            self._serve()
        finally:  # whoever leaves an answer unread resets the connection
            self.server.gone.release()

    def _serve(self) -> None:
        while line := self.rfile.readline():
            method, target, _ = line.decode().split(" ")
            size = 0
            while (header := self.rfile.readline()) != b"\r\n":
                name, _, value = header.decode().partition(":")
                size = int(value) if name.lower() == "content-length" else size
            request = Request(method, target, self.rfile.read(size))
            self.server.requests.append(request)
            answer = self.server.answer(request)
            if answer == HANG:
                self.server.ending.wait()
                return
            self.wfile.write(answer)
            if not answer.startswith(b"HTTP/1.1 "):
                return


@contextmanager
def serving(cache_dir: Path, answer: Answer, socket_path: Path | None = None) -> Iterator[Server]:
    """A server that `daemon.json` names; ending it ends its connections, as a process that dies does."""
    path = socket_path or cache_dir / "socket"
    with Server(path, answer) as server:
        write_daemon_file(cache_dir, {"socket": str(path)})
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()
            thread.join()
            for connection in server.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
    path.unlink()


def write_daemon_file(cache_dir: Path, content: object) -> None:
    (cache_dir / "daemon.json").write_text(json.dumps(content))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(tmp_path: Path, clock: Clock) -> Iterator[DaemonClient]:
    with contextlib.closing(DaemonClient(tmp_path, timeout_s=5.0, clock=clock)) as opened:
        yield opened


def good(request: Request) -> bytes:
    """What the daemon answers."""
    url = urlsplit(request.target)
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    if url.path == "/v1/fetch":
        return http(json.dumps({"errors": ["" for _ in json.loads(request.body)["objects"]]}))
    answers: dict[str, object] = {
        "/v1/status": json.loads(STATUS.to_json()),
        "/v1/stats": {"reads": {"hits": 1}},
        "/v1/manifest": {"digest": "d", "path": f"/manifests/{query.get('data_root')}", "items": 3},
        "/v1/objects": {"objects": [f"{query.get('prefix')}1", f"{query.get('prefix')}2"], "total": 2},
        "/v1/plan": {},
        "/v1/lease": {},
        "/v1/reads": {},
        "/v1/stop": {},
    }
    return http(json.dumps(answers[url.path]))


CALLS: dict[str, Callable[[DaemonClient], object]] = {
    "status": lambda client: client.status(),
    "stats": lambda client: client.stats(),
    "manifest": lambda client: client.manifest("gs://pictures/train"),
    "fetch": lambda client: client.fetch(["gs://pictures/train/images/1.jpg"]),
    "cached_objects": lambda client: client.cached_objects(),
    "report_reads": lambda client: client.report_reads(ReadReport("job", "reporter", 1, 1, 0, 0, 0.0, [])),
    "send_plan": lambda client: client.send_plan(PLAN, pack_indices([1])),
    "stop": lambda client: client.stop(),
}
READING = ("status", "stats", "manifest", "fetch", "cached_objects")


def test_every_request_reaches_the_daemon_and_its_answer_comes_back(tmp_path: Path, client: DaemonClient) -> None:
    report = ReadReport("job", "reporter", 1, 1, 2, 3, 0.5, ["gs://pictures/train/images/1.jpg"])
    with serving(tmp_path, good) as server:
        assert client.status() == STATUS
        assert client.stats() == {"reads": {"hits": 1}}
        assert client.manifest("gs://a-b/ü &?") == ManifestResponse("d", "/manifests/gs://a-b/ü &?", 3)
        assert client.fetch(["gs://pictures/1", "gs://pictures/2"]) == ["", ""]
        assert client.cached_objects("gs://pictures/ü&") == ["gs://pictures/ü&1", "gs://pictures/ü&2"]
        client.report_reads(report)
        client.send_plan(PLAN, pack_indices([1, 2]))
        client.stop()
    *_, reads, planned, stop = server.requests
    assert ReadReport.from_json(reads.body) == report
    assert Plan.from_body(planned.body) == (PLAN, pack_indices([1, 2]))
    assert (stop.method, stop.target) == ("POST", "/v1/stop")
    assert len(server.connections) == 1


def test_making_a_client_opens_nothing(tmp_path: Path) -> None:
    DaemonClient(tmp_path / "nowhere").close()
    with serving(tmp_path, good) as server:
        DaemonClient(tmp_path).close()
    assert server.connections == []


@pytest.mark.parametrize("call", CALLS)
def test_without_a_daemon_every_request_says_so(client: DaemonClient, tmp_path: Path, call: str) -> None:
    with pytest.raises(DaemonUnavailableError, match=r"daemon\.json: No such file") as caught:
        CALLS[call](client)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"socket": 5}', b'{"socket": null}'])
def test_a_daemon_file_that_makes_no_sense_is_named(tmp_path: Path, client: DaemonClient, content: bytes) -> None:
    (tmp_path / "daemon.json").write_bytes(content)
    with pytest.raises(DaemonUnavailableError, match=r"daemon\.json: ") as caught:
        client.status()
    assert "\n" not in str(caught.value)


def test_the_daemon_file_is_read_as_it_is(tmp_path: Path) -> None:
    write_daemon_file(tmp_path, {"pid": 7, "http": "http://127.0.0.1:1"})
    assert read_daemon_file(tmp_path) == {"pid": 7, "http": "http://127.0.0.1:1"}


@pytest.mark.parametrize("left", ["nothing", "a socket without a listener", "a file", "a folder"])
def test_a_daemon_file_that_a_dead_daemon_left_leads_nowhere(tmp_path: Path, client: DaemonClient, left: str) -> None:
    path = tmp_path / "socket"
    write_daemon_file(tmp_path, {"socket": str(path)})
    if left == "a socket without a listener":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif left == "a file":
        path.touch()
    elif left == "a folder":
        path.mkdir()
    with pytest.raises(DaemonUnavailableError, match="daemon of"):
        client.status()


@pytest.mark.parametrize("path", ["", "\0", "/nowhere/" + "x" * 300, "/nowhere/" + "y/" * 100 + "socket", "x" * 5000])
def test_a_socket_path_that_cannot_be_is_no_daemon(tmp_path: Path, client: DaemonClient, path: str) -> None:
    write_daemon_file(tmp_path, {"socket": path})
    with pytest.raises(DaemonUnavailableError):
        client.status()


GARBAGE = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a line without an end": b"x" * 200_000,
    "half a status line": b"HTTP/1.",
    "a status that is no number": b"HTTP/1.0 abc\r\n\r\n",
    "a body cut short": b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{}",
    "chunks of no length": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "too many headers": b"HTTP/1.0 200 OK\r\n" + b"a: b\r\n" * 500 + b"\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_server_that_speaks_no_http_is_no_daemon(tmp_path: Path, client: DaemonClient, garbage: str) -> None:
    with serving(tmp_path, lambda _: GARBAGE[garbage]) as server:
        with pytest.raises(DaemonUnavailableError, match="daemon of"):
            client.status()
        asked = len(server.requests)
        with pytest.raises(DaemonUnavailableError, match="not contacted again yet"):
            client.status()
        assert len(server.requests) == asked


NO_OBJECTS = ["", "no JSON", "[]", "null", "1", "[" * 50_000, "<html>"]
OTHER_OBJECTS = ["{}", '{"errors": 1}', '{"objects": 1}']  # as statistics they would do


@pytest.mark.parametrize(
    ("call", "body"), [(call, body) for call in READING for body in NO_OBJECTS + (OTHER_OBJECTS if call != "stats" else [])]
)
def test_nonsense_in_good_http_is_no_daemon_either(tmp_path: Path, client: DaemonClient, call: str, body: str) -> None:
    """Callers fall back on DaemonUnavailableError alone, and take nothing made up for an answer."""
    with serving(tmp_path, lambda _: http(body)) as server:
        with pytest.raises(DaemonUnavailableError, match="sent an unusable response"):
            CALLS[call](client)
        with pytest.raises(DaemonUnavailableError, match="not contacted again yet"):
            CALLS[call](client)
        assert len(server.requests) == 1


def test_an_answer_for_another_number_of_objects_is_nonsense(tmp_path: Path, client: DaemonClient) -> None:
    with (
        serving(tmp_path, lambda _: http('{"errors": [""]}')),
        pytest.raises(DaemonUnavailableError, match="the response covers 1 of 2 objects"),
    ):
        client.fetch(["gs://pictures/1", "gs://pictures/2"])


@pytest.mark.parametrize("call", CALLS)
def test_what_the_daemon_refuses_is_the_callers_error(tmp_path: Path, client: DaemonClient, call: str) -> None:
    """A bad message says nothing of the daemon's health: the next request is asked at once."""
    with serving(tmp_path, lambda _: http("Plan: field 'digest' is wrong\n", 400)) as server:
        for _ in range(2):
            with pytest.raises(ProtocolError, match=r"^Plan: field 'digest' is wrong$"):
                CALLS[call](client)
        assert (len(server.requests), len(server.connections)) == (2, 1)


@pytest.mark.parametrize("status", [301, 404, 413, 500, 503])
def test_any_other_status_is_named_and_cut(tmp_path: Path, client: DaemonClient, status: int) -> None:
    with (
        serving(tmp_path, lambda _: http("no " * 10_000, status)),
        pytest.raises(DaemonUnavailableError, match=f"GET /v1/status: {status} no no") as caught,
    ):
        client.status()
    assert len(str(caught.value)) < 1000


def test_a_hung_daemon_costs_one_timeout_and_not_one_a_read(tmp_path: Path, clock: Clock) -> None:
    with (
        serving(tmp_path, lambda _: HANG) as server,
        contextlib.closing(DaemonClient(tmp_path, timeout_s=0.2, clock=clock)) as client,
    ):
        with pytest.raises(DaemonUnavailableError, match="TimeoutError"):
            client.status()
        for _ in range(100):
            with pytest.raises(DaemonUnavailableError, match="not contacted again yet"):
                client.status()
        assert len(server.requests) == len(server.connections) == 1


def test_a_daemon_that_still_hangs_when_it_is_asked_again_costs_a_second_more(tmp_path: Path, clock: Clock) -> None:
    """It is asked who it is, and what the caller wants only once it has said so."""
    answers = iter([http("nonsense")])
    with (
        serving(tmp_path, lambda _: next(answers, HANG)) as server,
        contextlib.closing(DaemonClient(tmp_path, timeout_s=60.0, clock=clock)) as client,
    ):
        with pytest.raises(DaemonUnavailableError, match="sent an unusable response"):
            client.stats()
        clock.now_s += FIRST_PAUSE_S
        started_s = time.monotonic()
        with pytest.raises(DaemonUnavailableError, match="TimeoutError"):
            client.stats()
        assert time.monotonic() - started_s < 10
        assert [request.target for request in server.requests] == ["/v1/stats", "/v1/status"]


def test_a_daemon_that_never_accepts_costs_one_timeout(tmp_path: Path, clock: Clock) -> None:
    with (
        socket.socket(socket.AF_UNIX) as listener,
        contextlib.closing(DaemonClient(tmp_path, timeout_s=0.2, clock=clock)) as client,
    ):
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        write_daemon_file(tmp_path, {"socket": str(tmp_path / "socket")})
        for wrong in ("TimeoutError", "not contacted again yet"):
            with pytest.raises(DaemonUnavailableError, match=wrong):
                client.status()


def test_after_the_pause_a_recovered_daemon_is_asked_again(tmp_path: Path, client: DaemonClient, clock: Clock) -> None:
    with pytest.raises(DaemonUnavailableError):
        client.status()
    with serving(tmp_path, good):
        clock.now_s += FIRST_PAUSE_S - 0.01
        with pytest.raises(DaemonUnavailableError, match="not contacted again yet"):
            client.status()
        clock.now_s += 0.02
        assert client.status() == STATUS
        assert client.status() == STATUS


def test_another_daemon_is_asked_without_waiting_for_the_pause(tmp_path: Path, client: DaemonClient) -> None:
    write_daemon_file(tmp_path, {"socket": str(tmp_path / "nobody"), "instance_id": "killed"})
    with pytest.raises(DaemonUnavailableError):
        client.status()
    with serving(tmp_path, good):
        write_daemon_file(tmp_path, {"socket": str(tmp_path / "socket"), "instance_id": "started again"})
        assert client.status() == STATUS


def test_the_pause_doubles_with_every_failure_in_a_row_up_to_a_bound(client: DaemonClient, clock: Clock) -> None:
    failed_s = times_of_failures(client, clock, 12)
    pauses = [after - before for before, after in itertools.pairwise(failed_s)]
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert pauses[-1] == max(pauses) == MAX_PAUSE_S


def test_a_success_makes_the_next_pause_short_again(tmp_path: Path, client: DaemonClient, clock: Clock) -> None:
    times_of_failures(client, clock, 6)
    clock.now_s += MAX_PAUSE_S
    with serving(tmp_path, good):
        client.status()
    client.close()
    first_s, second_s = times_of_failures(client, clock, 2)
    assert second_s - first_s == FIRST_PAUSE_S


def times_of_failures(client: DaemonClient, clock: Clock, count: int) -> list[float]:
    """Ask all the time while the clock goes on; returns when a request was really made, and failed."""
    times: list[float] = []
    while len(times) < count:
        with pytest.raises(DaemonUnavailableError) as caught:
            client.status()
        if "not contacted again yet" not in str(caught.value):
            times.append(clock.now_s)
        clock.now_s += FIRST_PAUSE_S / 2
    return times


@pytest.mark.parametrize("call", CALLS)
def test_a_kept_connection_survives_the_daemons_restart(tmp_path: Path, client: DaemonClient, call: str) -> None:
    """Not even one read falls back for it."""
    with serving(tmp_path, good) as first:
        client.status()
    with serving(tmp_path, good) as second:
        CALLS[call](client)
    assert len(first.connections) == 1
    assert len(second.requests) == len(second.connections) == 1


def test_a_restarted_daemon_is_found_at_its_new_socket(tmp_path: Path, client: DaemonClient) -> None:
    with serving(tmp_path, good):
        client.status()
    with serving(tmp_path, good, tmp_path / "another") as second:
        assert client.status() == STATUS
        assert len(second.requests) == 1


def test_a_daemon_that_hangs_up_on_every_request_is_asked_twice_at_most(tmp_path: Path, client: DaemonClient) -> None:
    with serving(tmp_path, lambda request: good(request) if request.target == "/v1/stats" else b"") as server:
        client.stats()
        with pytest.raises(DaemonUnavailableError):
            client.status()
        assert len(server.requests) == 3


def test_after_close_the_next_request_opens_another_connection(tmp_path: Path, client: DaemonClient) -> None:
    with serving(tmp_path, good) as server:
        client.status()
        client.close()
        client.close()
        client.status()
        assert len(server.connections) == 2


def test_threads_that_share_a_client_each_get_their_own_answer(tmp_path: Path, client: DaemonClient) -> None:
    mixed_up: list[str] = []

    def ask(thread: int) -> None:
        for i in range(25):
            root = f"gs://pictures/{thread}/{i}"
            if client.manifest(root).path != f"/manifests/{root}":
                mixed_up.append(root)

    with serving(tmp_path, good) as server:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(server.requests), len(server.connections)) == (200, 1)
    assert mixed_up == []


# --- Leases


def test_a_lease_is_held_on_a_connection_of_its_own_until_it_is_closed(tmp_path: Path, client: DaemonClient) -> None:
    with serving(tmp_path, good) as server:
        lease = client.lease("job & more")
        assert client.status() == STATUS
        assert lease.is_held
        assert "/v1/lease?job=job+%26+more" in [request.target for request in server.requests]
        assert len(server.connections) == 2
        lease.close()
        lease.close()
        assert server.gone.acquire(timeout=10)
        assert not lease.is_held


def test_a_lease_that_nobody_holds_any_more_is_given_back(tmp_path: Path, client: DaemonClient) -> None:
    with serving(tmp_path, good) as server:
        lease = client.lease("job")
        del lease
        gc.collect()
        assert server.gone.acquire(timeout=10)


@pytest.mark.parametrize("answer", [good, lambda _: HANG], ids=["answers", "keeps silent"])
def test_a_lease_ends_with_its_daemon(tmp_path: Path, client: DaemonClient, answer: Answer) -> None:
    with serving(tmp_path, answer) as server:
        lease = client.lease("job")
        while not server.requests:
            assert lease.is_held
        assert lease.is_held
    assert not lease.is_held
    lease.close()


@pytest.mark.parametrize("content", [None, b"{}", b'{"socket": "/nowhere/socket"}', b'{"socket": "\\u0000"}'])
def test_without_a_daemon_there_is_no_lease(tmp_path: Path, client: DaemonClient, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "daemon.json").write_bytes(content)
    with pytest.raises(DaemonUnavailableError):
        client.lease("job")


HOLD_A_LEASE_AND_FORK = """
import os, signal, sys
from pathlib import Path
from gcs_prefetchd.shared.daemon_client import DaemonClient
lease = DaemonClient(Path(sys.argv[1])).lease("job")
if os.fork() == 0:
    print(os.getpid(), lease.is_held, flush=True)
signal.pause()
"""


def test_a_killed_process_gives_its_lease_back_although_its_workers_live(tmp_path: Path) -> None:
    with serving(tmp_path, good) as server:
        command = [sys.executable, "-c", HOLD_A_LEASE_AND_FORK, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            worker, is_held = process.stdout.readline().split()
            assert is_held == "False"
            assert not server.gone.acquire(blocking=False)  # the worker's copy was only a copy
            process.kill()
            assert server.gone.acquire(timeout=10)
            os.kill(int(worker), signal.SIGKILL)


@pytest.mark.parametrize("depth", [1, 4, 14])
def test_a_cache_directory_may_lie_deeper_than_a_sockets_address_can_tell(tmp_path: Path, clock: Clock, depth: int) -> None:
    folder = tmp_path.joinpath(*["d" * 100] * depth)
    folder.mkdir(parents=True)
    with serving(folder, good), contextlib.closing(DaemonClient(folder, clock=clock)) as client:
        assert client.status() == STATUS


@pytest.mark.parametrize("size", [1, 106, 107])
def test_an_address_that_fits_is_used_as_it_is(size: int) -> None:
    path = Path("/" + "x" * (size - 1))
    with short_address(path) as address:
        assert address == str(path)


def test_an_address_that_does_not_fit_is_shortened(tmp_path: Path) -> None:
    folder = tmp_path / ("ü" * 60)
    folder.mkdir()
    with short_address(folder / "socket") as address:
        assert len(address) <= 107
        assert Path(address).parent.samefile(folder)
    assert not Path(address).parent.exists()
