"""Where the daemon listens: for statistics over TCP, and for readers on the Unix socket."""

import errno
import resource
import socket
from contextlib import AsyncExitStack
from pathlib import Path

from aiohttp import web

from gcs_prefetchd.server.bounded_listener import ConnectionLimits, listen
from gcs_prefetchd.shared.daemon_client import short_address
from gcs_prefetchd.shared.errors import StartError

__all__ = ["listen_for_readers", "listen_for_statistics"]

# Any user of the node may request the statistics. Such clients poll or reconnect, so their idle connections are closed soon.
STATISTICS_LIMITS = ConnectionLimits(connections=128, idle_s=5.0)
MAX_READER_CONNECTIONS = 4096  # two for each process of a job
READER_IDLE_S = 75.0


async def listen_for_statistics(stack: AsyncExitStack, app: web.Application, address: tuple[str, int]) -> str:
    """Serve the application over TCP until the stack closes, and return its URL. Raises StartError if the port is in use."""
    host, port = address
    try:
        listener = await listen(stack, app, STATISTICS_LIMITS, host=host, port=port)
    except OSError as exc:
        reason = "the port is in use" if exc.errno == errno.EADDRINUSE else (exc.strerror or str(exc))
        raise StartError(
            f"setting http: {host}:{port}: {reason}; choose another with --http HOST:PORT, port 0 for any"
        ) from None
    bound_host, bound_port = listener.sockets[0].getsockname()[:2]
    return f"http://{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port}"


async def listen_for_readers(stack: AsyncExitStack, app: web.Application, path: Path) -> None:
    """Serve the application on a Unix socket at this path, for the daemon's user and group, until the stack closes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.callback(listener.close)
    _bind(listener, path)
    # The other half of the descriptors is for files and for connections to GCS.
    connections = min(MAX_READER_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    await listen(stack, app, ConnectionLimits(connections, READER_IDLE_S), sock=listener, backlog=1024)


def _bind(listener: socket.socket, path: Path) -> None:
    with short_address(path) as address:
        listener.bind(address)
    path.chmod(0o660)
