"""How many downloads run at a time, and who is next: demand before prefetch, each in the order it came."""

import asyncio
from collections import deque
from dataclasses import dataclass

__all__ = ["Slots", "Turn"]


@dataclass(slots=True, eq=False)
class Turn:
    """One download's place in line."""

    demand: bool
    granted: asyncio.Future[None] | None = None


class Slots:
    """A bounded number of slots with two queues. Whoever got one from `acquire` calls `release`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = count
        self._demand: deque[Turn] = deque()
        self._prefetch: deque[Turn] = deque()

    async def acquire(self, turn: Turn) -> None:
        """Wait for a slot."""
        if self.free > 0:
            self.free -= 1
            return
        turn.granted = asyncio.get_running_loop().create_future()
        (self._demand if turn.demand else self._prefetch).append(turn)
        try:
            await turn.granted
        except asyncio.CancelledError:
            if not turn.granted.cancelled():
                self.release()  # it was ours already: hand it on
            raise

    def promote(self, turn: Turn) -> None:
        """A reader waits for what was queued as a prefetch: it goes on in the line of demands."""
        turn.demand = True
        if turn in self._prefetch:
            self._prefetch.remove(turn)
            self._demand.append(turn)

    def release(self) -> None:
        """Give the slot to the next in line."""
        for queue in (self._demand, self._prefetch):
            while queue:
                granted = queue.popleft().granted
                if granted is not None and not granted.done():
                    granted.set_result(None)
                    return
        self.free += 1
