"""Who downloads next."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcs_prefetchd.slots import Slots, Turn


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


class Downloads:
    """Tasks that hold a slot until they are told to end; `order` says who got one when."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.slots = Slots(count)
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
            self.slots.release()


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
    slots = Slots(1)
    await slots.acquire(Turn(demand=False))
    promoted, following = Turn(demand=False), Turn(demand=False)
    slots.promote(promoted)
    tasks = [asyncio.create_task(slots.acquire(turn)) for turn in (following, promoted)]
    await settle()
    slots.release()
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert [task.done() for task in tasks] == [False, True]
    slots.release()
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
    slots = Slots(1)
    await slots.acquire(Turn(demand=True))
    cancelled = asyncio.create_task(slots.acquire(Turn(demand=True)))
    following = asyncio.create_task(slots.acquire(Turn(demand=False)))
    await settle()
    slots.release()
    cancelled.cancel()
    await asyncio.wait_for(following, 10)
    assert cancelled.cancelled()
    assert slots.free == 0
    slots.release()
    assert slots.free == 1


async def test_a_waiter_cancelled_as_its_turn_comes_frees_the_slot_where_nobody_waits() -> None:
    slots = Slots(1)
    await slots.acquire(Turn(demand=True))
    cancelled = asyncio.create_task(slots.acquire(Turn(demand=False)))
    await settle()
    slots.release()
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
