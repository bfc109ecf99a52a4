"""Signals of a real process: the first one requests a stop, the second one ends it."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from gcs_prefetchd.service.signals import stop_on_signals

HANG_AFTER_THE_FIRST = """
import asyncio
from gcs_prefetchd.service.signals import stop_on_signals

async def main():
    stopping = asyncio.Event()
    with stop_on_signals(stopping):
        print("ready", flush=True)
        await stopping.wait()
        print("stopping", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_requests_a_stop_and_the_handlers_are_removed_afterwards(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    stopping = asyncio.Event()
    try:
        with stop_on_signals(stopping):
            os.kill(os.getpid(), signum)
            await asyncio.wait_for(stopping.wait(), 10)
        assert not asyncio.get_running_loop().remove_signal_handler(signum)
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_at_once(signum: signal.Signals, status: int) -> None:
    command = [sys.executable, "-c", HANG_AFTER_THE_FIRST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("ready\n", "stopping\n"):
            assert process.stdout.readline() == line
            process.send_signal(signum)
        assert process.wait(10) == status
