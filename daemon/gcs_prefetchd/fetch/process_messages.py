"""Messages between the daemon and its fetch processes, over a pair of sockets: JSON arrays, many to a line."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any, cast

__all__ = ["CANCELLED", "Wire"]

CANCELLED = "cancelled"  # in the place of an error's name

TOGETHER_S = 0.001  # each line costs both ends a turn of their event loops, and nobody waits for one of these messages


class Wire(asyncio.Protocol):
    """One end. `on_message` gets the parts of each message, `on_lost` hears once that the other end is gone.

    A message is JSON; what is sent within a millisecond goes together.
    """

    def __init__(self, on_message: Callable[..., None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._outgoing: list[tuple[Any, ...]] = []
        self._incomplete = b""

    async def connect(self, end: socket.socket) -> None:
        """Take this end of a pair of sockets, which is then the wire's to close. Messages may come before this returns."""
        await self._loop.create_connection(lambda: self, sock=end)

    def send(self, *message: Any) -> None:
        """Send a message; one that is sent when the other end is gone is lost."""
        if not self._outgoing:
            self._loop.call_later(TOGETHER_S, self._flush)
        self._outgoing.append(message)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and not self._transport.is_closing():
            self._transport.write(json.dumps(outgoing).encode() + b"\n")

    # --- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their type

    def data_received(self, data: bytes) -> None:
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        for line in lines:
            for message in json.loads(line):
                self._on_message(*message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()
