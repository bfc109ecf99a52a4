"""A reader whose daemon misbehaves: no response makes it return a wrong byte or costs it more than one timeout."""

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from gcs_dataset import CachedLoader
from gcs_dataset.gcs_loader import GCSLoader
from gcs_prefetchd.shared.daemon_client import MAX_RESPONSE_BYTES, DaemonClient
from gcs_prefetchd.shared.errors import DaemonUnavailableError
from gcs_prefetchd.testing import Kind, ServingGCS
from support.daemons import BUCKET, DATA_ROOT, put_items
from support.datasets import ROOT, fill, gcs, number_of
from support.faults import faulted_daemon, promises, wait_for
from support.training import Run

ITEMS = 8
TIMEOUT_S = 0.5
SLOW_MACHINE_S = 2.0
DRIPPED_BYTES = 1500  # a byte each 20 ms: half a minute
OK = b"HTTP/1.1 200 OK\r\n"

Responder = Callable[[Callable[[bytes], None], threading.Event], None]
"""Sends any bytes with the first argument; the second is set when the test is over."""


def hang(send: Callable[[bytes], None], over: threading.Event) -> None:
    over.wait()


def drip(data: bytes) -> Responder:
    def respond(send: Callable[[bytes], None], over: threading.Event) -> None:
        for byte in itertools.islice(itertools.cycle(data), DRIPPED_BYTES):
            send(bytes([byte]))
            if over.wait(0.02):
                return

    return respond


def once(data: bytes) -> Responder:
    return lambda send, over: send(data)


def without_end(head: bytes, again: bytes) -> Responder:
    def respond(send: Callable[[bytes], None], over: threading.Event) -> None:
        send(head)
        while not over.is_set():
            send(again)

    return respond


MEGABYTE = b"x" * 1_000_000
ENDLESS = {
    "an endless response": without_end(b"HTTP/1.0 200 OK\r\n\r\n", MEGABYTE),
    "an endless response in chunks": without_end(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"f4240\r\n" + MEGABYTE + b"\r\n"),
    "a terabyte": without_end(OK + b"Content-Length: 1000000000000\r\n\r\n", MEGABYTE),
    "endless headers": without_end(OK, b"a: b\r\n"),
    "a header without an end": without_end(OK + b"a: ", MEGABYTE),
    "endless 100 Continue": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}
WRONG: dict[str, Responder] = {
    "nothing, forever": hang,
    "a byte now and then": drip(OK + b"Content-Length: 100000\r\n\r\n" + b"x" * DRIPPED_BYTES),
    "headers a byte at a time": drip(OK + b"a: b\r\n" * DRIPPED_BYTES),
    "garbage": once(b"\x16\x03\x01\x02\x00garbage\r\n\r\n"),
    "half a response": once(OK + b'Content-Length: 100\r\n\r\n{"errors": [""'),
    "a false report": once(OK + b'Content-Length: 16\r\n\r\n{"errors": [""]}'),
    "a hangup": once(b""),
    **ENDLESS,
}


@contextmanager
def impostor(cache_dir: Path, responder: Responder) -> Iterator[None]:
    """A server in the daemon's place: `daemon.json` names its socket."""
    over = threading.Event()
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen(100)
        cache_dir.mkdir(exist_ok=True)
        (cache_dir / "daemon.json").write_text(json.dumps({"socket": f"{folder}/s", "instance_id": "impostor"}))
        acceptor = threading.Thread(target=_accept, args=(listener, responder, over))
        acceptor.start()
        try:
            yield
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()


def _accept(listener: socket.socket, responder: Responder, over: threading.Event) -> None:
    served: list[tuple[socket.socket, threading.Thread]] = []
    with contextlib.suppress(OSError):  # the listener is shut down at the end
        while True:
            connection, _ = listener.accept()
            thread = threading.Thread(target=_serve, args=(connection, responder, over))
            served.append((connection, thread))
            thread.start()
    for connection, thread in served:
        with contextlib.suppress(OSError):  # most have hung up
            connection.shutdown(socket.SHUT_RDWR)
        thread.join()
        connection.close()


def _serve(connection: socket.socket, responder: Responder, over: threading.Event) -> None:
    with contextlib.suppress(OSError):  # the client may hang up
        if connection.recv(1 << 16):
            responder(connection.sendall, over)
        connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingGCS]:
    with gcs(monkeypatch) as server:
        fill(server, ITEMS)
        yield server


@pytest.mark.parametrize("behaviour", WRONG)
def test_whatever_the_daemon_returns_it_costs_one_timeout_and_no_wrong_byte(
    server: ServingGCS, tmp_path: Path, behaviour: str
) -> None:
    loader = CachedLoader(tmp_path, demand_timeout_s=TIMEOUT_S, fallback=GCSLoader(deadline_s=5))
    with closing(loader), impostor(tmp_path, WRONG[behaviour]):
        started_s = time.monotonic()
        for number in range(ITEMS):
            assert number_of(loader(f"{ROOT}/images/{number:04d}.jpg")) == number
        assert time.monotonic() - started_s < TIMEOUT_S + SLOW_MACHINE_S
    assert server.counts.total(Kind.MEDIA) == ITEMS


@pytest.mark.parametrize("behaviour", ENDLESS)
def test_an_endless_response_uses_bounded_memory(tmp_path: Path, behaviour: str) -> None:
    with impostor(tmp_path, ENDLESS[behaviour]), closing(DaemonClient(tmp_path, timeout_s=2.0)) as client:
        tracemalloc.start()
        try:
            with pytest.raises(DaemonUnavailableError):
                client.fetch(["gs://pictures/1"])
            assert tracemalloc.get_traced_memory()[1] < 3 * MAX_RESPONSE_BYTES
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("behaviour", ["nothing, forever", "a byte now and then", "half a response", "an endless response"])
def test_an_epoch_is_the_same_whatever_the_daemon_returns(server: ServingGCS, tmp_path: Path, behaviour: str) -> None:
    objects = put_items(server, 24)
    run = Run(objects, tmp_path, workers=2, demand_timeout_s=TIMEOUT_S)
    with impostor(tmp_path, WRONG[behaviour]):
        started_s = time.monotonic()
        assert len(list(run.batches(0))) == len(run.loaders["train"])
        assert time.monotonic() - started_s < 20


def test_an_epoch_is_the_same_while_the_daemon_is_suspended(server: ServingGCS, tmp_path: Path) -> None:
    objects = put_items(server, 40)
    with faulted_daemon(tmp_path / "cache", server.url, ["--set", "window_items=4"]) as daemon:
        run = Run(objects, tmp_path / "cache", workers=2, demand_timeout_s=TIMEOUT_S)
        for number in run.batches(0):
            if number == 1:
                os.kill(daemon.pid, signal.SIGSTOP)
            if number == 5:
                os.kill(daemon.pid, signal.SIGCONT)
        assert number == len(run.loaders["train"]) - 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create 32 worker processes")
def test_32_workers_at_once_read_an_epoch_with_one_get_an_object(server: ServingGCS, tmp_path: Path) -> None:
    objects = put_items(server, 150)
    with faulted_daemon(tmp_path / "cache", server.url) as daemon:
        run = Run(objects, tmp_path / "cache", workers=32)
        assert len(list(run.batches(0))) == len(run.loaders["train"])
        assert max(server.counts.media[uri.removeprefix("gs://")] for uri in objects) == 1
        wait_for(lambda: sum(daemon.stats()["reads"][way] for way in ("hits", "misses")) == 2 * len(run.order(0)))
        assert daemon.stats()["reads"]["fallbacks"] == 0


TRAIN = """
import multiprocessing, sys
from gcs_dataset import get_cached_dataloaders
loaders = get_cached_dataloaders(sys.argv[1], sys.argv[2], 4, num_workers=8)
batches = iter(loaders["train"])
next(batches)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
sys.stdin.read()
"""


def test_a_job_killed_in_the_middle_of_an_epoch_leaves_nothing_behind(server: ServingGCS, tmp_path: Path) -> None:
    """It holds a lease, and its workers stay alive for seconds."""
    objects = put_items(server, 60)
    server.put(BUCKET, "train/good", b"good")
    with faulted_daemon(tmp_path / "cache", server.url) as daemon:
        with promises(daemon, f"gs://{BUCKET}/train/good", b"good"):
            command = [sys.executable, "-c", TRAIN, DATA_ROOT, str(daemon.cache_dir)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
                assert job.stdout is not None
                workers = [os.pidfd_open(int(pid)) for pid in job.stdout.readline().split()]
                assert len(workers) == 8
                assert daemon.client.status().streams
                job.kill()
            wait_for(lambda: not daemon.client.status().streams)
            for worker in workers:
                assert select.select([worker], [], [], 30)[0]
                os.close(worker)
        assert len(list(Run(objects, daemon.cache_dir, workers=2).batches(0))) > 0
