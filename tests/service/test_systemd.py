"""systemd's notify protocol, over real datagram sockets."""

import asyncio
import os
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from gcs_prefetchd.service.systemd import notify_systemd, ping_watchdog


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket on which systemd would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(10)
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_a_state_arrives_as_one_datagram(supervisor: socket.socket) -> None:
    notify_systemd("READY=1")
    notify_systemd("STOPPING=1\nSTATUS=ünder way")
    assert supervisor.recv(100) == b"READY=1"
    assert supervisor.recv(100) == "STOPPING=1\nSTATUS=ünder way".encode()


def test_an_abstract_address_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"gcs-prefetchd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(10)
        listener.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify_systemd("READY=1")
        assert listener.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "@nobody-listens-here", "/dev/null", "vsock:2:1", "/" + "x" * 200])
def test_without_a_listener_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    before = len(list(Path("/proc/self/fd").iterdir()))
    notify_systemd("READY=1")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_without_a_socket_in_the_environment_nothing_happens(
    supervisor: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify_systemd("READY=1")
    supervisor.setblocking(False)
    with pytest.raises(BlockingIOError):
        supervisor.recv(100)


@pytest.mark.parametrize("names_this_process", [True, False])
async def test_the_watchdog_is_pinged_at_twice_the_required_rate(
    supervisor: socket.socket, monkeypatch: pytest.MonkeyPatch, names_this_process: bool
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    if not names_this_process:
        monkeypatch.delenv("WATCHDOG_PID")
    supervisor.setblocking(False)
    loop = asyncio.get_running_loop()
    pinging = asyncio.create_task(ping_watchdog())
    arrived_s = []
    for _ in range(5):
        assert await asyncio.wait_for(loop.sock_recv(supervisor, 100), 10) == b"WATCHDOG=1"
        arrived_s.append(loop.time())
    pinging.cancel()
    await asyncio.gather(pinging, return_exceptions=True)
    shortest_s = min(after - before for before, after in pairwise(arrived_s))
    assert 0.08 < shortest_s < 0.19


@pytest.mark.parametrize(
    ("timeout_us", "pid"),
    [("", None), ("0", None), ("-5", None), ("soon", None), ("\u00b2", None), ("200000", "1"), ("200000", "")],
)
async def test_a_watchdog_that_requires_no_ping_of_this_process_gets_none(
    supervisor: socket.socket, monkeypatch: pytest.MonkeyPatch, timeout_us: str, pid: str | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", timeout_us)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    await asyncio.wait_for(ping_watchdog(), 10)
    supervisor.setblocking(False)
    with pytest.raises(BlockingIOError):
        supervisor.recv(100)
