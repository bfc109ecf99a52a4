"""Seeded orders. Their values are frozen: a run resumed with a newer version must continue the order that it started."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from gcs_prefetchd.shared.epoch_order import Indices, endless_order, epoch_order, order_digest, plan_order, share_length

LARGEST = 2**63 - 1

seeds = st.integers(0, LARGEST)
subsets = st.sets(st.integers(0, 2**32 - 1), max_size=200)


def indices(count: int) -> Indices:
    return np.arange(count, dtype=np.uint32)


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [
        (0, 0, [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]),
        (0, 1, [8, 3, 0, 1, 5, 2, 7, 4, 9, 6]),
        (1, 0, [2, 5, 8, 9, 1, 4, 6, 0, 3, 7]),
        (42, 7, [4, 8, 7, 1, 2, 0, 6, 5, 9, 3]),
        (LARGEST, 0, [3, 8, 9, 0, 2, 4, 5, 1, 7, 6]),
        (0, LARGEST, [8, 2, 3, 0, 5, 1, 6, 4, 7, 9]),
        (LARGEST, LARGEST, [6, 3, 8, 1, 9, 5, 7, 0, 2, 4]),
    ],
)
def test_an_epochs_order_never_changes(seed: int, epoch: int, order: list[int]) -> None:
    assert epoch_order(seed, epoch, indices(10)).tolist() == order


@pytest.mark.parametrize(
    ("seed", "start", "items", "drawn"),
    [
        (0, 0, 10, [3, 4, 4, 3, 5, 2]),
        (1, 0, 10, [5, 5, 1, 2, 3, 6]),
        (LARGEST, 2**40, 1000, [683, 182, 836, 790, 10, 708]),
        (7, 123, 2**32 - 1, [2890451814, 182023492, 1948955375, 2492543860, 4283814480, 1547842456]),
    ],
)
def test_the_endless_stream_never_changes(seed: int, start: int, items: int, drawn: list[int]) -> None:
    assert endless_order(seed, start, len(drawn), items).tolist() == drawn


def test_the_digests_never_change() -> None:
    assert order_digest(indices(0)) == "e4a6a0577479b2b4"
    assert order_digest(indices(10)) == "ebd6ba31423362f8"
    assert order_digest(epoch_order(3, 5, indices(1000))) == "e8b635835233cfd3"


@given(seeds, seeds, subsets)
def test_the_order_equals_splitmix64_in_plain_integers(seed: int, epoch: int, items: set[int]) -> None:
    """The same function without numpy: sorted by the upper half of the hash, then by the index."""
    key = splitmix64(splitmix64(seed) ^ epoch)
    order = epoch_order(seed, epoch, np.array(list(items), dtype=np.uint32))
    assert order.tolist() == sorted(items, key=lambda item: (splitmix64(item ^ key) >> 32, item))


def test_items_with_equal_upper_hash_bits_are_ordered_by_index() -> None:
    """Among a million items there are about a hundred such pairs: every subset still has the same order."""
    order = epoch_order(3, 1, indices(1_000_000))
    backwards = epoch_order(3, 1, indices(1_000_000)[::-1])
    evens = epoch_order(3, 1, indices(1_000_000)[::2])
    assert order.tolist() == backwards.tolist()
    assert evens.tolist() == [item for item in order.tolist() if item % 2 == 0]
    assert order_digest(order) == "a85fdd5e5b40ec5a"


def test_the_hash_is_the_published_splitmix64() -> None:
    """The first outputs for the seed 1234567, from Vigna's reference implementation."""
    golden, state = 0x9E3779B97F4A7C15, 1234567
    outputs = [splitmix64((state + step * golden) % 2**64) for step in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(seeds, seeds, subsets)
def test_an_epoch_has_every_item_once(seed: int, epoch: int, items: set[int]) -> None:
    order = epoch_order(seed, epoch, np.array(list(items), dtype=np.uint32))
    assert sorted(order.tolist()) == sorted(items)
    assert order.dtype == np.uint32


@given(seeds, seeds, subsets, st.data())
def test_the_order_of_a_subset_is_the_order_of_all_without_the_others(
    seed: int, epoch: int, items: set[int], data: st.DataObject
) -> None:
    complete = sorted(items)
    subset = {item for item in complete if data.draw(st.booleans())}
    order = epoch_order(seed, epoch, np.array(complete, dtype=np.uint32)).tolist()
    of_subset = epoch_order(seed, epoch, np.array(sorted(subset, reverse=True), dtype=np.uint32)).tolist()
    assert of_subset == [item for item in order if item in subset]


@given(seeds, st.integers(0, 2**40), st.integers(1, 2**32 - 1), st.lists(st.integers(0, 50), max_size=8))
def test_the_endless_stream_is_the_same_in_whatever_chunks_it_is_read(
    seed: int, start: int, items: int, chunks: list[int]
) -> None:
    at_once = endless_order(seed, start, sum(chunks), items).tolist()
    in_chunks: list[int] = []
    for count in chunks:
        in_chunks += endless_order(seed, start + len(in_chunks), count, items).tolist()
    assert in_chunks == at_once
    assert all(0 <= item < items for item in at_once)


def test_computing_an_order_does_not_change_the_indices() -> None:
    given_indices = indices(100)
    epoch_order(1, 2, given_indices)
    endless_order(1, 0, 100, 10)
    assert given_indices.tolist() == list(range(100))


@pytest.mark.parametrize("seed", [0, 1, 2**32, LARGEST])
def test_every_item_is_as_often_early_as_late(seed: int) -> None:
    """20 items, 4,000 epochs, tenths of an epoch: chi-square with 171 degrees of freedom; 6 sigma never happens by chance."""
    items, epochs, tenths = 20, 4000, 10
    counts = np.zeros((items, tenths))
    for epoch in range(epochs):
        for place, item in enumerate(epoch_order(seed, epoch, indices(items)).tolist()):
            counts[item, place * tenths // items] += 1
    expected = epochs / tenths
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = (items - 1) * (tenths - 1)
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, LARGEST])
def test_neighbours_in_one_epoch_are_not_neighbours_in_the_next(seed: int) -> None:
    """Two epochs, and two seeds, agree at no more positions than by chance: one on average."""
    count = 5000
    first, *others = (
        epoch_order(*key, indices(count)) for key in [(seed, 0), (seed, 1), (seed, 2**40), (seed ^ 1, 0), (seed ^ 1, 1)]
    )
    following = dict(zip(first[:-1].tolist(), first[1:].tolist(), strict=True))
    for other in others:
        assert int((first == other).sum()) < 10
        assert sum(following.get(a) == b for a, b in zip(other[:-1].tolist(), other[1:].tolist(), strict=True)) < 10


@pytest.mark.parametrize("items", [3, 10, 1000])
def test_the_endless_stream_draws_every_item_equally_often(items: int) -> None:
    draws = 200_000
    counts = np.bincount(endless_order(5, 0, draws, items), minlength=items)
    chi_square = float(((counts - draws / items) ** 2 / (draws / items)).sum())
    assert abs(chi_square - (items - 1)) < 6 * (2 * (items - 1)) ** 0.5 + 6


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_different_orders_have_different_digests(one: list[int], other: list[int]) -> None:
    first, second = (np.array(order, dtype=np.uint32) for order in (one, other))
    assert (order_digest(first) == order_digest(second)) == (one == other)


def test_the_digest_depends_on_the_values_and_not_on_their_memory_layout() -> None:
    order = epoch_order(0, 0, indices(100))
    swapped = order.astype(">u4")
    spread = np.repeat(order, 2)[::2]
    assert order_digest(swapped) == order_digest(spread) == order_digest(order)
    assert order_digest(order[::-1]) != order_digest(order)


LARGE = """
import pathlib, time
import numpy as np
from gcs_prefetchd.shared.epoch_order import plan_order
indices = np.arange(10_000_000, dtype=np.uint32)
started_s = time.process_time()
order = plan_order(KIND, 1, 2, indices)
seconds = time.process_time() - started_s
# Not ru_maxrss, which starts with the value of the parent process.
peak = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) / 1024, len(order))
"""


@pytest.mark.parametrize("kind", ["shuffled", "endless"])
def test_ten_million_items_take_seconds_and_little_memory(kind: str) -> None:
    """Under 3 s of one processor, and 200 MB for the process, including the indices."""
    script = LARGE.replace("KIND", repr(kind))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    seconds, megabytes, count = map(float, done.stdout.split())
    assert count == 10_000_000
    assert seconds < 3
    assert megabytes < 200


# --- Shares

kinds = st.sampled_from(["shuffled", "endless", "listed"])
items_of_a_plan = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@st.composite
def splits(draw: st.DrawFn) -> tuple[str, int, int, Indices]:
    """The arguments of a global order."""
    return draw(kinds), draw(seeds), draw(st.integers(0, 2**40)), np.array(draw(items_of_a_plan), dtype=np.uint32)


@pytest.mark.parametrize(
    ("kind", "options", "order"),
    [
        ("shuffled", {}, [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]),
        ("shuffled", {"rank": 1, "world": 4}, [9, 5, 7]),
        ("shuffled", {"rank": 3, "world": 4}, [6, 2, 9]),
        ("shuffled", {"rank": 3, "world": 4, "drop_last": True}, [6, 2]),
        ("shuffled", {"rank": 1, "world": 3, "start": 4}, [5, 8]),
        ("shuffled", {"rank": 2, "world": 4, "start": 8}, [8]),
        ("endless", {}, [3, 4, 4, 3, 5, 2, 7, 6, 4, 1]),
        ("listed", {"rank": 1, "world": 3}, [1, 4, 7, 0]),
    ],
)
def test_a_share_never_changes(kind: str, options: dict[str, int], order: list[int]) -> None:
    assert plan_order(kind, 0, 0, indices(10), **options).tolist() == order  # type: ignore[arg-type]


@given(splits(), st.integers(1, 9), st.booleans())
def test_shares_are_as_long_as_those_of_torchs_distributed_sampler(
    plan: tuple[str, int, int, Indices], world: int, drop_last: bool
) -> None:
    """They also repeat and omit the same positions."""
    kind, seed, epoch, items = plan
    complete = plan_order(kind, seed, epoch, items).tolist()
    for rank in range(world):
        torchs: DistributedSampler[int] = DistributedSampler(complete, world, rank, shuffle=False, drop_last=drop_last)
        share = plan_order(kind, seed, epoch, items, rank=rank, world=world, drop_last=drop_last)
        assert len(share) == share_length(len(items), world, drop_last)
        if len(items) >= world or not drop_last:  # torch's own arithmetic fails if there are fewer items than ranks
            assert share.tolist() == [complete[position] for position in torchs]
        else:
            assert share.tolist() == []


@given(splits(), st.integers(1, 9))
def test_the_ranks_interleaved_are_the_global_order(plan: tuple[str, int, int, Indices], world: int) -> None:
    kind, seed, epoch, items = plan
    complete = plan_order(kind, seed, epoch, items).tolist()
    shares = [plan_order(kind, seed, epoch, items, rank=rank, world=world).tolist() for rank in range(world)]
    together = [item for turn in zip(*shares, strict=True) for item in turn]
    assert together[: len(complete)] == complete
    assert together[len(complete) :] == (complete * world)[: len(together) - len(complete)]
    if kind != "endless":
        assert sorted(together[: len(complete)]) == sorted(items.tolist())


@given(splits(), st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), max_size=5))
def test_a_run_resumed_with_another_world_continues_the_same_global_order(
    plan: tuple[str, int, int, Indices], runs: list[tuple[int, int]]
) -> None:
    """Each run reads some rounds of all its ranks and stops; the last run reads the rest."""
    kind, seed, epoch, items = plan
    complete = plan_order(kind, seed, epoch, items).tolist()
    read: list[int] = []
    for world, rounds in [*runs, (1, len(complete))]:
        shares = [
            plan_order(kind, seed, epoch, items, rank=rank, world=world, start=len(read)).tolist() for rank in range(world)
        ]
        left = len(complete) - len(read)
        read += [item for turn in zip(*shares, strict=True) for item in turn][: min(rounds * world, left)]
    assert read == complete


@given(splits(), st.integers(1, 9), st.integers(0, 100))
def test_a_share_is_a_copy_or_the_indices_themselves(plan: tuple[str, int, int, Indices], world: int, start: int) -> None:
    """A view would keep the complete order in memory."""
    kind, seed, epoch, items = plan
    before = items.copy()
    for rank in range(world):
        share = plan_order(kind, seed, epoch, items, rank=rank, world=world, start=start)
        assert share is items or share.base is None or len(share) == len(items)
        assert share.dtype == np.uint32
    assert (items == before).all()


def test_the_epochs_of_an_endless_stream_are_its_blocks() -> None:
    drawn = np.concatenate([plan_order("endless", 7, epoch, 100 + indices(10)) for epoch in range(3)])
    assert drawn.tolist() == (100 + endless_order(7, 0, 30, 10)).tolist()


@pytest.mark.parametrize("kind", ["shuffled", "endless", "listed"])
def test_the_last_epoch_of_all_has_an_order(kind: str) -> None:
    assert len(plan_order(kind, LARGEST, LARGEST, indices(10), start=3)) == 7


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind must be 'listed', 'shuffled' or 'endless', not 'random'"):
        plan_order("random", 0, 0, indices(3))


def splitmix64(value: int) -> int:
    mask = 2**64 - 1
    mixed = (value + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)
