"""systemd's notify protocol: READY, STOPPING and the watchdog's ping, if `$NOTIFY_SOCKET` names a socket.

https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html; each message is one datagram, so no library is needed.
"""

import asyncio
import os
import socket

__all__ = ["notify_systemd", "ping_watchdog"]


def notify_systemd(state: str) -> None:
    """Send a state such as `READY=1`. Does nothing if no supervisor listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError:
            return  # the daemon keeps running without its supervisor


async def ping_watchdog() -> None:
    """Ping at twice the rate that systemd requires, as long as the event loop runs. Returns if systemd requires no ping."""
    timeout_us = os.environ.get("WATCHDOG_USEC", "")
    if (
        not timeout_us.isascii()
        or not timeout_us.isdigit()
        or not int(timeout_us)
        or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid())
    ):
        return
    while True:
        notify_systemd("WATCHDOG=1")
        await asyncio.sleep(int(timeout_us) / 2_000_000)
