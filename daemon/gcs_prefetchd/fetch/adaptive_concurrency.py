"""How many downloads should run at a time: a limit that adapts itself between two bounds. Pure.

It records the outcome of every request, and decides in rounds of as many requests as it allows. It increases by a few per
round while responses are about as fast as they ever were and every slot is in use (additive increase). It decreases by a
share of itself if GCS throttles with 429 or 503, or if requests queue (multiplicative decrease; Chiu and Jain, 1989).

Queueing shows in the fast responses of a round, in their tenth percentile, compared with those of the fastest recent round:
slow responses reflect GCS's tail latency rather than our load. What the fast responses take longer, all responses do. So by
Little's law the share of the running requests that only queue is `increase / mean`, as in TCP Vegas (Brakmo and Peterson,
1995). A good third of them may queue: that keeps a link busy, and a longer queue brings no more throughput. If responses are
no faster at a lower limit, the queue was not ours, and the limit is restored.
"""

from collections.abc import Mapping
from types import MappingProxyType

from gcs_prefetchd.gcs.retry import Outcome

__all__ = ["CHANGE_REASONS", "AdaptiveConcurrency"]

INITIAL_LIMIT = 128  # at a latency of 30 ms more concurrency makes one process faster up to about this many
MIN_ROUND = 32  # the tenth percentile of fewer requests means nothing
FAST_QUANTILE = 0.1
INCREASE_BELOW, DECREASE_ABOVE = 0.25, 0.4  # the share of the running requests that queue
MAX_INCREASE = 4
DECREASE_FACTOR = 0.5
THROTTLED_FACTORS = (0.5, 0.95)  # the more requests are throttled, the lower the factor, within these bounds
HOLD_ROUNDS = 20  # without an increase, after GCS has throttled
# A queue that never empties hides how fast GCS can be. So now and then there is a round at half the limit, where the queue
# would be half as long; less often if the last probes found nothing. At first that costs 5 % of the throughput, in the end
# a thousandth.
PROBE_FASTER_BELOW = 0.9
NEXT_PROBE_ROUNDS = 4  # after a probe that found faster responses: they may be faster still
FIRST_PROBE_ROUNDS, LAST_PROBE_ROUNDS = 16, 800

CHANGE_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "initial": "set at the start",
        "setting_changed": "changed by a setting",
        "increased": "increased after fast responses",
        "throttled_by_gcs": "decreased after 429 or 503 from GCS",
        "queueing": "decreased because requests queued",
    }
)


class AdaptiveConcurrency:
    """`limit` is how many downloads may run, between `minimum` and `maximum`.

    `last_change_reason` is the key of `CHANGE_REASONS` that explains why the limit last changed.
    """

    def __init__(self, minimum: int, maximum: int) -> None:
        self.minimum = minimum
        self.maximum = maximum
        self.last_change_reason = "initial"
        self._level = float(max(minimum, min(INITIAL_LIMIT, maximum)))
        self._is_probing = False
        self.limit = int(self._level)
        self._fastest_s = (float("inf"), float("inf"))  # since the last probe, and between that and the one before
        self._rounds_to_probe = self._probe_every_rounds = FIRST_PROBE_ROUNDS
        self._hold_rounds = 0
        self._before_decrease: tuple[float, float] | None = None  # level and mean, before the last decrease for queueing
        self._was_fully_used = False
        self._start_round(ignore=0)
        self._is_first_round = True
        self._round_size = MIN_ROUND  # the first responses are those that no queue of ours has delayed

    def set_bounds(self, minimum: int, maximum: int) -> None:
        """Replace the bounds. The limit changes only as far as it must."""
        self.minimum, self.maximum = minimum, maximum
        self._set_level(self._level, "setting_changed")
        self._update_limit()

    def record(self, outcome: Outcome, in_use: int) -> None:
        """Record how a request ended, while `in_use` downloads were running, including its own."""
        self._recorded += 1
        if self._recorded <= self._ignored:
            return  # it was sent before the last change
        self._was_fully_used = self._was_fully_used or in_use >= self.limit
        if outcome.is_throttled:
            self._throttled += 1
        elif outcome.is_success:
            self._seconds.append(outcome.duration_s)
        if self._recorded - self._ignored >= self._round_size:
            self._end_round()

    def _start_round(self, ignore: int) -> None:
        self._ignored = ignore
        self._round_size = max(self.limit, MIN_ROUND)
        self._recorded = 0
        self._throttled = 0
        self._was_fully_used = False
        self._seconds: list[float] = []

    def _end_round(self) -> None:
        before, must_settle = self.limit, self._is_first_round or self._is_probing
        if self._throttled:
            share = self._throttled / (self._throttled + len(self._seconds))
            factor = max(THROTTLED_FACTORS[0], min(THROTTLED_FACTORS[1], 1 - share))
            self._is_probing, self._hold_rounds = False, HOLD_ROUNDS
            # A throttled request does not queue, and after a probe all slots are filled at once.
            self._rounds_to_probe = max(self._probe_every_rounds, 2 * HOLD_ROUNDS)
            self._set_level(self._level * factor, "throttled_by_gcs")
        elif len(self._seconds) >= MIN_ROUND // 2:
            self._judge(sorted(self._seconds))
        self._update_limit()
        # Requests that run above a lower limit were sent under the higher one.
        # After the first round and after a probe, the queue has yet to form.
        self._start_round(ignore=before if must_settle or self.limit < before else 0)
        self._is_first_round = False

    def _update_limit(self) -> None:
        self.limit = max(self.minimum, int(self._level) // 2) if self._is_probing else int(self._level)

    def _judge(self, seconds: list[float]) -> None:
        fast_s, mean_s = seconds[int(FAST_QUANTILE * len(seconds))], sum(seconds) / len(seconds)
        fastest_s = min(*self._fastest_s, fast_s)
        is_faster = fast_s < PROBE_FASTER_BELOW * min(self._fastest_s)
        self._fastest_s = (min(self._fastest_s[0], fast_s), self._fastest_s[1])
        self._hold_rounds = max(0, self._hold_rounds - 1)
        if self._is_probing:
            self._end_probe(found_faster=is_faster)
        elif self._was_fully_used and not self._undo_decrease(mean_s, fast_s):
            self._rounds_to_probe -= 1
            self._adapt((fast_s - fastest_s) / mean_s, mean_s)

    def _adapt(self, queueing: float, mean_s: float) -> None:
        """Increase, decrease, probe or stay, if this share of the requests queues."""
        if queueing > DECREASE_ABOVE:
            self._before_decrease = (self._level, mean_s)
            self._set_level(self._level * max(DECREASE_FACTOR, (1 - queueing) / (1 - INCREASE_BELOW)), "queueing")
        elif self._rounds_to_probe <= 0:
            self._is_probing = True
        elif queueing < INCREASE_BELOW and not self._hold_rounds:
            self._set_level(self._level + max(1, min(MAX_INCREASE, int(self._level) // 8)), "increased")

    def _undo_decrease(self, mean_s: float, fast_s: float) -> bool:
        """Restore the level if the last decrease made responses no faster; returns whether it did."""
        before, self._before_decrease = self._before_decrease, None
        if before is None or mean_s <= before[1] * (1 + self._level / before[0]) / 2:
            return False
        self._fastest_s = (fast_s, fast_s)
        self._set_level(before[0], "increased")
        return True

    def _end_probe(self, *, found_faster: bool) -> None:
        self._is_probing = False
        self._fastest_s = (float("inf"), self._fastest_s[0])
        doubled = min(2 * self._probe_every_rounds, LAST_PROBE_ROUNDS)
        self._rounds_to_probe = self._probe_every_rounds = NEXT_PROBE_ROUNDS if found_faster else doubled

    def _set_level(self, level: float, reason: str) -> None:
        before, self._level = int(self._level), max(float(self.minimum), min(level, float(self.maximum)))
        if int(self._level) != before:
            self.last_change_reason = reason
