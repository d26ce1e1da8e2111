"""How many tokens to draft: measured step times, and how often drafts were right."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

LENGTHS = (2, 5, 10)  # draft lengths that are tried and timed; others are timed as the next longer one
GAIN = 1.05
"""The least expected gain with which a draft is made; smaller ones are within the noise."""


class Acceptance:
    """The acceptance rate of one sequence's drafts of one kind, as a running mean.

    It is updated for free where the first token of a draft that was not fed is compared with the token that
    came. start: what is assumed before anything is known. settled: how many tokens that is worth.
    """

    START = 0.6  # before anything is known: the first drafts are tried
    MEMORY = 0.12  # weight of the newest token

    def __init__(self, start: float = START, settled: int = 8) -> None:
        self.rate = start
        self._seen = settled

    def saw(self, accepted: bool) -> None:
        """Record whether a drafted token was right, all before it being right."""
        self._seen += 1
        self.rate += max(self.MEMORY, 1 / self._seen) * (accepted - self.rate)

    def expected(self, length: int) -> float:
        """How many tokens of a draft of this length are expected to be right."""
        return sum(self.rate**place for place in range(1, length + 1))


@dataclass(frozen=True)
class Beside:
    """What a draft would share its step with."""

    sequences: int
    """Sequences in the step, its own included; each has one row without a draft."""
    drafted: int = 0
    """Tokens that the others draft."""
    expected: float = 0.0
    """How many of those are expected to be right."""


ALONE = Beside(1)


class Pace:
    """How many tokens to draft, from the measured times of steps of as many sequences.

    A draft of k tokens, each right with probability a if those before it are, adds a + … + aᵏ tokens to a
    step. It pays if the step's tokens grow by more than its cost, in steps without drafts.
    """

    ROW = 0.1  # of a step, before the cost of a drafted row was measured: short drafts are tried first
    FORGET = 0.995  # a cost that ruled drafts out decays: it may have been measured in a busy moment

    def __init__(self) -> None:
        self._single: deque[float] = deque(maxlen=9)
        self._costs: dict[int, deque[float]] = {length: deque(maxlen=5) for length in LENGTHS}

    @property
    def known(self) -> bool:
        """Whether enough steps without drafts were timed to compare with."""
        return len(self._single) >= 2

    @property
    def single(self) -> float:
        """Seconds of a step without drafts; 0 before there was one."""
        return median(self._single) if self._single else 0.0

    def length(self, available: int, acceptance: float, beside: Beside = ALONE) -> int:
        """How many of `available` drafted tokens to feed at this acceptance rate; 0 if none pays."""
        available = min(available, LENGTHS[-1] - beside.drafted)
        if available < 1 or not self.known:
            return 0
        options = {min(length, available) for length in LENGTHS}
        rate = Acceptance(acceptance)
        gains = {length: self.gain(length, rate.expected(length), 0.0, beside) for length in sorted(options)}
        best = max(gains, key=lambda length: gains[length])
        if gains[best] > GAIN:
            return best
        self.forget()
        return 0

    def forget(self) -> None:
        """Let the costs of drafts, which ruled one out, decay."""
        for costs in self._costs.values():
            for index, cost in enumerate(costs):
                costs[index] = max(1.0, cost * self.FORGET)

    def took(self, drafted: int, seconds: float) -> None:
        """Record how long a step with `drafted` drafted tokens took."""
        if drafted == 0:
            self._single.append(seconds)
        elif self._single:
            self._costs[_timed_as(drafted)].append(seconds / max(self.single, 1e-9))

    def gain(self, drafted: int, expected: float, seconds: float, beside: Beside) -> float:
        """Tokens for a step's time with a further draft, by those without it.

        drafted, expected: its tokens, and how many are expected to be right. seconds: to make the draft.
        """
        before = beside.sequences + beside.expected
        paid = self.cost(beside.drafted)
        full = self.cost(beside.drafted + drafted) + seconds / max(self.single, 1e-9)
        return (before + expected) / before * paid / full

    def cost(self, drafted: int) -> float:
        """Time of a step with this many drafted tokens, divided by that of a step without drafts.

        Where that was not measured, a row costs as much as in the nearest measured step.
        """
        timed = _timed_as(drafted)
        if drafted and self._costs[timed]:
            return median(self._costs[timed])
        for near in sorted(LENGTHS, key=lambda other: (abs(other - timed), other)):
            if self._costs[near]:
                return 1 + max(0.0, median(self._costs[near]) - 1) * drafted / near
        return 1 + self.ROW * drafted


def _timed_as(length: int) -> int:
    return next((known for known in LENGTHS if length <= known), LENGTHS[-1])
