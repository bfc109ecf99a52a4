"""Who downloads next."""

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcs_prefetchd.fetch.adaptive_concurrency import Limit
from gcs_prefetchd.fetch.download_slots import MOST_PUBLISHING, Slots, Ticket, Turn
from gcs_prefetchd.fetch.rate_limit import Governor
from gcs_prefetchd.gcs.retry import Outcome
from support.caches import slots_of


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


class Downloads:
    """Tasks that hold a slot until they are told to end; `order` says who got one when."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.slots = slots_of(count)
        self.order: list[str] = []
        self.holding: set[str] = set()
        self.turns: dict[str, Turn] = {}
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, *, demand: bool) -> None:
        self.ends[name] = asyncio.Event()
        self.turns[name] = Turn(demand)
        self.tasks[name] = asyncio.create_task(self._download(name))

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await settle()

    async def end_all(self) -> None:
        for event in self.ends.values():
            event.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    async def _download(self, name: str) -> None:
        await self.slots.acquire(self.turns[name])
        try:
            self.order.append(name)
            self.holding.add(name)
            assert len(self.holding) <= self.count
            await self.ends[name].wait()
        finally:
            self.holding.discard(name)
            self.slots.release(self.turns[name])


async def test_no_more_than_the_slots_are_held() -> None:
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


async def test_demand_goes_before_prefetch_and_each_in_the_order_it_came() -> None:
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


async def test_a_prefetch_that_a_reader_waits_for_goes_on_in_the_line_of_demands() -> None:
    downloads = Downloads(1)
    downloads.start("first", demand=False)
    await settle()
    for name, demand in [("p1", False), ("p2", False), ("p3", False), ("d1", True)]:
        downloads.start(name, demand=demand)
    await settle()
    downloads.slots.promote(downloads.turns["p2"])
    downloads.slots.promote(downloads.turns["p2"])
    downloads.start("d2", demand=True)
    await settle()
    for name in ("first", "d1", "p2", "d2", "p1", "p3"):
        await downloads.end(name)
    assert downloads.order == ["first", "d1", "p2", "d2", "p1", "p3"]
    assert downloads.slots.free == 1


async def test_to_promote_what_has_its_slot_already_changes_nothing() -> None:
    downloads = Downloads(1)
    downloads.start("first", demand=False)
    downloads.start("second", demand=False)
    await settle()
    downloads.slots.promote(downloads.turns["first"])
    await downloads.end("first")
    assert downloads.order == ["first", "second"]
    await downloads.end_all()
    assert downloads.slots.free == 1


async def test_a_turn_may_be_promoted_before_it_stands_in_line() -> None:
    slots = slots_of(1)
    await slots.acquire(first := Turn(demand=False))
    promoted, following = Turn(demand=False), Turn(demand=False)
    slots.promote(promoted)
    tasks = [asyncio.create_task(slots.acquire(turn)) for turn in (following, promoted)]
    await settle()
    slots.release(first)
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert [task.done() for task in tasks] == [False, True]
    slots.release(promoted)
    await tasks[0]


async def test_a_cancelled_waiter_is_passed_over() -> None:
    downloads = Downloads(1)
    for name in ("first", "cancelled", "next"):
        downloads.start(name, demand=True)
    await settle()
    downloads.tasks["cancelled"].cancel()
    await downloads.end("first")
    assert downloads.order == ["first", "next"]
    await downloads.end_all()
    assert downloads.slots.free == 1


async def test_a_waiter_cancelled_as_its_turn_comes_hands_the_slot_on() -> None:
    """Both within one turn of the loop: the slot is its own already, and it will never know."""
    slots = slots_of(1)
    await slots.acquire(first := Turn(demand=True))
    cancelled = asyncio.create_task(slots.acquire(Turn(demand=True)))
    following = asyncio.create_task(slots.acquire(next_turn := Turn(demand=False)))
    await settle()
    slots.release(first)
    cancelled.cancel()
    await asyncio.wait_for(following, 10)
    assert cancelled.cancelled()
    assert slots.free == 0
    slots.release(next_turn)
    assert slots.free == 1


async def test_a_waiter_cancelled_as_its_turn_comes_frees_the_slot_where_nobody_waits() -> None:
    slots = slots_of(1)
    await slots.acquire(first := Turn(demand=True))
    cancelled = asyncio.create_task(slots.acquire(Turn(demand=False)))
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
def test_whatever_happens_no_slot_is_lost_and_none_is_held_twice(count: int, steps: list[tuple[str, int]]) -> None:
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
                    downloads.slots.promote(downloads.turns[names[choice % len(names)]])
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
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def throttled_slots(
    max_requests_per_s: float | None = None, max_bytes_per_s: float | None = None, least: int = 4, most: int = 4
) -> tuple[Slots, Clock]:
    """Slots whose rates allow nothing more until the clock moves."""
    clock = Clock()
    slots = Slots(Limit(least, most), Governor(max_requests_per_s, max_bytes_per_s, clock()), clock)
    while slots.governor.wait_s(clock()) <= 0:
        slots.governor.spend(1, 1000, clock())
    return slots, clock


async def test_a_prefetch_waits_for_the_rate_and_goes_by_itself_when_it_may() -> None:
    slots = Slots(Limit(4, 4), Governor(100.0, None, time.monotonic()))
    began_s = time.monotonic()
    for _ in range(15):
        await slots.acquire(turn := Turn(demand=False))
        Ticket(slots, turn).request_sent()
        slots.release(turn)
    assert time.monotonic() - began_s >= 0.09  # five at once, ten at 100 a second
    assert 0.05 < slots.throttled_s < 1
    assert slots.in_use == 0


async def test_a_demand_waits_for_no_rate_and_prefetches_pay_its_debt() -> None:
    slots, clock = throttled_slots(10.0)
    prefetch = asyncio.create_task(slots.acquire(Turn(demand=False)))
    await settle()
    for _ in range(3):
        await asyncio.wait_for(slots.acquire(Turn(demand=True)), 1)
    assert not prefetch.done()
    assert slots.governor.wait_s(clock()) == pytest.approx(0.3, abs=0.11)
    prefetch.cancel()


async def test_a_prefetch_that_waits_for_the_rate_goes_at_once_where_a_reader_asks_for_it() -> None:
    slots, _ = throttled_slots(1.0)
    prefetch = asyncio.create_task(slots.acquire(turn := Turn(demand=False)))
    await settle()
    assert not prefetch.done()
    slots.promote(turn)
    await asyncio.wait_for(prefetch, 1)
    assert slots.in_use == 1


async def test_a_page_of_a_listing_goes_before_the_prefetches_that_wait() -> None:
    slots, clock = throttled_slots(1000.0)
    prefetch = asyncio.create_task(slots.acquire(Turn(demand=False)))
    await settle()
    before_s = slots.governor.wait_s(clock())
    await slots.page()
    assert slots.governor.wait_s(clock()) == pytest.approx(before_s + 0.001, abs=1e-6)
    assert not prefetch.done()
    prefetch.cancel()


async def test_what_was_spent_ahead_and_not_used_is_given_back() -> None:
    slots, clock = throttled_slots(1000.0, 1e6)
    before_s = slots.governor.wait_s(clock())
    for size_bytes in (0, 5000):
        await slots.acquire(turn := Turn(demand=True, size_bytes=size_bytes))
        assert slots.governor.wait_s(clock()) > before_s
        slots.release(turn)
    assert slots.governor.wait_s(clock()) == pytest.approx(before_s)


async def test_a_try_more_and_bytes_that_nobody_knew_of_are_spent_when_they_come() -> None:
    slots, clock = throttled_slots(None, 1e6)
    before_s = slots.governor.wait_s(clock())
    await slots.acquire(turn := Turn(demand=True, size_bytes=4000))
    ticket = Ticket(slots, turn)
    for received_bytes in (1000, 4000):
        ticket.request_sent()
        ticket.attempt_ended(Outcome(0.1, received_bytes, is_success=received_bytes == 4000))
    slots.release(turn)
    assert slots.governor.wait_s(clock()) == pytest.approx(before_s + 0.005)


async def test_while_prefetches_wait_for_the_rate_no_slot_is_free_for_another() -> None:
    slots, _ = throttled_slots(1.0)
    assert slots.free == 4
    prefetch = asyncio.create_task(slots.acquire(Turn(demand=False)))
    await settle()
    assert slots.free == 0
    prefetch.cancel()


async def test_the_time_that_prefetches_wait_for_the_rate_ends_with_the_last_of_them() -> None:
    slots, clock = throttled_slots(1.0)
    prefetch = asyncio.create_task(slots.acquire(turn := Turn(demand=False)))
    await settle()
    clock.now_s += 0.5
    slots.promote(turn)
    await prefetch
    clock.now_s += 10
    assert slots.throttled_s == 0.5


async def test_other_rates_and_bounds_hold_at_once() -> None:
    slots = Slots(Limit(2, 2), Governor(1.0, None, time.monotonic()))
    slots.governor.spend(1000, 0, time.monotonic())
    prefetches = {asyncio.create_task(slots.acquire(Turn(demand=False))) for _ in range(6)}
    await settle()
    assert slots.in_use == 0
    slots.governor.spend(-1000, 0, time.monotonic())
    slots.set_bounds(2, 2, None, None)
    for expected in (2, 4):
        slots.set_bounds(expected, expected, None, None)
        async with asyncio.timeout(10):
            while sum(prefetch.done() for prefetch in prefetches) < expected:
                await settle()
        assert slots.in_use == expected
    for prefetch in prefetches:
        prefetch.cancel()


# The limit


async def test_a_demand_gets_a_slot_above_a_limit_that_has_fallen() -> None:
    slots = Slots(Limit(1, 8), Governor())
    turns = [Turn(demand=False) for _ in range(8)]
    for turn in turns:
        await slots.acquire(turn)
    while slots.limit.now > 4:
        Ticket(slots, turns[0]).attempt_ended(Outcome(is_throttled=True))
    slots.release(turns[0])
    prefetch = asyncio.create_task(slots.acquire(Turn(demand=False)))
    await settle()
    assert not prefetch.done()
    await asyncio.wait_for(slots.acquire(Turn(demand=True)), 1)
    prefetch.cancel()


async def test_a_limit_that_rises_lets_more_begin_at_once() -> None:
    slots = Slots(Limit(1, 200), Governor())
    for _ in range(128):
        await slots.acquire(Turn(demand=False))
    prefetch = asyncio.create_task(slots.acquire(Turn(demand=False)))
    await settle()
    assert not prefetch.done()
    ticket = Ticket(slots, Turn(demand=False))
    while slots.limit.now == 128:
        ticket.attempt_ended(Outcome(0.03, 1000, is_success=True))
    await asyncio.wait_for(prefetch, 1)


# A slot is for a request


async def test_the_next_may_go_while_what_has_come_is_published() -> None:
    slots, first, second = slots_of(1), Turn(demand=False), Turn(demand=False)
    await slots.acquire(first)
    waiting = asyncio.create_task(slots.acquire(second))
    await settle()
    assert not waiting.done()

    Ticket(slots, first).attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    await waiting
    assert (slots.in_use, slots.publishing) == (1, 1)
    slots.release(first)
    assert (slots.in_use, slots.publishing) == (1, 0)
    slots.release(second)
    assert (slots.in_use, slots.publishing) == (0, 0)


async def test_a_try_that_failed_keeps_its_slot() -> None:
    slots, turn = slots_of(1), Turn(demand=False)
    await slots.acquire(turn)
    Ticket(slots, turn).attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=False))
    assert slots.free == 0


async def test_a_slow_disk_holds_requests_up_when_enough_waits_for_it() -> None:
    slots = slots_of(1)
    for _ in range(MOST_PUBLISHING):
        turn = Turn(demand=False)
        await slots.acquire(turn)
        Ticket(slots, turn).attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    last = Turn(demand=False)
    await slots.acquire(last)
    Ticket(slots, last).attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    assert (slots.free, slots.publishing) == (0, MOST_PUBLISHING)
    slots.release(last)
    assert slots.free == 1


async def test_what_comes_twice_gives_its_slot_back_once() -> None:
    """As where a fetch process was lost before it had published what it had."""
    slots, turn = slots_of(2), Turn(demand=False)
    await slots.acquire(turn)
    Ticket(slots, turn).attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    slots.again(turn)
    assert (slots.in_use, slots.publishing) == (1, 0)
    Ticket(slots, turn).attempt_ended(Outcome(0.03, 100, is_throttled=False, is_success=True))
    assert (slots.in_use, slots.publishing) == (0, 1)
    slots.release(turn)
    assert (slots.in_use, slots.publishing) == (0, 0)
