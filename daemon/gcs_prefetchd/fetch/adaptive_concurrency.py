"""How many downloads are worth having under way: a limit that finds its own level between two bounds. Pure.

It is told how each request went and looks at them in rounds of as many requests as it allows. It rises by a few a round while
answers come about as fast as they ever did and every slot is in use (additive increase), and falls by a share of itself when
GCS refuses with 429 or 503, or when requests wait for each other (multiplicative decrease; Chiu and Jain, 1989).

That they wait is told from the fast answers of a round, its tenth percentile, against those of the fastest round of late: slow
ones say more about GCS's tail than about us. What the fast ones take longer, all do, so that by Little's law the share of the
requests under way that only stand in a line is `rise / mean`, as in TCP Vegas (Brakmo and Peterson, 1995). A good third of
them may: that keeps a link busy, and a longer line brings no more throughput. Where answers come no
faster at a lower limit the line was not ours, and the limit goes back.
"""

from collections.abc import Mapping
from types import MappingProxyType

from gcs_prefetchd.gcs.retry import Outcome

__all__ = ["CHANGE_REASONS", "Limit"]

START = 128  # at 30 ms one process is bound by the requests under way up to about so many
SHORTEST_ROUND = 32  # the tenth percentile of fewer says nothing
FAST = 0.1
RISES_BELOW, FALLS_ABOVE = 0.25, 0.4  # of the requests under way, the share that waits in a line
LARGEST_STEP = 4
FALL = 0.5
REFUSED_FALL = (0.5, 0.95)  # the more is refused, the further it falls, within these
PATIENCE_ROUNDS = 20  # after a refusal, before it rises again
# A line that never ends hides how fast GCS can be. So now and then there is a round at half the limit, where it would be half
# as long; more seldom where the last ones found nothing. At first it costs 5 % of the throughput, in the end a thousandth.
PROBE_FINDS = 0.9
NEXT_PROBE_ROUNDS = 4  # after one that found how fast GCS can be: it may be faster still
FIRST_PROBE_ROUNDS, LAST_PROBE_ROUNDS = 16, 800

CHANGE_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "initial": "initial value",
        "setting_changed": "changed by a setting",
        "increased": "increased after fast responses",
        "throttled_by_gcs": "decreased after 429 or 503 from GCS",
        "queueing": "decreased because requests queued",
    }
)


class Limit:
    """`now` is how many downloads may be under way, bounded by `least` and `most`.

    `last_change_reason` is one of `CHANGE_REASONS`.
    """

    def __init__(self, least: int, most: int) -> None:
        self.least = least
        self.most = most
        self.last_change_reason = "initial"
        self._level = float(max(least, min(START, most)))
        self._probing = False
        self.now = int(self._level)
        self._floors_s = (float("inf"), float("inf"))  # of the time since the last probe, and of the time before it
        self._rounds_to_probe = self._probe_every_rounds = FIRST_PROBE_ROUNDS
        self._patience_rounds = 0
        self._fell_from: tuple[float, float] | None = None  # the level before the last fall for a line, and the mean there
        self._was_full = False
        self._begin(settle=0)
        self._is_first = True
        self._round = SHORTEST_ROUND  # the first answers are those that no line of ours has kept waiting

    def bound(self, least: int, most: int) -> None:
        """Take other bounds; the limit moves only as far as it must."""
        self.least, self.most = least, most
        self._move(self._level, "setting_changed")
        self._set_now()

    def note(self, outcome: Outcome, in_use: int) -> None:
        """One request has ended while `in_use` downloads were under way, itself included."""
        self._ended += 1
        if self._ended <= self._settling:
            return  # it was sent before the last change
        self._was_full = self._was_full or in_use >= self.now
        if outcome.is_throttled:
            self._refused += 1
        elif outcome.is_success:
            self._seconds.append(outcome.duration_s)
        if self._ended - self._settling >= self._round:
            self._end_round()

    def _begin(self, settle: int) -> None:
        self._settling = settle
        self._round = max(self.now, SHORTEST_ROUND)
        self._ended = 0
        self._refused = 0
        self._was_full = False
        self._seconds: list[float] = []

    def _end_round(self) -> None:
        before, settles = self.now, self._is_first or self._probing
        if self._refused:
            share = self._refused / (self._refused + len(self._seconds))
            gentle = max(REFUSED_FALL[0], min(REFUSED_FALL[1], 1 - share))
            self._probing, self._patience_rounds = False, PATIENCE_ROUNDS
            # What is refused does not stand in a line, and whoever comes back from a probe comes all at once.
            self._rounds_to_probe = max(self._probe_every_rounds, 2 * PATIENCE_ROUNDS)
            self._move(self._level * gentle, "throttled_by_gcs")
        elif len(self._seconds) >= SHORTEST_ROUND // 2:
            self._judge(sorted(self._seconds))
        self._set_now()
        # What is under way above a lower limit was sent under the higher one.
        # At first and after a probe a line has yet to form.
        self._begin(settle=before if settles or self.now < before else 0)
        self._is_first = False

    def _set_now(self) -> None:
        self.now = max(self.least, int(self._level) // 2) if self._probing else int(self._level)

    def _judge(self, seconds: list[float]) -> None:
        fast_s, mean_s = seconds[int(FAST * len(seconds))], sum(seconds) / len(seconds)
        floor_s = min(*self._floors_s, fast_s)
        is_faster = fast_s < PROBE_FINDS * min(self._floors_s)
        self._floors_s = (min(self._floors_s[0], fast_s), self._floors_s[1])
        self._patience_rounds = max(0, self._patience_rounds - 1)
        if self._probing:
            self._end_probe(found=is_faster)
        elif self._was_full and not self._undoes_fall(mean_s, fast_s):
            self._rounds_to_probe -= 1
            self._follow((fast_s - floor_s) / mean_s, mean_s)

    def _follow(self, waiting: float, mean_s: float) -> None:
        """Rise, fall or stay, with this share of the requests in a line."""
        if waiting > FALLS_ABOVE:
            self._fell_from = (self._level, mean_s)
            self._move(self._level * max(FALL, (1 - waiting) / (1 - RISES_BELOW)), "queueing")
        elif self._rounds_to_probe <= 0:
            self._probing = True
        elif waiting < RISES_BELOW and not self._patience_rounds:
            self._move(self._level + max(1, min(LARGEST_STEP, int(self._level) // 8)), "increased")

    def _undoes_fall(self, mean_s: float, fast_s: float) -> bool:
        fell_from, self._fell_from = self._fell_from, None
        if fell_from is None or mean_s <= fell_from[1] * (1 + self._level / fell_from[0]) / 2:
            return False
        self._floors_s = (fast_s, fast_s)
        self._move(fell_from[0], "increased")
        return True

    def _end_probe(self, *, found: bool) -> None:
        self._probing = False
        self._floors_s = (float("inf"), self._floors_s[0])
        self._probe_every_rounds = NEXT_PROBE_ROUNDS if found else min(2 * self._probe_every_rounds, LAST_PROBE_ROUNDS)
        self._rounds_to_probe = self._probe_every_rounds

    def _move(self, level: float, reason: str) -> None:
        before, self._level = int(self._level), max(float(self.least), min(level, float(self.most)))
        if int(self._level) != before:
            self.last_change_reason = reason
