"""The limit of downloads at a time, told of outcomes alone."""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from gcs_prefetchd.fetch.adaptive_concurrency import CHANGE_REASONS, SHORTEST_ROUND, START, Limit
from gcs_prefetchd.gcs.retry import Outcome

RTT_S = 0.03


def good(seconds: float) -> Outcome:
    return Outcome(seconds, 1000, is_success=True)


REFUSED = Outcome(is_throttled=True)
FAILED = Outcome(1.0)


def tell(limit: Limit, outcomes: Iterable[Outcome], in_use: int | None = None) -> None:
    for outcome in outcomes:
        limit.note(outcome, limit.now if in_use is None else in_use)


def round_of(limit: Limit, outcome: Outcome) -> list[Outcome]:
    return [outcome] * max(limit.now, SHORTEST_ROUND)


def begun(least: int, most: int) -> Limit:
    """A limit after its first round, which is a short one."""
    limit = Limit(least, most)
    tell(limit, [good(RTT_S)] * (SHORTEST_ROUND + limit.now), in_use=0)
    return limit


# Rules


@pytest.mark.parametrize(("least", "most", "start"), [(1, 256, START), (1, 64, 64), (200, 256, 200), (7, 7, 7)])
def test_it_starts_where_a_cold_cache_fills_fast_but_within_its_bounds(least: int, most: int, start: int) -> None:
    limit = Limit(least, most)
    assert (limit.now, limit.last_change_reason) == (start, "initial")


def test_it_rises_by_a_few_a_round_while_answers_stay_fast_and_every_slot_is_in_use() -> None:
    limit = begun(1, 256)
    tell(limit, round_of(limit, good(RTT_S)))
    assert (limit.now, limit.last_change_reason) == (START + 4, "increased")
    for _ in range(40):
        tell(limit, round_of(limit, good(RTT_S)))
    assert limit.now == 256


def test_it_stays_where_slots_are_free_however_fast_or_slow_answers_are() -> None:
    limit = begun(1, 256)
    for seconds in (RTT_S, RTT_S, 10 * RTT_S):
        tell(limit, round_of(limit, good(seconds)), in_use=START - 1)
    assert (limit.now, limit.last_change_reason) == (START, "initial")


@pytest.mark.parametrize(("refused_in_8", "falls_to"), [(1, 112), (4, 64), (7, 64), (8, 64)])
def test_it_falls_the_further_the_more_is_refused_and_never_below_half(refused_in_8: int, falls_to: int) -> None:
    limit = begun(1, 256)
    outcomes = [REFUSED] * refused_in_8 + [good(RTT_S)] * (8 - refused_in_8)
    tell(limit, outcomes * (START // 8))
    assert (limit.now, limit.last_change_reason) == (falls_to, "throttled_by_gcs")


def test_what_was_sent_before_a_fall_counts_for_nothing() -> None:
    limit = begun(1, 256)
    tell(limit, [REFUSED] * START)
    tell(limit, [REFUSED] * START)
    assert limit.now == 64


def test_after_a_refusal_it_waits_before_it_rises() -> None:
    limit = begun(1, 64)
    tell(limit, round_of(limit, REFUSED))
    tell(limit, [good(RTT_S)] * 64)
    levels = []
    for _ in range(25):
        tell(limit, round_of(limit, good(RTT_S)))
        levels.append(limit.now)
    assert levels == [32] * 19 + [36, 40, 44, 48, 52, 56]


def test_it_falls_where_answers_take_longer_for_standing_in_a_line() -> None:
    limit = begun(1, 128)
    tell(limit, round_of(limit, good(4 * RTT_S)))
    assert (limit.now, limit.last_change_reason) == (64, "queueing")


def test_it_goes_back_where_a_fall_made_answers_no_faster() -> None:
    """The way to GCS became longer, which no limit shortens."""
    limit = begun(1, 128)
    tell(limit, round_of(limit, good(4 * RTT_S)))
    assert limit.now == 64
    tell(limit, [good(4 * RTT_S)] * 128)
    tell(limit, round_of(limit, good(4 * RTT_S)))
    assert limit.now == 128
    for _ in range(10):
        tell(limit, round_of(limit, good(4 * RTT_S)))
    assert limit.now == 128


def test_other_failures_say_nothing_of_it() -> None:
    limit = begun(1, 256)
    for _ in range(5):
        tell(limit, round_of(limit, FAILED))
    assert (limit.now, limit.last_change_reason) == (START, "initial")


def test_it_keeps_to_its_bounds_and_to_new_ones_at_once() -> None:
    limit = begun(16, 256)
    for _ in range(20):
        tell(limit, round_of(limit, REFUSED))
    assert limit.now == 16
    limit.bound(32, 64)
    assert (limit.now, limit.last_change_reason) == (32, "setting_changed")
    limit.bound(1, 8)
    assert (limit.now, limit.last_change_reason) == (8, "setting_changed")


def test_every_why_is_told() -> None:
    assert set(CHANGE_REASONS) == {"initial", "setting_changed", "increased", "throttled_by_gcs", "queueing"}


# Simulations: what it makes of a server


@dataclass
class Simulation:
    """A client that always has more to ask for, and a server in simulated time.

    `serve` says at a time how long the request that comes takes, None where it is refused; refused ones are tried again after
    `backoff_s` on average, and hold their slot meanwhile.
    """

    serve: Callable[[float], float | None]
    limit: Limit
    backoff_s: float = 0.1
    refusal_s: float = RTT_S
    now_s: float = 0.0
    done: list[float] = field(default_factory=list)
    refusals: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    events: list[tuple[float, int, float, bool]] = field(default_factory=list)
    numbers: Iterable[int] = field(default_factory=itertools.count)
    in_use: int = 0

    def run(self, seconds: float) -> float:
        """Go on for so long; returns what was served a second meanwhile."""
        end_s, before = self.now_s + seconds, len(self.done)
        while True:
            while self.in_use < self.limit.now:
                self.in_use += 1
                self.send(self.now_s)
            at_s, _, sent_s, is_success = heapq.heappop(self.events)
            if at_s > end_s:
                heapq.heappush(self.events, (at_s, -1, sent_s, is_success))
                self.now_s = end_s
                return (len(self.done) - before) / seconds
            self.now_s = at_s
            if sent_s > at_s:  # the end of a wait
                self.send(at_s)
                continue
            self.limit.note(Outcome(at_s - sent_s, 1000, not is_success, is_success), self.in_use)
            if is_success:
                self.in_use -= 1
                self.done.append(at_s)
            else:
                self.refusals += 1
                at_s += self.chance.random() * 2 * self.backoff_s
                self.push(at_s, math.inf, is_success=False)

    def send(self, now_s: float) -> None:
        seconds = self.serve(now_s)
        self.push(now_s + (self.refusal_s if seconds is None else seconds), now_s, is_success=seconds is not None)

    def push(self, at_s: float, sent_s: float, *, is_success: bool) -> None:
        heapq.heappush(self.events, (at_s, next(iter(self.numbers)), sent_s, is_success))


def lognormal(sigma: float) -> Callable[[float], float]:
    """Latencies of GCS: a median of 30 ms and a tail."""
    source = random.Random(7)
    return lambda now_s: RTT_S * math.exp(source.gauss(0.0, sigma))


def in_line(at_once: int, latency: Callable[[float], float]) -> Callable[[float], float]:
    """A server that serves so many at a time; the others stand in a line."""
    free_s = [0.0] * at_once

    def serve(now_s: float) -> float:
        start_s = max(now_s, heapq.heappop(free_s))
        end_s = start_s + latency(now_s)
        heapq.heappush(free_s, end_s)
        return end_s - now_s

    return serve


def shared_link(per_s: float) -> Callable[[float], float]:
    """A link that every request shares: all of them are slower the more there are, the first ones too."""
    ends_s: list[float] = []

    def serve(now_s: float) -> float:
        while ends_s and ends_s[0] <= now_s:
            heapq.heappop(ends_s)
        seconds = max(RTT_S, (len(ends_s) + 1) / per_s)
        heapq.heappush(ends_s, now_s + seconds)
        return seconds

    return serve


def at_most(per_s: float, latency: Callable[[float], float], burst: float = 20.0) -> Callable[[float], float | None]:
    """A server that refuses what comes faster."""
    state = [burst, 0.0]

    def serve(now_s: float) -> float | None:
        state[0] = min(burst, state[0] + (now_s - state[1]) * per_s)
        state[1] = now_s
        if state[0] < 1:
            return None
        state[0] -= 1
        return latency(now_s)

    return serve


def best_fixed(server: Callable[[], Callable[[float], float | None]], seconds: float) -> float:
    """What the best limit that never moves gets."""
    rates = []
    for level in (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        simulation = Simulation(server(), Limit(level, level))
        simulation.run(3.0)
        rates.append(simulation.run(seconds))
    return max(rates)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("at_once", [2, 8, 40, 100])
def test_a_server_that_serves_few_at_a_time_is_found_in_seconds_and_kept_busy(at_once: int, sigma: float) -> None:
    def server() -> Callable[[float], float]:
        return in_line(at_once, lognormal(sigma))

    simulation = Simulation(server(), Limit(1, 256))
    simulation.run(2.0 + 30 / at_once)
    assert simulation.limit.now <= max(3 * at_once, at_once + 6)
    assert simulation.run(30.0) >= 0.9 * best_fixed(server, 10.0)
    assert simulation.limit.now <= max(3 * at_once, at_once + 6)


@pytest.mark.parametrize("per_s", [300.0, 2000.0])
def test_a_shared_link_is_found_too_where_no_answer_was_ever_fast(per_s: float) -> None:
    simulation = Simulation(shared_link(per_s), Limit(1, 256))
    simulation.run(60.0)
    assert simulation.limit.now <= 3 * per_s * RTT_S
    assert simulation.run(60.0) >= 0.9 * per_s


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("per_s", [200.0, 1000.0, 3000.0])
def test_a_server_that_refuses_what_comes_too_fast_is_found_in_seconds_and_used(per_s: float, sigma: float) -> None:
    def server() -> Callable[[float], float | None]:
        return at_most(per_s, lognormal(sigma))

    simulation = Simulation(server(), Limit(1, 256))
    simulation.run(5.0)
    simulation.refusals = 0
    rate = simulation.run(30.0)
    assert rate >= 0.9 * best_fixed(server, 10.0)
    assert simulation.refusals < 0.05 * 30 * rate


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6])
def test_a_server_that_is_never_busy_is_asked_for_as_much_as_is_allowed(sigma: float) -> None:
    fixed = Simulation(lognormal(sigma), Limit(256, 256)).run(20.0)
    simulation = Simulation(lognormal(sigma), Limit(1, 256))
    simulation.run(5.0)
    assert simulation.run(20.0) >= 0.95 * fixed


def test_a_cold_fill_is_as_fast_from_the_first_request_on_as_with_128() -> None:
    fixed = Simulation(lognormal(0.5), Limit(128, 128)).run(1.0)
    assert Simulation(lognormal(0.5), Limit(1, 256)).run(1.0) >= fixed


def test_it_comes_back_after_an_outage() -> None:
    latency = lognormal(0.5)
    simulation = Simulation(lambda now_s: None if 5 <= now_s < 15 else latency(now_s), Limit(4, 256))
    before = simulation.run(5.0)
    assert simulation.run(10.0) < 0.1 * before
    assert simulation.limit.now == 4
    simulation.run(10.0)
    assert simulation.run(5.0) >= 0.9 * before
