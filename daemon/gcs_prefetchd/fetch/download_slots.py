"""Which download starts next: demands before prefetches, each in order of arrival, within the concurrency and the rates.

`AdaptiveConcurrency` limits how many, `RateLimit` how fast. A prefetch waits for both. A demand waits only for a slot, and may
use as many as the limit's maximum. A slot is for a request: once the bytes were received, the next download may start while
they are written.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gcs_prefetchd.fetch.adaptive_concurrency import AdaptiveConcurrency
from gcs_prefetchd.fetch.rate_limit import RateLimit
from gcs_prefetchd.gcs.retry import Outcome

__all__ = ["DownloadSlots", "Ticket"]

MAX_PUBLISHING = 64  # objects that were received and wait for the disk; small ones are in memory meanwhile

Clock = Callable[[], float]


class DownloadSlots:
    """Slots with two queues. Every `acquire` must be paired with `release`; report each request through its `Ticket`.

    `on_free` is called for each slot that becomes free before its `release`.
    """

    def __init__(
        self,
        concurrency: AdaptiveConcurrency,
        rate: RateLimit,
        clock: Clock = time.monotonic,
        *,
        on_free: Callable[[], None] = lambda: None,
    ) -> None:
        self.concurrency = concurrency
        self.rate = rate
        self.in_use = 0
        self.publishing = 0  # downloads that wait for the disk, and whose slots are free again
        self.last_change_s = clock()  # when the limit last changed
        self._clock = clock
        self._on_free = on_free
        self._demands: deque[Ticket] = deque()
        self._prefetches: deque[Ticket] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._throttled_s = 0.0
        self._throttled_since_s: float | None = None

    @property
    def prefetch_capacity(self) -> int:
        """How many prefetches are worth having at a time, including those that are being published."""
        return self.concurrency.limit + self.publishing

    @property
    def free(self) -> int:
        """How many prefetches could start at once; 0 while others wait for the rates."""
        return 0 if self._timer is not None else max(0, self.concurrency.limit - self.in_use)

    @property
    def throttled_s(self) -> float:
        """For how many seconds a slot was free and a prefetch waited only for the rates."""
        since_s = self._throttled_since_s
        return self._throttled_s + (0.0 if since_s is None else self._clock() - since_s)

    async def acquire(self, ticket: "Ticket") -> None:
        """Wait for a slot and, for a prefetch, until the rates allow it."""
        if ticket.is_demand:
            may_start = self.in_use < self.concurrency.maximum
        else:
            is_next = not self._prefetches and self.in_use < self.concurrency.limit
            may_start = is_next and self.rate.wait_s(self._clock()) <= 0
        if may_start:
            self._take_slot(ticket)
            return
        ticket.granted = asyncio.get_running_loop().create_future()
        (self._demands if ticket.is_demand else self._prefetches).append(ticket)
        self._grant_free_slots()
        try:
            await ticket.granted
        except asyncio.CancelledError:
            if not ticket.granted.cancelled():
                self.release(ticket)  # the slot was granted already: pass it on
            raise

    def promote(self, ticket: "Ticket") -> None:
        """Make a prefetch a demand, because a reader waits for its object. If it waits, it moves to the queue of demands."""
        ticket.is_demand = True
        if ticket in self._prefetches:
            self._prefetches.remove(ticket)
            self._demands.append(ticket)
            self._grant_free_slots()

    def release(self, ticket: "Ticket") -> None:
        """The download has ended, successfully or not."""
        if ticket.is_received:
            self.publishing -= 1
        else:
            self._return_slot(ticket)

    def reacquire(self, ticket: "Ticket") -> None:
        """Download again what was received and lost. The slot is taken at once, even if all are in use."""
        if ticket.is_received:
            ticket.is_received = False
            self.publishing -= 1
            self.in_use += 1

    async def page(self) -> "Ticket":
        """Wait until the rates allow a request for a page of a listing, which needs no slot.

        It consumes its token first, and so goes before all prefetches that wait.
        """
        ticket = Ticket(self, is_demand=False, prepaid_requests=1)
        now_s = self._clock()
        self.rate.consume(1, 0, now_s)
        if (wait_s := self.rate.wait_s(now_s)) > 0:
            await asyncio.sleep(wait_s)
        return ticket

    def set_limits(self, minimum: int, maximum: int, max_requests_per_s: float | None, max_bytes_per_s: float | None) -> None:
        """Replace the bounds of the concurrency and the limits of the rates, at once."""
        now_s, before = self._clock(), self.concurrency.limit
        self.concurrency.set_bounds(minimum, maximum)
        self.rate.set_limits(max_requests_per_s, max_bytes_per_s, now_s)
        if self.concurrency.limit != before:
            self.last_change_s = now_s
        self.close()
        self._grant_free_slots()

    def close(self) -> None:
        """Stop waiting for the rates."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- What tickets report

    def count_request(self, ticket: "Ticket") -> None:
        """Count a request of this download, which is sent now."""
        now_s = self._clock()
        self.rate.count_request(now_s)
        if ticket.prepaid_requests:
            ticket.prepaid_requests -= 1
        else:
            self.rate.consume(1, 0, now_s)

    def record(self, ticket: "Ticket", outcome: Outcome) -> None:
        """Record how an attempt of this download ended."""
        now_s = self._clock()
        received_bytes = outcome.received_bytes
        self.rate.received_bytes.add(received_bytes, now_s)
        prepaid_bytes = min(received_bytes, ticket.prepaid_bytes)
        ticket.prepaid_bytes -= prepaid_bytes
        if received_bytes > prepaid_bytes:
            self.rate.consume(0, received_bytes - prepaid_bytes, now_s)
        before = self.concurrency.limit
        self.concurrency.record(outcome, self.in_use)
        if self.concurrency.limit != before:
            self.last_change_s = now_s
            self._grant_free_slots()
        if outcome.is_success and self.publishing < MAX_PUBLISHING:
            ticket.is_received = True
            self.publishing += 1
            self._return_slot(ticket)
            self._on_free()

    # --- Granting slots

    def _take_slot(self, ticket: "Ticket") -> None:
        self.in_use += 1
        ticket.prepaid_requests, ticket.prepaid_bytes = 1, ticket.size_bytes
        self.rate.consume(1, ticket.size_bytes, self._clock())

    def _return_slot(self, ticket: "Ticket") -> None:
        """Pass the slot on, and refund the tokens that were consumed in advance and not used."""
        self.in_use -= 1
        if ticket.prepaid_requests or ticket.prepaid_bytes:
            self.rate.consume(-ticket.prepaid_requests, -ticket.prepaid_bytes, self._clock())
        if self._demands or self._prefetches:
            self._grant_free_slots()

    def _grant_free_slots(self) -> None:
        while self.in_use < self.concurrency.maximum and (ticket := _pop_waiting(self._demands)):
            self._grant(ticket)
        while self.in_use < self.concurrency.limit and (ticket := _pop_waiting(self._prefetches)):
            if not self._rates_allow_prefetch():
                self._prefetches.appendleft(ticket)
                return
            self._grant(ticket)
        if not self._prefetches:
            self._stop_counting_throttled()

    def _grant(self, ticket: "Ticket") -> None:
        self._take_slot(ticket)
        assert ticket.granted is not None
        ticket.granted.set_result(None)

    def _rates_allow_prefetch(self) -> bool:
        """Whether the rates allow a prefetch now. If not, a timer grants slots again when they will."""
        if self._timer is not None:
            return False
        now_s = self._clock()
        wait_s = self.rate.wait_s(now_s)
        if wait_s <= 0:
            self._stop_counting_throttled()
            return True
        if self._throttled_since_s is None:
            self._throttled_since_s = now_s
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._rates_allow_again)
        return False

    def _rates_allow_again(self) -> None:
        self._timer = None
        self._grant_free_slots()

    def _stop_counting_throttled(self) -> None:
        self._throttled_s, self._throttled_since_s = self.throttled_s, None


@dataclass(slots=True, eq=False)
class Ticket:
    """One download's place in a queue, and the observer of its requests for `GCSClient.download`.

    The tokens of one request and, if `size_bytes` is known, of its bytes are consumed in advance: they are prepaid.
    """

    slots: DownloadSlots
    is_demand: bool
    size_bytes: int = 0
    granted: asyncio.Future[None] | None = None
    prepaid_requests: int = 0
    prepaid_bytes: int = 0
    is_received: bool = False

    def request_sent(self) -> None:
        """A request is sent."""
        self.slots.count_request(self)

    def attempt_ended(self, outcome: Outcome) -> None:
        """An attempt ended, successfully or not."""
        self.slots.record(self, outcome)


def _pop_waiting(queue: deque[Ticket]) -> Ticket | None:
    """Remove and return the first ticket that still waits; discard those that were cancelled."""
    while queue:
        ticket = queue.popleft()
        if ticket.granted is not None and not ticket.granted.done():
            return ticket
    return None
