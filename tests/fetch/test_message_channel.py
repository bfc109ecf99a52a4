"""The connection between the daemon and a fetch process, over a real socket pair."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gcs_prefetchd.fetch.message_channel import MessageChannel
from gcs_prefetchd.fetch.process_messages import BytesWritten, CancelDownload, DownloadFailed, Message, encode


class Peer:
    """One end: the messages that arrived there, and whether the other end is gone."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[Message] = asyncio.Queue()
        self.is_lost = asyncio.Event()
        self.times_lost = 0
        self.channel = MessageChannel(self.received.put_nowait, self._lost)

    def _lost(self) -> None:
        self.times_lost += 1
        self.is_lost.set()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Peer, socket.socket]]:
    """A channel, and the plain socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        peer = Peer()
        await peer.channel.connect(ours)
        yield peer, theirs
    await peer.is_lost.wait()


async def receive_lines(end: socket.socket, lines: int) -> bytes:
    """Read until this many lines have arrived."""
    data = b""
    while data.count(b"\n") < lines:
        data += await asyncio.get_running_loop().sock_recv(end, 1 << 16)
    return data


async def test_messages_arrive_at_the_other_end_in_order() -> None:
    ours, theirs = socket.socketpair()
    sender, receiver = Peer(), Peer()
    await sender.channel.connect(ours)
    await receiver.channel.connect(theirs)
    sent: list[Message] = [BytesWritten(number, 2**20) for number in range(1000)]
    for message in sent:
        sender.channel.send(message)
    assert [await receiver.received.get() for _ in sent] == sent
    theirs.shutdown(socket.SHUT_RDWR)
    await asyncio.gather(sender.is_lost.wait(), receiver.is_lost.wait())


async def test_messages_that_are_sent_together_share_one_write() -> None:
    async with connected() as (peer, theirs):
        messages: list[Message] = [CancelDownload(1), CancelDownload(2)]
        for message in messages:
            peer.channel.send(message)
        assert await receive_lines(theirs, 1) == encode(messages)
        peer.channel.send(CancelDownload(3))
        assert await receive_lines(theirs, 1) == encode([CancelDownload(3)])


async def test_a_message_that_arrives_in_pieces_is_received_once_it_is_complete() -> None:
    async with connected() as (peer, theirs):
        failed = DownloadFailed(1, "OriginError", "x" * 100)
        for byte in encode([failed]):
            theirs.send(bytes([byte]))
            await asyncio.sleep(0)
        assert await peer.received.get() == failed
        assert peer.received.empty()


async def test_the_loss_of_the_other_end_is_reported_once() -> None:
    async with connected() as (peer, theirs):
        theirs.close()
        await peer.is_lost.wait()
        assert peer.times_lost == 1


async def test_a_message_to_an_end_that_is_gone_is_lost_without_an_error() -> None:
    async with connected() as (peer, theirs):
        theirs.close()
        await peer.is_lost.wait()
        peer.channel.send(CancelDownload(1))
        flushed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, flushed.set)
        await flushed.wait()
    assert peer.times_lost == 1


async def test_a_wrong_message_closes_the_connection() -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))
    async with connected() as (peer, theirs):
        theirs.send(b'[["Unknown"]]\n')
        await peer.is_lost.wait()
    assert [type(failure) for failure in failures] == [KeyError]
