"""How many downloads run at a time, and who is next: demand before prefetch, each in the order it came."""

import asyncio
from collections import deque

__all__ = ["Slots"]


class Slots:
    """A bounded number of slots with two queues. Whoever got one from `acquire` calls `release`."""

    def __init__(self, count: int) -> None:
        self.free = count
        self._demand: deque[asyncio.Future[None]] = deque()
        self._prefetch: deque[asyncio.Future[None]] = deque()

    async def acquire(self, *, demand: bool) -> None:
        """Wait for a slot."""
        if self.free > 0:
            self.free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        (self._demand if demand else self._prefetch).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()  # it was ours already: hand it on
            raise

    def release(self) -> None:
        """Give the slot to the next in line."""
        for queue in (self._demand, self._prefetch):
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self.free += 1
