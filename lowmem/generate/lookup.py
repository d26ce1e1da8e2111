"""Prompt-lookup speculation: the tokens that followed the same n-gram before are a draft of the next ones.

`Lookup` finds drafts (Saxena 2023, "Prompt Lookup Decoding"). `Pace` decides from measured step times and the
acceptance rate how long a draft should be. Neither chooses a token: the model does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

NGRAMS = (3, 2)  # the longest match counts
LENGTHS = (2, 5, 10)  # draft lengths that are tried and timed; others are timed as the next longer one


class Lookup:
    """The tokens of prompt and answer, and where each n-gram of them was last continued."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._next: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in NGRAMS)
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Add one token."""
        ids, end = self._ids, len(self._ids)
        for size, places in zip(NGRAMS, self._next, strict=True):
            if end >= size:
                places[tuple(ids[end - size : end])] = end
        ids.append(token)

    def draft(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the last occurrence of the last 3 (else 2) tokens; [] if none.

        A draft that reaches the end continues with its own tokens, so a period is repeated.
        """
        ids = self._ids
        for size, places in zip(NGRAMS, self._next, strict=True):
            start = places.get(tuple(ids[-size:]))
            if start is not None:
                period = len(ids) - start
                return [ids[start + i % period] for i in range(length)]
        return []


class Acceptance:
    """The acceptance rate of one sequence's drafts, as a running mean.

    It is updated for free where no draft is fed: the first token of the draft that was not made is compared
    with the token that came.
    """

    START = 0.6  # before anything is known: the first drafts are tried
    MEMORY = 0.12  # weight of the newest token

    def __init__(self) -> None:
        self.rate = self.START

    def saw(self, accepted: bool) -> None:
        """Record whether a drafted token was right, all before it being right."""
        self.rate += self.MEMORY * (accepted - self.rate)


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

    GAIN = 1.05  # smaller expected gains are within the noise
    FORGET = 0.995  # a cost that ruled drafts out decays: it may have been measured in a busy moment

    def __init__(self) -> None:
        self._single: deque[float] = deque(maxlen=9)
        self._costs: dict[int, deque[float]] = {length: deque(maxlen=5) for length in LENGTHS}

    def length(self, available: int, acceptance: float, beside: Beside = ALONE) -> int:
        """How many of `available` drafted tokens to feed at this acceptance rate; 0 if none pays."""
        available = min(available, LENGTHS[-1] - beside.drafted)
        if available < 1 or len(self._single) < 2:
            return 0
        options = {min(length, available) for length in LENGTHS}
        gains = {length: self._gain(length, acceptance, beside) for length in sorted(options)}
        best = max(gains, key=lambda length: gains[length])
        if gains[best] > self.GAIN:
            return best
        for costs in self._costs.values():
            for index, cost in enumerate(costs):
                costs[index] = max(1.0, cost * self.FORGET)
        return 0

    def took(self, drafted: int, seconds: float) -> None:
        """Record how long a step with `drafted` drafted tokens took."""
        if drafted == 0:
            self._single.append(seconds)
        elif self._single:
            self._costs[_timed_as(drafted)].append(seconds / max(median(self._single), 1e-9))

    def _gain(self, length: int, acceptance: float, beside: Beside) -> float:
        """Tokens for a step's time with a draft of `length` tokens, by those without it."""
        before = beside.sequences + beside.expected
        added = sum(acceptance**i for i in range(1, length + 1))
        paid = 1.0 if beside.drafted == 0 else self._cost(beside.drafted)
        return (before + added) / before * paid / self._cost(beside.drafted + length)

    def _cost(self, length: int) -> float:
        """Cost of a step with `length` drafted tokens; of the nearest measured length if unknown."""
        timed = _timed_as(length)
        for near in sorted(LENGTHS, key=lambda other: (abs(other - timed), other)):
            if self._costs[near]:
                return median(self._costs[near])
        return 1.0


def _timed_as(length: int) -> int:
    return next((known for known in LENGTHS if length <= known), LENGTHS[-1])
