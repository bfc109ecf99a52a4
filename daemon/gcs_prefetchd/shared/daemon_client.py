"""A small blocking client of the daemon's Unix socket. Standard library only: training workers load it."""

import http.client
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from gcs_prefetchd.shared.errors import DaemonUnavailableError, PrefetchdError, ProtocolError
from gcs_prefetchd.shared.messages import FetchRequest, FetchResponse, ManifestResponse, Plan, ReadReport, Status

__all__ = ["DaemonClient", "Lease", "read_daemon_file", "short_address"]

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
TRIAL_TIMEOUT_S = 1.0  # a daemon that is well says in a millisecond who it is
LARGEST_ANSWER_BYTES = 64 << 20  # 10,000 of the longest names, and why each could not be fetched

T = TypeVar("T")


def read_daemon_file(cache_dir: Path) -> dict[str, object]:
    """What `daemon.json` in the cache directory says; raises DaemonUnavailableError where there is none."""
    path = cache_dir / "daemon.json"
    try:
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise DaemonUnavailableError(f"{path}: {exc.strerror}; is a daemon running for this directory?") from exc
    except (ValueError, RecursionError) as exc:
        raise DaemonUnavailableError(f"{path}: not JSON") from exc
    if not isinstance(content, dict):
        raise DaemonUnavailableError(f"{path}: not a JSON object")
    return content


class DaemonClient:
    """Speaks to the daemon of one cache directory. Threads may share it: their requests take turns.

    Nothing is opened before the first request. Every method raises DaemonUnavailableError when the daemon is absent, answers
    nonsense, or has not answered in full within `timeout_s`, however busily it sends. After such a failure the next ones
    raise it at once, for a pause that doubles with every failure in a row; then the daemon must first say within a second
    who it is. So a hung daemon costs its readers one timeout and not one a read. Another daemon is asked at once. The
    caller closes it.
    """

    def __init__(self, cache_dir: Path, timeout_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.cache_dir = cache_dir
        self.timeout_s = timeout_s
        self._clock = clock
        self._connection: _UnixConnection | None = None
        self._lock = threading.Lock()
        self._failures = 0
        self._paused_until_s = 0.0
        self._failed_instance: object = None

    def status(self) -> Status:
        """Who the daemon is."""
        return self._read(Status.from_json, "GET", "/v1/status")

    def stats(self) -> dict[str, Any]:
        """What `/stats` answers."""
        return self._read(_json_object, "GET", "/v1/stats")

    def manifest(self, data_root: str) -> ManifestResponse:
        """Where the data root's manifest lies; waits for the first listing."""
        return self._read(ManifestResponse.from_json, "GET", f"/v1/manifest?{urlencode({'data_root': data_root})}")

    def fetch(self, uris: list[str]) -> list[str]:
        """Have the objects brought into the cache now. For each the empty string, or why it is not there."""

        def errors(answer: bytes) -> list[str]:
            errors = FetchResponse.from_json(answer).errors
            if len(errors) != len(uris):
                raise ProtocolError(f"the response covers {len(errors)} of {len(uris)} objects")
            return errors

        return self._read(errors, "POST", "/v1/fetch", FetchRequest(uris).to_json().encode())

    def report_reads(self, report: ReadReport) -> None:
        """Tell what was read."""
        self._ask("POST", "/v1/reads", report.to_json().encode())

    def send_plan(self, plan: Plan, packed: bytes) -> None:
        """Tell what will be read; raises ProtocolError where the daemon refuses the plan."""
        self._ask("POST", "/v1/plan", plan.to_body(packed))

    def lease(self, job: str) -> "Lease":
        """Keep the job's streams alive: the daemon ends them when the lease is closed or this process dies.

        A connection of its own, so it holds up nothing else. The caller closes it.
        """
        connection = _UnixConnection(self._socket_path())
        connection.wait_until(time.monotonic() + self.timeout_s)
        try:
            connection.request("GET", f"/v1/lease?{urlencode({'job': job})}")
        except (OSError, ValueError, http.client.HTTPException) as exc:
            connection.close()
            raise DaemonUnavailableError(f"daemon of {self.cache_dir}: {type(exc).__name__}: {exc}") from exc
        assert connection.sock is not None, "it has been connected"
        return Lease(connection.sock)

    def cached_objects(self, prefix: str = "") -> list[str]:
        """The URIs of the objects in the cache that start with `prefix`."""

        def uris(answer: bytes) -> list[str]:
            return [str(uri) for uri in _json_object(answer)["objects"]]

        return self._read(uris, "GET", f"/v1/objects?{urlencode({'prefix': prefix})}")

    def settings(self) -> dict[str, Any]:
        """The settings that can be changed while the daemon runs, by name; None for none."""
        return self._read(_json_object, "GET", "/v1/settings")

    def change_settings(self, changes: Mapping[str, object]) -> dict[str, Any]:
        """Change some of them until the daemon ends, and return all; raises ProtocolError where one is refused."""
        return self._read(_json_object, "PATCH", "/v1/settings", json.dumps(dict(changes)).encode())

    def stop(self) -> None:
        """Ask the daemon to end; returns when it has begun to."""
        self._ask("POST", "/v1/stop")

    def close(self) -> None:
        """Close the connection; a later request opens another."""
        with self._lock:
            self._disconnect()

    def _read(self, parse: Callable[[bytes], T], method: str, target: str, body: bytes | None = None) -> T:
        answer = self._ask(method, target, body)
        try:
            return parse(answer)
        except (ProtocolError, ValueError, TypeError, KeyError, RecursionError) as exc:
            with self._lock:
                self._pause()
            raise DaemonUnavailableError(f"daemon of {self.cache_dir}: {target}: sent an unusable response ({exc})") from exc

    def _ask(self, method: str, target: str, body: bytes | None = None) -> bytes:
        with self._lock:
            if self._clock() < self._paused_until_s and self._instance_id() == self._failed_instance:
                raise DaemonUnavailableError(f"daemon of {self.cache_dir}: failed a moment ago, not contacted again yet")
            until_s = time.monotonic() + self.timeout_s
            try:
                if self._failures:
                    self._exchange("GET", "/v1/status", None, min(until_s, time.monotonic() + TRIAL_TIMEOUT_S))
                status, answer = self._exchange(method, target, body, until_s)
            except (OSError, ValueError, http.client.HTTPException) as exc:
                self._pause()
                raise DaemonUnavailableError(f"daemon of {self.cache_dir}: {type(exc).__name__}: {exc}") from exc
            except PrefetchdError:
                self._pause()
                raise
            self._failures = 0
        if status == 200:
            return answer
        text = answer.decode(errors="replace").strip()[:500]
        if status == 400:
            raise ProtocolError(text)
        raise DaemonUnavailableError(f"daemon of {self.cache_dir}: {method} {target}: {status} {text}")

    def _exchange(self, method: str, target: str, body: bytes | None, until_s: float) -> tuple[int, bytes]:
        reused = self._connection is not None
        try:
            return self._try(method, target, body, until_s)
        except (ConnectionError, http.client.BadStatusLine):
            # A kept connection ends when the daemon restarts: one more try, on a new one to whoever is there now.
            self._disconnect()
            if not reused:
                raise
            return self._try(method, target, body, until_s)

    def _try(self, method: str, target: str, body: bytes | None, until_s: float) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = _UnixConnection(self._socket_path())
        self._connection.wait_until(until_s)
        self._connection.request(method, target, body)
        with self._connection.getresponse() as response:
            return response.status, _whole(response)

    def _socket_path(self) -> str:
        path = read_daemon_file(self.cache_dir).get("socket")
        if not isinstance(path, str):
            raise DaemonUnavailableError(f"{self.cache_dir / 'daemon.json'}: contains no socket")
        return path

    def _instance_id(self) -> object:
        try:
            return read_daemon_file(self.cache_dir).get("instance_id")
        except DaemonUnavailableError:
            return None

    def _pause(self) -> None:
        self._failed_instance = self._instance_id()
        self._disconnect()
        self._paused_until_s = self._clock() + min(FIRST_PAUSE_S * 2**self._failures, LONGEST_PAUSE_S)
        self._failures = min(self._failures + 1, 16)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Lease:
    """An open connection that stands for this process; the kernel closes it when the process dies, however it does.

    A forked child closes its copy at once, or the parent's lease would last as long as its workers.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self.close = weakref.finalize(self, connection.close)
        """Give it back; called when nobody holds the lease any more, too."""
        _leases.add(self)

    @property
    def is_held(self) -> bool:
        """Whether the daemon still holds the other end: False once it is gone, or this end was closed."""
        try:
            while self._connection.recv(4096):  # whatever the daemon says there means that it is there
                pass
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


_leases: "weakref.WeakSet[Lease]" = weakref.WeakSet()


def _after_fork() -> None:
    for lease in list(_leases):
        lease.close()


os.register_at_fork(after_in_child=_after_fork)


def _json_object(answer: bytes) -> dict[str, Any]:
    content = json.loads(answer)
    if not isinstance(content, dict):
        raise TypeError("not a JSON object")
    return content


@contextmanager
def short_address(socket_path: Path) -> Iterator[str]:
    """An address of the socket that fits the kernel's 107 bytes, however deep the cache directory lies."""
    if len(os.fsencode(socket_path)) <= 107:
        yield str(socket_path)
        return
    folder = os.open(socket_path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{socket_path.name}"
    finally:
        os.close(folder)


def _whole(response: http.client.HTTPResponse) -> bytes:
    """The answer's body, unless it is larger than any answer of a daemon."""
    if response.length is not None and response.length <= LARGEST_ANSWER_BYTES:
        return response.read()
    answer = response.read(LARGEST_ANSWER_BYTES + 1)
    if len(answer) > LARGEST_ANSWER_BYTES:
        raise ValueError(f"a response of more than {LARGEST_ANSWER_BYTES} bytes")
    return answer


class _UnixConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    sock: "_Socket | None"

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path
        self._until_s = 0.0

    def wait_until(self, until_s: float) -> None:
        """Give up at this time of `time.monotonic`."""
        self._until_s = until_s
        if self.sock is not None:
            self.sock.until_s = until_s

    def connect(self) -> None:
        self.sock = _Socket(self._until_s)
        try:
            self.sock.wait_no_longer()
            with short_address(Path(self._path)) as address:
                self.sock.connect(address)
        except BaseException:
            self.sock.close()
            raise


class _Socket(socket.socket):
    """Waits until a time and no longer: a timeout alone begins anew with every byte that comes."""

    def __init__(self, until_s: float) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.until_s = until_s

    def wait_no_longer(self) -> None:
        left_s = self.until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left_s)

    def sendall(self, *args: Any) -> None:
        self.wait_no_longer()
        super().sendall(*args)

    def recv_into(self, *args: Any) -> int:
        self.wait_no_longer()
        return super().recv_into(*args)
