"""Which download starts next."""

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcs_prefetchd.fetch.adaptive_concurrency import AdaptiveConcurrency
from gcs_prefetchd.fetch.download_slots import MAX_PUBLISHING, DownloadSlots, Ticket
from gcs_prefetchd.fetch.rate_limit import RateLimit
from gcs_prefetchd.gcs.retry import Outcome
from support.caches import slots_of


async def settle() -> None:
    """Run every task until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


class Downloads:
    """Tasks that hold a slot until `end`. `order` lists them as they got their slots."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.slots = slots_of(count)
        self.order: list[str] = []
        self.holding: set[str] = set()
        self.tickets: dict[str, Ticket] = {}
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, *, demand: bool) -> None:
        self.ends[name] = asyncio.Event()
        self.tickets[name] = Ticket(self.slots, demand)
        self.tasks[name] = asyncio.create_task(self._download(name))

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await settle()

    async def end_all(self) -> None:
        for event in self.ends.values():
            event.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    async def _download(self, name: str) -> None:
        await self.slots.acquire(self.tickets[name])
        try:
            self.order.append(name)
            self.holding.add(name)
            assert len(self.holding) <= self.count
            await self.ends[name].wait()
        finally:
            self.holding.discard(name)
            self.slots.release(self.tickets[name])


async def test_no_more_downloads_than_slots_run_at_a_time() -> None:
    downloads = Downloads(3)
    for i in range(5):
        downloads.start(f"{i}", demand=False)
    await settle()
    assert downloads.order == ["0", "1", "2"]
    assert downloads.slots.free == 0
    await downloads.end("1")
    assert downloads.order == ["0", "1", "2", "3"]
    await downloads.end_all()
    assert downloads.slots.free == 3


async def test_demands_start_before_prefetches_and_each_kind_in_order_of_arrival() -> None:
    downloads = Downloads(1)
    downloads.start("first", demand=False)
    await settle()
    for name, demand in [("p1", False), ("d1", True), ("p2", False), ("d2", True)]:
        downloads.start(name, demand=demand)
    await settle()
    for name in ("first", "d1", "d2", "p1", "p2"):
        await downloads.end(name)
    assert downloads.order == ["first", "d1", "d2", "p1", "p2"]
    assert downloads.slots.free == 1


async def test_a_promoted_prefetch_moves_to_the_queue_of_demands() -> None:
    downloads = Downloads(1)
    downloads.start("first", demand=False)
    await settle()
    for name, demand in [("p1", False), ("p2", False), ("p3", False), ("d1", True)]:
        downloads.start(name, demand=demand)
    await settle()
    downloads.slots.promote(downloads.tickets["p2"])
    downloads.slots.promote(downloads.tickets["p2"])
    downloads.start("d2", demand=True)
    await settle()
    for name in ("first", "d1", "p2", "d2", "p1", "p3"):
        await downloads.end(name)
    assert downloads.order == ["first", "d1", "p2", "d2", "p1", "p3"]
    assert downloads.slots.free == 1


async def test_promoting_a_download_that_has_its_slot_changes_nothing() -> None:
    downloads = Downloads(1)
    downloads.start("first", demand=False)
    downloads.start("second", demand=False)
    await settle()
    downloads.slots.promote(downloads.tickets["first"])
    await downloads.end("first")
    assert downloads.order == ["first", "second"]
    await downloads.end_all()
    assert downloads.slots.free == 1


async def test_a_ticket_can_be_promoted_before_it_waits() -> None:
    slots = slots_of(1)
    await slots.acquire(first := Ticket(slots, is_demand=False))
    promoted, following = Ticket(slots, is_demand=False), Ticket(slots, is_demand=False)
    slots.promote(promoted)
    tasks = [asyncio.create_task(slots.acquire(ticket)) for ticket in (following, promoted)]
    await settle()
    slots.release(first)
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert [task.done() for task in tasks] == [False, True]
    slots.release(promoted)
    await tasks[0]


async def test_a_cancelled_waiter_is_skipped() -> None:
    downloads = Downloads(1)
    for name in ("first", "cancelled", "next"):
        downloads.start(name, demand=True)
    await settle()
    downloads.tasks["cancelled"].cancel()
    await downloads.end("first")
    assert downloads.order == ["first", "next"]
    await downloads.end_all()
    assert downloads.slots.free == 1


async def test_a_waiter_that_is_cancelled_as_its_slot_is_granted_passes_it_on() -> None:
    """Both within one turn of the event loop: the waiter has its slot, and never runs again."""
    slots = slots_of(1)
    await slots.acquire(first := Ticket(slots, is_demand=True))
    cancelled = asyncio.create_task(slots.acquire(Ticket(slots, is_demand=True)))
    following = asyncio.create_task(slots.acquire(next_ticket := Ticket(slots, is_demand=False)))
    await settle()
    slots.release(first)
    cancelled.cancel()
    await asyncio.wait_for(following, 10)
    assert cancelled.cancelled()
    assert slots.free == 0
    slots.release(next_ticket)
    assert slots.free == 1


async def test_a_waiter_that_is_cancelled_as_its_slot_is_granted_frees_it_if_no_other_waits() -> None:
    slots = slots_of(1)
    await slots.acquire(first := Ticket(slots, is_demand=True))
    cancelled = asyncio.create_task(slots.acquire(Ticket(slots, is_demand=False)))
    await settle()
    slots.release(first)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert slots.free == 1


steps = st.lists(
    st.tuples(
        st.sampled_from(["demand", "prefetch", "promote", "end", "cancel", "end and cancel", "settle"]), st.integers(0, 100)
    ),
    max_size=60,
)


@settings(deadline=None)
@given(st.integers(1, 4), steps)
def test_no_sequence_of_steps_loses_a_slot_or_grants_one_twice(count: int, steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        downloads = Downloads(count)
        for number, (step, choice) in enumerate(steps):
            if step in ("demand", "prefetch"):
                downloads.start(f"{step} {number}", demand=step == "demand")
            elif step == "settle":
                await settle()
            elif downloads.tasks:
                names = list(downloads.tasks)
                if step == "promote":
                    downloads.slots.promote(downloads.tickets[names[choice % len(names)]])
                if "end" in step:
                    downloads.ends[names[choice % len(names)]].set()
                    await asyncio.sleep(0)
                if "cancel" in step:
                    downloads.tasks[names[(choice + 1) % len(names)]].cancel()
        await settle()
        waiting = [name for name, task in downloads.tasks.items() if not task.done() and name not in downloads.holding]
        assert not waiting or len(downloads.holding) == count
        await downloads.end_all()
        assert downloads.slots.free == count
        assert not [task for task in downloads.tasks.values() if not task.cancelled() and task.exception()]

    asyncio.run(run())


# Rates


class Clock:
    """A clock that stops until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def throttled_slots(
    max_requests_per_s: float | None = None, max_bytes_per_s: float | None = None
) -> tuple[DownloadSlots, Clock]:
    """Slots whose rates allow nothing until the clock moves."""
    clock = Clock()
    slots = DownloadSlots(AdaptiveConcurrency(4, 4), RateLimit(max_requests_per_s, max_bytes_per_s, clock()), clock)
    while slots.rate.wait_s(clock()) <= 0:
        slots.rate.consume(1, 1000, clock())
    return slots, clock


async def test_a_prefetch_waits_for_the_rate_and_starts_as_soon_as_it_allows() -> None:
    slots = DownloadSlots(AdaptiveConcurrency(4, 4), RateLimit(100.0, None, time.monotonic()))
    started_s = time.monotonic()
    for _ in range(15):
        ticket = Ticket(slots, is_demand=False)
        await slots.acquire(ticket)
        ticket.request_sent()
        slots.release(ticket)
    assert time.monotonic() - started_s >= 0.09  # five at once, ten at 100 per second
    assert 0.05 < slots.throttled_s < 1
    assert slots.in_use == 0


async def test_a_demand_does_not_wait_for_the_rates_and_prefetches_pay_its_debt() -> None:
    slots, clock = throttled_slots(10.0)
    prefetch = asyncio.create_task(slots.acquire(Ticket(slots, is_demand=False)))
    await settle()
    for _ in range(3):
        await asyncio.wait_for(slots.acquire(Ticket(slots, is_demand=True)), 1)
    assert not prefetch.done()
    assert slots.rate.wait_s(clock()) == pytest.approx(0.3, abs=0.11)
    prefetch.cancel()


async def test_a_prefetch_that_waits_for_the_rate_starts_at_once_if_it_is_promoted() -> None:
    slots, _ = throttled_slots(1.0)
    prefetch = asyncio.create_task(slots.acquire(ticket := Ticket(slots, is_demand=False)))
    await settle()
    assert not prefetch.done()
    slots.promote(ticket)
    await asyncio.wait_for(prefetch, 1)
    assert slots.in_use == 1


async def test_a_page_of_a_listing_is_requested_before_the_prefetches_that_wait() -> None:
    slots, clock = throttled_slots(1000.0)
    prefetch = asyncio.create_task(slots.acquire(Ticket(slots, is_demand=False)))
    await settle()
    before_s = slots.rate.wait_s(clock())
    await slots.page()
    assert slots.rate.wait_s(clock()) == pytest.approx(before_s + 0.001, abs=1e-6)
    assert not prefetch.done()
    prefetch.cancel()


async def test_unused_prepaid_tokens_are_refunded() -> None:
    slots, clock = throttled_slots(1000.0, 1e6)
    before_s = slots.rate.wait_s(clock())
    for size_bytes in (0, 5000):
        await slots.acquire(ticket := Ticket(slots, is_demand=True, size_bytes=size_bytes))
        assert slots.rate.wait_s(clock()) > before_s
        slots.release(ticket)
    assert slots.rate.wait_s(clock()) == pytest.approx(before_s)


async def test_a_retry_and_bytes_of_unknown_number_consume_tokens_when_they_happen() -> None:
    slots, clock = throttled_slots(None, 1e6)
    before_s = slots.rate.wait_s(clock())
    await slots.acquire(ticket := Ticket(slots, is_demand=True, size_bytes=4000))
    for received_bytes in (1000, 4000):
        ticket.request_sent()
        ticket.attempt_ended(Outcome(0.1, received_bytes, is_success=received_bytes == 4000))
    slots.release(ticket)
    assert slots.rate.wait_s(clock()) == pytest.approx(before_s + 0.005)


async def test_while_prefetches_wait_for_the_rate_no_slot_counts_as_free() -> None:
    slots, _ = throttled_slots(1.0)
    assert slots.free == 4
    prefetch = asyncio.create_task(slots.acquire(Ticket(slots, is_demand=False)))
    await settle()
    assert slots.free == 0
    prefetch.cancel()


async def test_throttled_time_is_counted_until_no_prefetch_waits_for_the_rate() -> None:
    slots, clock = throttled_slots(1.0)
    prefetch = asyncio.create_task(slots.acquire(ticket := Ticket(slots, is_demand=False)))
    await settle()
    clock.now_s += 0.5
    slots.promote(ticket)
    await prefetch
    clock.now_s += 10
    assert slots.throttled_s == 0.5


async def test_new_limits_hold_at_once() -> None:
    slots = DownloadSlots(AdaptiveConcurrency(2, 2), RateLimit(1.0, None, time.monotonic()))
    slots.rate.consume(1000, 0, time.monotonic())
    prefetches = {asyncio.create_task(slots.acquire(Ticket(slots, is_demand=False))) for _ in range(6)}
    await settle()
    assert slots.in_use == 0
    slots.rate.consume(-1000, 0, time.monotonic())
    slots.set_limits(2, 2, None, None)
    for expected in (2, 4):
        slots.set_limits(expected, expected, None, None)
        async with asyncio.timeout(10):
            while sum(prefetch.done() for prefetch in prefetches) < expected:
                await settle()
        assert slots.in_use == expected
    for prefetch in prefetches:
        prefetch.cancel()


# The limit


async def test_a_demand_gets_a_slot_above_a_limit_that_was_lowered() -> None:
    slots = DownloadSlots(AdaptiveConcurrency(1, 8), RateLimit())
    tickets = [Ticket(slots, is_demand=False) for _ in range(8)]
    for ticket in tickets:
        await slots.acquire(ticket)
    while slots.concurrency.limit > 4:
        tickets[0].attempt_ended(Outcome(is_throttled=True))
    slots.release(tickets[0])
    prefetch = asyncio.create_task(slots.acquire(Ticket(slots, is_demand=False)))
    await settle()
    assert not prefetch.done()
    await asyncio.wait_for(slots.acquire(Ticket(slots, is_demand=True)), 1)
    prefetch.cancel()


async def test_a_limit_that_is_raised_lets_more_downloads_start_at_once() -> None:
    slots = DownloadSlots(AdaptiveConcurrency(1, 200), RateLimit())
    for _ in range(128):
        await slots.acquire(Ticket(slots, is_demand=False))
    prefetch = asyncio.create_task(slots.acquire(Ticket(slots, is_demand=False)))
    await settle()
    assert not prefetch.done()
    ticket = Ticket(slots, is_demand=False)
    while slots.concurrency.limit == 128:
        ticket.attempt_ended(Outcome(0.03, 1000, is_success=True))
    await asyncio.wait_for(prefetch, 1)


# A slot is for a request


async def test_the_next_download_starts_while_a_received_object_is_published() -> None:
    slots = slots_of(1)
    first, second = Ticket(slots, is_demand=False), Ticket(slots, is_demand=False)
    await slots.acquire(first)
    waiting = asyncio.create_task(slots.acquire(second))
    await settle()
    assert not waiting.done()

    first.attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    await waiting
    assert (slots.in_use, slots.publishing) == (1, 1)
    slots.release(first)
    assert (slots.in_use, slots.publishing) == (1, 0)
    slots.release(second)
    assert (slots.in_use, slots.publishing) == (0, 0)


async def test_a_failed_attempt_keeps_its_slot() -> None:
    slots = slots_of(1)
    ticket = Ticket(slots, is_demand=False)
    await slots.acquire(ticket)
    ticket.attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=False))
    assert slots.free == 0


async def test_a_slow_disk_delays_requests_once_enough_objects_wait_for_it() -> None:
    slots = slots_of(1)
    for _ in range(MAX_PUBLISHING):
        ticket = Ticket(slots, is_demand=False)
        await slots.acquire(ticket)
        ticket.attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    last = Ticket(slots, is_demand=False)
    await slots.acquire(last)
    last.attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    assert (slots.free, slots.publishing) == (0, MAX_PUBLISHING)
    slots.release(last)
    assert slots.free == 1


async def test_an_object_that_is_downloaded_twice_returns_its_slot_once() -> None:
    """As when a fetch process stops before it has published what it received."""
    slots = slots_of(2)
    ticket = Ticket(slots, is_demand=False)
    await slots.acquire(ticket)
    ticket.attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    slots.reacquire(ticket)
    assert (slots.in_use, slots.publishing) == (1, 0)
    ticket.attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    assert (slots.in_use, slots.publishing) == (0, 1)
    slots.release(ticket)
    assert (slots.in_use, slots.publishing) == (0, 0)
