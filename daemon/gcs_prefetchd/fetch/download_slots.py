"""Who downloads next: demand before prefetch, each in the order it came, as many at a time and as fast as is allowed.

`Limit` says how many, `Governor` how fast. A prefetch waits for both; a demand waits only for a slot, among the
most that there may be. A slot is for a request: where the bytes have come, the next one may go while they are written.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gcs_prefetchd.fetch.adaptive_concurrency import Limit
from gcs_prefetchd.fetch.rate_limit import Governor
from gcs_prefetchd.gcs.retry import Outcome

__all__ = ["Slots", "Ticket", "Turn"]

MOST_PUBLISHING = 64  # objects whose bytes have come and wait for the disk; small ones are in memory meanwhile

Clock = Callable[[], float]


@dataclass(slots=True, eq=False)
class Turn:
    """One download's place in line, and what was spent for it ahead: a request and, where they are known, its bytes."""

    demand: bool
    size_bytes: int = 0
    granted: asyncio.Future[None] | None = None
    spent_requests: int = 0
    spent_bytes: int = 0
    has_come: bool = False


class Slots:
    """Slots with two queues. Whoever got one from `acquire` calls `release`, and tells of each request by a `Ticket`.

    `on_free` hears of each slot that is free before its `release`.
    """

    def __init__(self, limit: Limit, governor: Governor, clock: Clock = time.monotonic) -> None:
        self.limit = limit
        self.governor = governor
        self.in_use = 0
        self.publishing = 0  # whose slot is another's already
        self.on_free: Callable[[], None] = lambda: None
        self.last_change_s = clock()  # when the limit last moved
        self._clock = clock
        self._demand: deque[Turn] = deque()
        self._prefetch: deque[Turn] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._throttled_s = 0.0
        self._throttled_since_s: float | None = None

    @property
    def count(self) -> int:
        """How many prefetches are worth starting, those that are being published included."""
        return self.limit.now + self.publishing

    @property
    def free(self) -> int:
        """How many prefetches could begin at once; none while others wait for the rates."""
        return 0 if self._timer is not None else max(0, self.limit.now - self.in_use)

    @property
    def throttled_s(self) -> float:
        """For how many seconds a slot was free and a prefetch waited for nothing but the rates."""
        since_s = self._throttled_since_s
        return self._throttled_s + (0.0 if since_s is None else self._clock() - since_s)

    async def acquire(self, turn: Turn) -> None:
        """Wait for a slot and, for a prefetch, until the rates allow it."""
        if turn.demand:
            may_go = self.in_use < self.limit.most
        else:
            may_go = not self._prefetch and self.in_use < self.limit.now and self.governor.wait_s(self._clock()) <= 0
        if may_go:
            self._grant(turn)
            return
        turn.granted = asyncio.get_running_loop().create_future()
        (self._demand if turn.demand else self._prefetch).append(turn)
        self._serve()
        try:
            await turn.granted
        except asyncio.CancelledError:
            if not turn.granted.cancelled():
                self.release(turn)  # it was ours already: hand it on
            raise

    def promote(self, turn: Turn) -> None:
        """A reader waits for what was queued as a prefetch: it goes on in the line of demands."""
        turn.demand = True
        if turn in self._prefetch:
            self._prefetch.remove(turn)
            self._demand.append(turn)
            self._serve()

    def release(self, turn: Turn) -> None:
        """The download has ended, well or not."""
        if turn.has_come:
            self.publishing -= 1
        else:
            self._give_back(turn)

    def again(self, turn: Turn) -> None:
        """What had come is lost, and is asked for again: the turn has a slot again, in use by two for a moment."""
        if turn.has_come:
            turn.has_come = False
            self.publishing -= 1
            self.in_use += 1

    def _give_back(self, turn: Turn) -> None:
        """Give the slot to the next in line, and back what was spent ahead and not used."""
        self.in_use -= 1
        if turn.spent_requests or turn.spent_bytes:
            self.governor.spend(-turn.spent_requests, -turn.spent_bytes, self._clock())
        if self._demand or self._prefetch:
            self._serve()

    def sent(self, turn: Turn) -> None:
        """A request of this download goes out."""
        now_s = self._clock()
        self.governor.sent(now_s)
        if turn.spent_requests:
            turn.spent_requests -= 1
        else:
            self.governor.spend(1, 0, now_s)

    def ended(self, turn: Turn, outcome: Outcome) -> None:
        """A request of this download has ended."""
        now_s = self._clock()
        received_bytes = outcome.received_bytes
        self.governor.received_bytes.add(received_bytes, now_s)
        ahead_bytes = min(received_bytes, turn.spent_bytes)
        turn.spent_bytes -= ahead_bytes
        if received_bytes > ahead_bytes:
            self.governor.spend(0, received_bytes - ahead_bytes, now_s)
        before = self.limit.now
        self.limit.note(outcome, self.in_use)
        if self.limit.now != before:
            self.last_change_s = now_s
            self._serve()
        if outcome.is_success and self.publishing < MOST_PUBLISHING:
            turn.has_come = True
            self.publishing += 1
            self._give_back(turn)
            self.on_free()

    async def page(self) -> "Ticket":
        """Wait until the rates allow a page of a listing, which needs no slot.

        It spends first, and so goes before all prefetches that wait.
        """
        turn = Turn(demand=False, spent_requests=1)
        now_s = self._clock()
        self.governor.spend(1, 0, now_s)
        if (wait_s := self.governor.wait_s(now_s)) > 0:
            await asyncio.sleep(wait_s)
        return Ticket(self, turn)

    def set_bounds(self, least: int, most: int, max_requests_per_s: float | None, max_bytes_per_s: float | None) -> None:
        """Take other bounds of the limit and of the rates, at once."""
        now_s, before = self._clock(), self.limit.now
        self.limit.bound(least, most)
        self.governor.bound(max_requests_per_s, max_bytes_per_s, now_s)
        if self.limit.now != before:
            self.last_change_s = now_s
        self.close()
        self._serve()

    def close(self) -> None:
        """Wait for the rates no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _grant(self, turn: Turn) -> None:
        self.in_use += 1
        turn.spent_requests, turn.spent_bytes = 1, turn.size_bytes
        self.governor.spend(1, turn.size_bytes, self._clock())

    def _serve(self) -> None:
        """Give out what slots there are."""
        while self.in_use < self.limit.most and (turn := _next(self._demand)):
            self._hand_over(turn)
        while self.in_use < self.limit.now and (turn := _next(self._prefetch)):
            if not self._may_go():
                self._prefetch.appendleft(turn)
                return
            self._hand_over(turn)
        if not self._prefetch:
            self._count_throttled()

    def _hand_over(self, turn: Turn) -> None:
        self._grant(turn)
        assert turn.granted is not None
        turn.granted.set_result(None)

    def _may_go(self) -> bool:
        """Whether the rates allow a prefetch now; if not, come back when they will."""
        if self._timer is not None:
            return False
        now_s = self._clock()
        wait_s = self.governor.wait_s(now_s)
        if wait_s <= 0:
            self._count_throttled()
            return True
        if self._throttled_since_s is None:
            self._throttled_since_s = now_s
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._timer_ended)
        return False

    def _count_throttled(self) -> None:
        self._throttled_s, self._throttled_since_s = self.throttled_s, None

    def _timer_ended(self) -> None:
        self._timer = None
        self._serve()


@dataclass(frozen=True, slots=True)
class Ticket:
    """Tells the slots of one turn's requests: what `GCSClient` takes as an observer."""

    slots: Slots
    turn: Turn

    def request_sent(self) -> None:
        """A request goes out."""
        self.slots.sent(self.turn)

    def attempt_ended(self, outcome: Outcome) -> None:
        """A try has ended."""
        self.slots.ended(self.turn, outcome)


def _next(queue: deque[Turn]) -> Turn | None:
    """The first in line who still waits, taken out of it."""
    while queue:
        turn = queue.popleft()
        if turn.granted is not None and not turn.granted.done():
            return turn
    return None
