"""The adaptive limit of concurrent downloads, which sees nothing but outcomes."""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from gcs_prefetchd.fetch.adaptive_concurrency import CHANGE_REASONS, INITIAL_LIMIT, MIN_ROUND, AdaptiveConcurrency
from gcs_prefetchd.gcs.retry import Outcome

RTT_S = 0.03


def good(seconds: float) -> Outcome:
    return Outcome(seconds, 1000, is_success=True)


THROTTLED = Outcome(is_throttled=True)
FAILED = Outcome(1.0)


def record(concurrency: AdaptiveConcurrency, outcomes: Iterable[Outcome], in_use: int | None = None) -> None:
    for outcome in outcomes:
        concurrency.record(outcome, concurrency.limit if in_use is None else in_use)


def round_of(concurrency: AdaptiveConcurrency, outcome: Outcome) -> list[Outcome]:
    return [outcome] * max(concurrency.limit, MIN_ROUND)


def after_first_round(minimum: int, maximum: int) -> AdaptiveConcurrency:
    """A limit after its first round, which is shorter than the others."""
    concurrency = AdaptiveConcurrency(minimum, maximum)
    record(concurrency, [good(RTT_S)] * (MIN_ROUND + concurrency.limit), in_use=0)
    return concurrency


# Rules


@pytest.mark.parametrize(("minimum", "maximum", "initial"), [(1, 256, INITIAL_LIMIT), (1, 64, 64), (200, 256, 200), (7, 7, 7)])
def test_the_first_limit_fills_a_cold_cache_fast_and_is_within_its_bounds(minimum: int, maximum: int, initial: int) -> None:
    concurrency = AdaptiveConcurrency(minimum, maximum)
    assert (concurrency.limit, concurrency.last_change_reason) == (initial, "initial")


def test_the_limit_increases_by_a_few_per_round_while_responses_are_fast_and_every_slot_is_in_use() -> None:
    concurrency = after_first_round(1, 256)
    record(concurrency, round_of(concurrency, good(RTT_S)))
    assert (concurrency.limit, concurrency.last_change_reason) == (INITIAL_LIMIT + 4, "increased")
    for _ in range(40):
        record(concurrency, round_of(concurrency, good(RTT_S)))
    assert concurrency.limit == 256


def test_the_limit_stays_while_slots_are_free_however_fast_or_slow_responses_are() -> None:
    concurrency = after_first_round(1, 256)
    for seconds in (RTT_S, RTT_S, 10 * RTT_S):
        record(concurrency, round_of(concurrency, good(seconds)), in_use=INITIAL_LIMIT - 1)
    assert (concurrency.limit, concurrency.last_change_reason) == (INITIAL_LIMIT, "initial")


@pytest.mark.parametrize(("throttled_in_8", "expected"), [(1, 112), (4, 64), (7, 64), (8, 64)])
def test_the_more_is_throttled_the_further_the_limit_decreases_but_never_below_half(throttled_in_8: int, expected: int) -> None:
    concurrency = after_first_round(1, 256)
    outcomes = [THROTTLED] * throttled_in_8 + [good(RTT_S)] * (8 - throttled_in_8)
    record(concurrency, outcomes * (INITIAL_LIMIT // 8))
    assert (concurrency.limit, concurrency.last_change_reason) == (expected, "throttled_by_gcs")


def test_requests_sent_before_a_decrease_are_ignored() -> None:
    concurrency = after_first_round(1, 256)
    record(concurrency, [THROTTLED] * INITIAL_LIMIT)
    record(concurrency, [THROTTLED] * INITIAL_LIMIT)
    assert concurrency.limit == 64


def test_after_throttling_the_limit_stays_before_it_increases() -> None:
    concurrency = after_first_round(1, 64)
    record(concurrency, round_of(concurrency, THROTTLED))
    record(concurrency, [good(RTT_S)] * 64)
    levels = []
    for _ in range(25):
        record(concurrency, round_of(concurrency, good(RTT_S)))
        levels.append(concurrency.limit)
    assert levels == [32] * 19 + [36, 40, 44, 48, 52, 56]


def test_the_limit_decreases_if_responses_are_slower_because_they_queue() -> None:
    concurrency = after_first_round(1, 128)
    record(concurrency, round_of(concurrency, good(4 * RTT_S)))
    assert (concurrency.limit, concurrency.last_change_reason) == (64, "queueing")


def test_the_limit_is_restored_if_a_decrease_made_responses_no_faster() -> None:
    """The path to GCS became longer, which no limit shortens."""
    concurrency = after_first_round(1, 128)
    record(concurrency, round_of(concurrency, good(4 * RTT_S)))
    assert concurrency.limit == 64
    record(concurrency, [good(4 * RTT_S)] * 128)
    record(concurrency, round_of(concurrency, good(4 * RTT_S)))
    assert concurrency.limit == 128
    for _ in range(10):
        record(concurrency, round_of(concurrency, good(4 * RTT_S)))
    assert concurrency.limit == 128


def test_other_failures_do_not_change_the_limit() -> None:
    concurrency = after_first_round(1, 256)
    for _ in range(5):
        record(concurrency, round_of(concurrency, FAILED))
    assert (concurrency.limit, concurrency.last_change_reason) == (INITIAL_LIMIT, "initial")


def test_the_limit_stays_within_its_bounds_and_within_new_ones_at_once() -> None:
    concurrency = after_first_round(16, 256)
    for _ in range(20):
        record(concurrency, round_of(concurrency, THROTTLED))
    assert concurrency.limit == 16
    concurrency.set_bounds(32, 64)
    assert (concurrency.limit, concurrency.last_change_reason) == (32, "setting_changed")
    concurrency.set_bounds(1, 8)
    assert (concurrency.limit, concurrency.last_change_reason) == (8, "setting_changed")


def test_every_reason_is_described() -> None:
    assert set(CHANGE_REASONS) == {"initial", "setting_changed", "increased", "throttled_by_gcs", "queueing"}


# Simulations: how it adapts to a server


@dataclass
class Simulation:
    """A client that always has more to request, and a server in simulated time.

    `serve` returns how long a request sent now takes, or None if it is throttled. The client retries throttled requests after
    `backoff_s` on average, and holds their slot meanwhile.
    """

    serve: Callable[[float], float | None]
    concurrency: AdaptiveConcurrency
    backoff_s: float = 0.1
    throttled_response_s: float = RTT_S
    now_s: float = 0.0
    done: list[float] = field(default_factory=list)
    throttled: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    events: list[tuple[float, int, float, bool]] = field(default_factory=list)
    numbers: Iterable[int] = field(default_factory=itertools.count)
    in_use: int = 0

    def run(self, seconds: float) -> float:
        """Continue for this many seconds; returns the requests served per second meanwhile."""
        end_s, before = self.now_s + seconds, len(self.done)
        while True:
            while self.in_use < self.concurrency.limit:
                self.in_use += 1
                self.send(self.now_s)
            at_s, _, sent_s, is_success = heapq.heappop(self.events)
            if at_s > end_s:
                heapq.heappush(self.events, (at_s, -1, sent_s, is_success))
                self.now_s = end_s
                return (len(self.done) - before) / seconds
            self.now_s = at_s
            if sent_s > at_s:  # the end of a back-off
                self.send(at_s)
                continue
            self.concurrency.record(Outcome(at_s - sent_s, 1000, not is_success, is_success), self.in_use)
            if is_success:
                self.in_use -= 1
                self.done.append(at_s)
            else:
                self.throttled += 1
                at_s += self.chance.random() * 2 * self.backoff_s
                self.push(at_s, math.inf, is_success=False)

    def send(self, now_s: float) -> None:
        seconds = self.serve(now_s)
        self.push(now_s + (self.throttled_response_s if seconds is None else seconds), now_s, is_success=seconds is not None)

    def push(self, at_s: float, sent_s: float, *, is_success: bool) -> None:
        heapq.heappush(self.events, (at_s, next(iter(self.numbers)), sent_s, is_success))


def lognormal(sigma: float) -> Callable[[float], float]:
    """Latencies like those of GCS: a median of 30 ms and a tail."""
    source = random.Random(7)
    return lambda now_s: RTT_S * math.exp(source.gauss(0.0, sigma))


def queueing(at_once: int, latency: Callable[[float], float]) -> Callable[[float], float]:
    """A server that serves this many requests at a time; the others queue."""
    free_s = [0.0] * at_once

    def serve(now_s: float) -> float:
        start_s = max(now_s, heapq.heappop(free_s))
        end_s = start_s + latency(now_s)
        heapq.heappush(free_s, end_s)
        return end_s - now_s

    return serve


def shared_link(per_s: float) -> Callable[[float], float]:
    """A link that all requests share: the more there are, the slower is each, the first ones too."""
    ends_s: list[float] = []

    def serve(now_s: float) -> float:
        while ends_s and ends_s[0] <= now_s:
            heapq.heappop(ends_s)
        seconds = max(RTT_S, (len(ends_s) + 1) / per_s)
        heapq.heappush(ends_s, now_s + seconds)
        return seconds

    return serve


def throttling(per_s: float, latency: Callable[[float], float], burst: float = 20.0) -> Callable[[float], float | None]:
    """A server that throttles faster requests."""
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
    """The requests per second of the best fixed limit."""
    rates = []
    for level in (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        simulation = Simulation(server(), AdaptiveConcurrency(level, level))
        simulation.run(3.0)
        rates.append(simulation.run(seconds))
    return max(rates)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("at_once", [2, 8, 40, 100])
def test_the_limit_adapts_in_seconds_to_a_server_that_serves_few_at_a_time_and_keeps_it_busy(
    at_once: int, sigma: float
) -> None:
    def server() -> Callable[[float], float]:
        return queueing(at_once, lognormal(sigma))

    simulation = Simulation(server(), AdaptiveConcurrency(1, 256))
    simulation.run(2.0 + 30 / at_once)
    assert simulation.concurrency.limit <= max(3 * at_once, at_once + 6)
    assert simulation.run(30.0) >= 0.9 * best_fixed(server, 10.0)
    assert simulation.concurrency.limit <= max(3 * at_once, at_once + 6)


@pytest.mark.parametrize("per_s", [300.0, 2000.0])
def test_the_limit_adapts_to_a_shared_link_even_if_no_response_was_ever_fast(per_s: float) -> None:
    simulation = Simulation(shared_link(per_s), AdaptiveConcurrency(1, 256))
    simulation.run(60.0)
    assert simulation.concurrency.limit <= 3 * per_s * RTT_S
    assert simulation.run(60.0) >= 0.9 * per_s


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("per_s", [200.0, 1000.0, 3000.0])
def test_the_limit_adapts_in_seconds_to_a_server_that_throttles_and_uses_its_rate(per_s: float, sigma: float) -> None:
    def server() -> Callable[[float], float | None]:
        return throttling(per_s, lognormal(sigma))

    simulation = Simulation(server(), AdaptiveConcurrency(1, 256))
    simulation.run(5.0)
    simulation.throttled = 0
    rate = simulation.run(30.0)
    assert rate >= 0.9 * best_fixed(server, 10.0)
    assert simulation.throttled < 0.05 * 30 * rate


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6])
def test_the_limit_reaches_its_maximum_with_a_server_that_is_never_busy(sigma: float) -> None:
    fixed = Simulation(lognormal(sigma), AdaptiveConcurrency(256, 256)).run(20.0)
    simulation = Simulation(lognormal(sigma), AdaptiveConcurrency(1, 256))
    simulation.run(5.0)
    assert simulation.run(20.0) >= 0.95 * fixed


def test_a_cold_fill_is_as_fast_from_its_first_request_on_as_with_a_limit_of_128() -> None:
    fixed = Simulation(lognormal(0.5), AdaptiveConcurrency(128, 128)).run(1.0)
    assert Simulation(lognormal(0.5), AdaptiveConcurrency(1, 256)).run(1.0) >= fixed


def test_the_limit_recovers_after_an_outage() -> None:
    latency = lognormal(0.5)
    simulation = Simulation(lambda now_s: None if 5 <= now_s < 15 else latency(now_s), AdaptiveConcurrency(4, 256))
    before = simulation.run(5.0)
    assert simulation.run(10.0) < 0.1 * before
    assert simulation.concurrency.limit == 4
    simulation.run(10.0)
    assert simulation.run(5.0) >= 0.9 * before
