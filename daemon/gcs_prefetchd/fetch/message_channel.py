"""One end of the connection between the daemon and a fetch process, which carries `process_messages`."""

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from gcs_prefetchd.fetch.process_messages import Message, decode, encode

__all__ = ["MessageChannel"]

FLUSH_AFTER_S = 0.001  # each write costs both ends a turn of their event loops, and no message is that urgent


class MessageChannel(asyncio.Protocol):
    """One end of a socket pair. It calls `on_message` with each message, and `on_lost` once when the other end is gone.

    Messages that are sent within a millisecond share one write.
    """

    def __init__(self, on_message: Callable[[Message], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._outgoing: list[Message] = []
        self._incomplete_line = b""

    async def connect(self, end: socket.socket) -> None:
        """Use this end of a socket pair; the channel closes it. Messages may arrive before this returns."""
        await self._loop.create_connection(lambda: self, sock=end)

    def send(self, message: Message) -> None:
        """Send a message. It is lost if the other end is gone."""
        if not self._outgoing:
            self._loop.call_later(FLUSH_AFTER_S, self._flush)
        self._outgoing.append(message)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and not self._transport.is_closing():
            self._transport.write(encode(outgoing))

    # --- What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses of asyncio's

    def data_received(self, data: bytes) -> None:
        *lines, self._incomplete_line = (self._incomplete_line + data).split(b"\n")
        for line in lines:
            for message in decode(line):
                self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()
