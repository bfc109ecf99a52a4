"""The next epochs' orders, prepared in threads."""

import asyncio
from dataclasses import dataclass, field

import pytest

from gcs_prefetchd.fetch.epoch_preparation import EpochPreparation
from gcs_prefetchd.planning.registry import Registry
from support.plans import manifest_of, plan_of

MANIFEST = manifest_of([f"{number:03}" for number in range(10)])


@dataclass
class Calls:
    """What a preparation reported."""

    started: int = 0
    known: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def on_started(self) -> None:
        self.started += 1

    def on_known(self) -> None:
        self.known += 1


@pytest.fixture
def registry() -> Registry:
    registry = Registry(7, 10**9)
    registry.set_manifest(registry.catalog.assign_numbers(MANIFEST))
    return registry


def preparation(registry: Registry) -> tuple[EpochPreparation, Calls]:
    calls = Calls()
    made = EpochPreparation(registry, on_started=calls.on_started, on_known=calls.on_known, on_idle=calls.idle.set)
    return made, calls


async def until_idle(epochs: EpochPreparation, calls: Calls) -> None:
    """Wait until nothing is being prepared."""
    while epochs.is_busy:
        calls.idle.clear()
        await asyncio.wait_for(calls.idle.wait(), 10)


async def test_a_seeded_epoch_that_is_due_is_prepared_and_started(registry: Registry) -> None:
    epochs, calls = preparation(registry)
    epochs.start_due()
    assert epochs.is_busy
    await until_idle(epochs, calls)
    assert calls.started == 1
    (seeded,) = registry
    assert seeded.is_seeded
    assert sorted(seeded.stream.epoch.order.tolist()) == list(range(10))


async def test_the_next_epoch_of_a_shuffled_plan_is_prepared_once(registry: Registry) -> None:
    plan, indices = plan_of(MANIFEST, range(10), kind="shuffled", seed=3)
    reader = registry.register(registry.prepare(plan, indices))
    epochs, calls = preparation(registry)
    for _ in range(3):
        epochs.start_due()
    await until_idle(epochs, calls)
    epochs.start_due()
    assert not epochs.is_busy
    assert (calls.started, calls.known) == (0, 1)
    assert reader.stream.next_epoch is not None


async def test_a_listed_plan_has_no_next_epoch_to_prepare(registry: Registry) -> None:
    plan, indices = plan_of(MANIFEST, range(10))
    registry.register(registry.prepare(plan, indices))
    epochs, _ = preparation(registry)
    epochs.start_due()
    assert not epochs.is_busy


async def test_an_epoch_that_was_prepared_too_late_is_discarded(registry: Registry) -> None:
    """The reader has started another epoch meanwhile."""
    plan, indices = plan_of(MANIFEST, range(10), kind="shuffled", seed=3)
    reader = registry.register(registry.prepare(plan, indices))
    epochs, calls = preparation(registry)
    epochs.start_due()
    await asyncio.sleep(0)  # the thread starts; its result is used no earlier than the event loop runs again
    plan, indices = plan_of(MANIFEST, range(10), kind="shuffled", seed=3, epoch=5)
    registry.register(registry.prepare(plan, indices))
    await until_idle(epochs, calls)
    assert calls.known == 0
    assert reader.stream.next_epoch is None


async def test_close_cancels_what_is_being_prepared(registry: Registry) -> None:
    epochs, calls = preparation(registry)
    epochs.start_due()
    await epochs.close()
    assert not epochs.is_busy
    assert calls.started == 0
