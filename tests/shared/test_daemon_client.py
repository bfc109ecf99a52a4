"""The readers' client, against real servers on real Unix sockets: healthy, absent and faulty ones."""

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
HANG = b"hang"  # instead of a response: send none


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    body: bytes


Respond = Callable[[Request], bytes]


def http(body: str | bytes, status: int = 200) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    return f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Sends `respond(request)` to each request, and records requests and connections."""

    daemon_threads = True

    def __init__(self, path: Path, respond: Respond) -> None:
        self.respond = respond
        self.requests: list[Request] = []
        self.connections: list[socket.socket] = []
        self.ending = threading.Event()
        self.gone = threading.Semaphore(0)  # released for each connection that the client closed
        with short_address(path) as address:
            super().__init__(address, Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is not an error."""


class Connection(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        try:
            self._serve()
        finally:  # a client that leaves a response unread resets the connection
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
            response = self.server.respond(request)
            if response == HANG:
                self.server.ending.wait()
                return
            self.wfile.write(response)
            if not response.startswith(b"HTTP/1.1 "):
                return


@contextmanager
def serving(cache_dir: Path, respond: Respond, socket_path: Path | None = None) -> Iterator[Server]:
    """A server named by `daemon.json`. Leaving the context closes its connections, as a dying process does."""
    path = socket_path or cache_dir / "socket"
    with Server(path, respond) as server:
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
    """The response of a healthy daemon."""
    url = urlsplit(request.target)
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    if url.path == "/v1/fetch":
        return http(json.dumps({"errors": ["" for _ in json.loads(request.body)["objects"]]}))
    responses: dict[str, object] = {
        "/v1/status": json.loads(STATUS.to_json()),
        "/v1/stats": {"reads": {"hits": 1}},
        "/v1/manifest": {"digest": "d", "path": f"/manifests/{query.get('data_root')}", "items": 3},
        "/v1/objects": {"objects": [f"{query.get('prefix')}1", f"{query.get('prefix')}2"], "total": 2},
        "/v1/plan": {},
        "/v1/lease": {},
        "/v1/reads": {},
        "/v1/stop": {},
    }
    return http(json.dumps(responses[url.path]))


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


def test_every_request_reaches_the_daemon_and_returns_its_response(tmp_path: Path, client: DaemonClient) -> None:
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


def test_creating_a_client_opens_nothing(tmp_path: Path) -> None:
    DaemonClient(tmp_path / "nowhere").close()
    with serving(tmp_path, good) as server:
        DaemonClient(tmp_path).close()
    assert server.connections == []


@pytest.mark.parametrize("call", CALLS)
def test_without_a_daemon_every_request_raises_an_error(client: DaemonClient, tmp_path: Path, call: str) -> None:
    with pytest.raises(DaemonUnavailableError, match=r"daemon\.json: No such file") as caught:
        CALLS[call](client)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"socket": 5}', b'{"socket": null}'])
def test_an_invalid_daemon_file_is_named(tmp_path: Path, client: DaemonClient, content: bytes) -> None:
    (tmp_path / "daemon.json").write_bytes(content)
    with pytest.raises(DaemonUnavailableError, match=r"daemon\.json: ") as caught:
        client.status()
    assert "\n" not in str(caught.value)


def test_the_daemon_file_is_returned_unchanged(tmp_path: Path) -> None:
    write_daemon_file(tmp_path, {"pid": 7, "http": "http://127.0.0.1:1"})
    assert read_daemon_file(tmp_path) == {"pid": 7, "http": "http://127.0.0.1:1"}


@pytest.mark.parametrize("left", ["nothing", "a socket without a listener", "a file", "a folder"])
def test_a_daemon_file_left_by_a_dead_daemon_is_an_error(tmp_path: Path, client: DaemonClient, left: str) -> None:
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
def test_an_impossible_socket_path_is_an_error(tmp_path: Path, client: DaemonClient, path: str) -> None:
    write_daemon_file(tmp_path, {"socket": path})
    with pytest.raises(DaemonUnavailableError):
        client.status()


GARBAGE = {
    "nothing": b"",
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a line without an end": b"x" * 200_000,
    "half a status line": b"HTTP/1.",
    "a status that is not a number": b"HTTP/1.0 abc\r\n\r\n",
    "a body cut short": b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{}",
    "chunks of no length": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "too many headers": b"HTTP/1.0 200 OK\r\n" + b"a: b\r\n" * 500 + b"\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_server_without_http_is_not_a_daemon(tmp_path: Path, client: DaemonClient, garbage: str) -> None:
    with serving(tmp_path, lambda _: GARBAGE[garbage]) as server:
        with pytest.raises(DaemonUnavailableError, match="daemon of"):
            client.status()
        sent = len(server.requests)
        with pytest.raises(DaemonUnavailableError, match="not contacted again yet"):
            client.status()
        assert len(server.requests) == sent


NO_OBJECTS = ["", "no JSON", "[]", "null", "1", "[" * 50_000, "<html>"]
OTHER_OBJECTS = ["{}", '{"errors": 1}', '{"objects": 1}']  # valid as statistics


@pytest.mark.parametrize(
    ("call", "body"), [(call, body) for call in READING for body in NO_OBJECTS + (OTHER_OBJECTS if call != "stats" else [])]
)
def test_an_unusable_http_response_is_not_from_a_daemon(tmp_path: Path, client: DaemonClient, call: str, body: str) -> None:
    """Callers fall back after DaemonUnavailableError only, and never get a made-up response."""
    with serving(tmp_path, lambda _: http(body)) as server:
        with pytest.raises(DaemonUnavailableError, match="sent an unusable response"):
            CALLS[call](client)
        with pytest.raises(DaemonUnavailableError, match="not contacted again yet"):
            CALLS[call](client)
        assert len(server.requests) == 1


def test_a_response_for_another_number_of_objects_is_unusable(tmp_path: Path, client: DaemonClient) -> None:
    with (
        serving(tmp_path, lambda _: http('{"errors": [""]}')),
        pytest.raises(DaemonUnavailableError, match="the response covers 1 of 2 objects"),
    ):
        client.fetch(["gs://pictures/1", "gs://pictures/2"])


@pytest.mark.parametrize("call", CALLS)
def test_a_request_that_the_daemon_refuses_is_the_callers_error(tmp_path: Path, client: DaemonClient, call: str) -> None:
    """A refused message does not mean that the daemon is unhealthy: the next request is sent at once."""
    with serving(tmp_path, lambda _: http("Plan: field 'digest' is wrong\n", 400)) as server:
        for _ in range(2):
            with pytest.raises(ProtocolError, match=r"^Plan: field 'digest' is wrong$"):
                CALLS[call](client)
        assert (len(server.requests), len(server.connections)) == (2, 1)


@pytest.mark.parametrize("status", [301, 404, 413, 500, 503])
def test_any_other_status_is_named_with_a_short_text(tmp_path: Path, client: DaemonClient, status: int) -> None:
    with (
        serving(tmp_path, lambda _: http("no " * 10_000, status)),
        pytest.raises(DaemonUnavailableError, match=f"GET /v1/status: {status} no no") as caught,
    ):
        client.status()
    assert len(str(caught.value)) < 1000


def test_a_hung_daemon_costs_one_timeout_and_not_one_for_each_read(tmp_path: Path, clock: Clock) -> None:
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


def test_a_daemon_that_still_hangs_after_the_pause_costs_one_more_second(tmp_path: Path, clock: Clock) -> None:
    """The client requests its status first, and sends the caller's request only after a response."""
    responses = iter([http("nonsense")])
    with (
        serving(tmp_path, lambda _: next(responses, HANG)) as server,
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


def test_after_the_pause_a_recovered_daemon_is_used_again(tmp_path: Path, client: DaemonClient, clock: Clock) -> None:
    with pytest.raises(DaemonUnavailableError):
        client.status()
    with serving(tmp_path, good):
        clock.now_s += FIRST_PAUSE_S - 0.01
        with pytest.raises(DaemonUnavailableError, match="not contacted again yet"):
            client.status()
        clock.now_s += 0.02
        assert client.status() == STATUS
        assert client.status() == STATUS


def test_another_daemon_is_contacted_without_a_pause(tmp_path: Path, client: DaemonClient) -> None:
    write_daemon_file(tmp_path, {"socket": str(tmp_path / "nobody"), "instance_id": "killed"})
    with pytest.raises(DaemonUnavailableError):
        client.status()
    with serving(tmp_path, good):
        write_daemon_file(tmp_path, {"socket": str(tmp_path / "socket"), "instance_id": "started again"})
        assert client.status() == STATUS


def test_the_pause_doubles_with_consecutive_failures_up_to_a_bound(client: DaemonClient, clock: Clock) -> None:
    failed_s = times_of_failures(client, clock, 12)
    pauses = [after - before for before, after in itertools.pairwise(failed_s)]
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert pauses[-1] == max(pauses) == MAX_PAUSE_S


def test_a_success_resets_the_pause(tmp_path: Path, client: DaemonClient, clock: Clock) -> None:
    times_of_failures(client, clock, 6)
    clock.now_s += MAX_PAUSE_S
    with serving(tmp_path, good):
        client.status()
    client.close()
    first_s, second_s = times_of_failures(client, clock, 2)
    assert second_s - first_s == FIRST_PAUSE_S


def times_of_failures(client: DaemonClient, clock: Clock, count: int) -> list[float]:
    """Send requests while the clock advances. Returns the times at which a request was really sent and failed."""
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
    """Not even one read falls back because of it."""
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


def test_a_daemon_that_closes_on_every_request_gets_two_attempts_at_most(tmp_path: Path, client: DaemonClient) -> None:
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


def test_threads_that_share_a_client_each_get_their_own_response(tmp_path: Path, client: DaemonClient) -> None:
    mixed_up: list[str] = []

    def send(thread: int) -> None:
        for i in range(25):
            root = f"gs://pictures/{thread}/{i}"
            if client.manifest(root).path != f"/manifests/{root}":
                mixed_up.append(root)

    with serving(tmp_path, good) as server:
        threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(server.requests), len(server.connections)) == (200, 1)
    assert mixed_up == []


# --- Leases


def test_a_lease_holds_a_connection_of_its_own_until_it_is_closed(tmp_path: Path, client: DaemonClient) -> None:
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


def test_an_unreferenced_lease_ends(tmp_path: Path, client: DaemonClient) -> None:
    with serving(tmp_path, good) as server:
        lease = client.lease("job")
        del lease
        gc.collect()
        assert server.gone.acquire(timeout=10)


@pytest.mark.parametrize("respond", [good, lambda _: HANG], ids=["responds", "is silent"])
def test_a_lease_ends_with_its_daemon(tmp_path: Path, client: DaemonClient, respond: Respond) -> None:
    with serving(tmp_path, respond) as server:
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


def test_a_killed_process_ends_its_lease_although_its_workers_live(tmp_path: Path) -> None:
    with serving(tmp_path, good) as server:
        command = [sys.executable, "-c", HOLD_A_LEASE_AND_FORK, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            worker, is_held = process.stdout.readline().split()
            assert is_held == "False"
            assert not server.gone.acquire(blocking=False)  # closing the worker's copy has no effect
            process.kill()
            assert server.gone.acquire(timeout=10)
            os.kill(int(worker), signal.SIGKILL)


@pytest.mark.parametrize("depth", [1, 4, 14])
def test_a_cache_directory_may_be_deeper_than_a_socket_address_can_hold(tmp_path: Path, clock: Clock, depth: int) -> None:
    folder = tmp_path.joinpath(*["d" * 100] * depth)
    folder.mkdir(parents=True)
    with serving(folder, good), contextlib.closing(DaemonClient(folder, clock=clock)) as client:
        assert client.status() == STATUS


@pytest.mark.parametrize("size", [1, 106, 107])
def test_an_address_that_fits_is_unchanged(size: int) -> None:
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
