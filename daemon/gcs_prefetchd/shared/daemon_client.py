"""A small blocking client of the daemon's Unix socket. Standard library only, because training workers load it."""

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
MAX_PAUSE_S = 30.0
STATUS_TIMEOUT_S = 1.0  # a healthy daemon returns its status within a millisecond
MAX_RESPONSE_BYTES = 64 << 20  # 10,000 of the longest names, each with an error

T = TypeVar("T")


def read_daemon_file(cache_dir: Path) -> dict[str, object]:
    """The content of `daemon.json` in the cache directory. Raises DaemonUnavailableError if there is none."""
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
    """A client of the daemon of one cache directory. Threads may share it: their requests run one at a time.

    Nothing is opened before the first request. Every method raises DaemonUnavailableError if the daemon is absent, sends an
    unusable response, or does not complete its response within `timeout_s`, even if it keeps sending. After such a failure
    methods raise it at once, during a pause that doubles with every consecutive failure; after the pause the daemon must first
    return its status within a second. So a hung daemon costs its readers one timeout instead of one for each read. A newly
    started daemon is contacted at once. The caller closes the client.
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
        """The daemon's status."""
        return self._read(Status.from_json, "GET", "/v1/status")

    def stats(self) -> dict[str, Any]:
        """The statistics, as from `/stats`."""
        return self._read(_json_object, "GET", "/v1/stats")

    def manifest(self, data_root: str) -> ManifestResponse:
        """The path of the data root's manifest. Waits for the first listing."""
        return self._read(ManifestResponse.from_json, "GET", f"/v1/manifest?{urlencode({'data_root': data_root})}")

    def fetch(self, uris: list[str]) -> list[str]:
        """Fetch the objects into the cache now. Returns for each the empty string, or the error."""

        def errors(body: bytes) -> list[str]:
            errors = FetchResponse.from_json(body).errors
            if len(errors) != len(uris):
                raise ProtocolError(f"the response covers {len(errors)} of {len(uris)} objects")
            return errors

        return self._read(errors, "POST", "/v1/fetch", FetchRequest(uris).to_json().encode())

    def report_reads(self, report: ReadReport) -> None:
        """Report what was read."""
        self._request("POST", "/v1/reads", report.to_json().encode())

    def send_plan(self, plan: Plan, packed: bytes) -> None:
        """Send what will be read. Raises ProtocolError if the daemon refuses the plan."""
        self._request("POST", "/v1/plan", plan.to_body(packed))

    def lease(self, job: str) -> "Lease":
        """Keep the job's streams alive: the daemon ends them when the lease is closed or this process dies.

        The lease has a connection of its own, so that it blocks no other request. The caller closes it.
        """
        connection = _UnixConnection(self._socket_path())
        connection.set_deadline(time.monotonic() + self.timeout_s)
        try:
            connection.request("GET", f"/v1/lease?{urlencode({'job': job})}")
        except (OSError, ValueError, http.client.HTTPException) as exc:
            connection.close()
            raise DaemonUnavailableError(f"daemon of {self.cache_dir}: {type(exc).__name__}: {exc}") from exc
        assert connection.sock is not None, "the request connected it"
        return Lease(connection.sock)

    def cached_objects(self, prefix: str = "") -> list[str]:
        """The URIs of the cached objects that start with `prefix`."""

        def uris(body: bytes) -> list[str]:
            return [str(uri) for uri in _json_object(body)["objects"]]

        return self._read(uris, "GET", f"/v1/objects?{urlencode({'prefix': prefix})}")

    def settings(self) -> dict[str, Any]:
        """The settings that can be changed while the daemon runs, by name; None means not set."""
        return self._read(_json_object, "GET", "/v1/settings")

    def change_settings(self, changes: Mapping[str, object]) -> dict[str, Any]:
        """Change some of these settings until the daemon stops, and return all. Raises ProtocolError if one is refused."""
        return self._read(_json_object, "PATCH", "/v1/settings", json.dumps(dict(changes)).encode())

    def stop(self) -> None:
        """Stop the daemon. Returns when it has started to stop."""
        self._request("POST", "/v1/stop")

    def close(self) -> None:
        """Close the connection; a later request opens another."""
        with self._lock:
            self._disconnect()

    def _read(self, parse: Callable[[bytes], T], method: str, target: str, body: bytes | None = None) -> T:
        response = self._request(method, target, body)
        try:
            return parse(response)
        except (ProtocolError, ValueError, TypeError, KeyError, RecursionError) as exc:
            with self._lock:
                self._pause()
            raise DaemonUnavailableError(f"daemon of {self.cache_dir}: {target}: sent an unusable response ({exc})") from exc

    def _request(self, method: str, target: str, body: bytes | None = None) -> bytes:
        with self._lock:
            if self._clock() < self._paused_until_s and self._instance_id() == self._failed_instance:
                raise DaemonUnavailableError(f"daemon of {self.cache_dir}: failed a moment ago, not contacted again yet")
            deadline_s = time.monotonic() + self.timeout_s
            try:
                if self._failures:
                    self._exchange("GET", "/v1/status", None, min(deadline_s, time.monotonic() + STATUS_TIMEOUT_S))
                status, response = self._exchange(method, target, body, deadline_s)
            except (OSError, ValueError, http.client.HTTPException) as exc:
                self._pause()
                raise DaemonUnavailableError(f"daemon of {self.cache_dir}: {type(exc).__name__}: {exc}") from exc
            except PrefetchdError:
                self._pause()
                raise
            self._failures = 0
        if status == 200:
            return response
        text = response.decode(errors="replace").strip()[:500]
        if status == 400:
            raise ProtocolError(text)
        raise DaemonUnavailableError(f"daemon of {self.cache_dir}: {method} {target}: {status} {text}")

    def _exchange(self, method: str, target: str, body: bytes | None, deadline_s: float) -> tuple[int, bytes]:
        reused = self._connection is not None
        try:
            return self._attempt(method, target, body, deadline_s)
        except (ConnectionError, http.client.BadStatusLine):
            # A kept connection breaks when the daemon restarts: one more attempt, over a new connection.
            self._disconnect()
            if not reused:
                raise
            return self._attempt(method, target, body, deadline_s)

    def _attempt(self, method: str, target: str, body: bytes | None, deadline_s: float) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = _UnixConnection(self._socket_path())
        self._connection.set_deadline(deadline_s)
        self._connection.request(method, target, body)
        with self._connection.getresponse() as response:
            return response.status, _read_bounded(response)

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
        self._paused_until_s = self._clock() + min(FIRST_PAUSE_S * 2**self._failures, MAX_PAUSE_S)
        self._failures = min(self._failures + 1, 16)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Lease:
    """An open connection that represents this process: the kernel closes it when the process dies for any reason.

    A forked child closes its copy at once; otherwise the parent's lease would last as long as its workers.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self.close = weakref.finalize(self, connection.close)
        """End the lease. Also called when the lease is garbage collected."""
        _leases.add(self)

    @property
    def is_held(self) -> bool:
        """Whether the daemon still holds the other end: False once it is gone, or this end was closed."""
        try:
            while self._connection.recv(4096):  # any bytes mean that the daemon is there
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


def _json_object(body: bytes) -> dict[str, Any]:
    content = json.loads(body)
    if not isinstance(content, dict):
        raise TypeError("not a JSON object")
    return content


@contextmanager
def short_address(socket_path: Path) -> Iterator[str]:
    """An address of the socket that fits the kernel's 107 bytes, even for a deep cache directory."""
    if len(os.fsencode(socket_path)) <= 107:
        yield str(socket_path)
        return
    folder = os.open(socket_path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{socket_path.name}"
    finally:
        os.close(folder)


def _read_bounded(response: http.client.HTTPResponse) -> bytes:
    """The response's body. Raises ValueError if it is larger than any response of a daemon."""
    if response.length is not None and response.length <= MAX_RESPONSE_BYTES:
        return response.read()
    body = response.read(MAX_RESPONSE_BYTES + 1)
    if len(body) > MAX_RESPONSE_BYTES:
        raise ValueError(f"a response of more than {MAX_RESPONSE_BYTES} bytes")
    return body


class _UnixConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    sock: "_Socket | None"

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path
        self._deadline_s = 0.0

    def set_deadline(self, deadline_s: float) -> None:
        """Time out at this `time.monotonic`."""
        self._deadline_s = deadline_s
        if self.sock is not None:
            self.sock.deadline_s = deadline_s

    def connect(self) -> None:
        self.sock = _Socket(self._deadline_s)
        try:
            self.sock.set_timeout()
            with short_address(Path(self._path)) as address:
                self.sock.connect(address)
        except BaseException:
            self.sock.close()
            raise


class _Socket(socket.socket):
    """Waits until a fixed time: a plain timeout restarts with every byte received."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.deadline_s = deadline_s

    def set_timeout(self) -> None:
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left_s)

    def sendall(self, *args: Any) -> None:
        self.set_timeout()
        super().sendall(*args)

    def recv_into(self, *args: Any) -> int:
        self.set_timeout()
        return super().recv_into(*args)
