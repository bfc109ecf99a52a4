"""Telling systemd how we are: READY, STOPPING and the watchdog's ping, where `$NOTIFY_SOCKET` says that it listens.

https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html; one datagram each, so no library is needed.
"""

import asyncio
import os
import socket

__all__ = ["notify_systemd", "ping_watchdog"]


def notify_systemd(state: str) -> None:
    """Send a state such as `READY=1`; does nothing where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError:
            return  # a supervisor that went away is no reason to stop


async def ping_watchdog() -> None:
    """Ping at twice the rate that systemd asks for, for as long as the event loop lives; returns where it asks for none."""
    wanted_us = os.environ.get("WATCHDOG_USEC", "")
    if (
        not wanted_us.isascii()
        or not wanted_us.isdigit()
        or not int(wanted_us)
        or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid())
    ):
        return
    while True:
        notify_systemd("WATCHDOG=1")
        await asyncio.sleep(int(wanted_us) / 2_000_000)
