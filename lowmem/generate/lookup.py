"""Prompt-lookup speculation: the tokens that followed the same n-gram before are a draft of the next ones.

`Lookup` finds drafts (Saxena 2023, "Prompt Lookup Decoding"). `Pace` decides from measured step times and the
acceptance rate how long a draft should be. Neither chooses a token: the model does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
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


class Pace:
    """How many tokens to draft, from the measured times of steps.

    A draft of k tokens, each right with probability a if those before it are, gives 1 + a + … + aᵏ tokens in
    one step. It pays if that is more than the step's cost in one-row steps.
    """

    GAIN = 1.05  # smaller expected gains are within the noise
    FORGET = 0.995  # a cost that ruled drafts out decays: it may have been measured in a busy moment

    def __init__(self) -> None:
        self._single: deque[float] = deque(maxlen=9)
        self._costs: dict[int, deque[float]] = {length: deque(maxlen=5) for length in LENGTHS}

    def length(self, available: int, acceptance: float) -> int:
        """How many of `available` drafted tokens to feed at this acceptance rate; 0 if none pays."""
        if available < 1 or len(self._single) < 2:
            return 0
        options = {min(length, available) for length in LENGTHS}
        gains = {length: self._gain(length, acceptance) for length in sorted(options)}
        best = max(gains, key=lambda length: gains[length])
        if gains[best] > self.GAIN:
            return best
        for costs in self._costs.values():
            for index, cost in enumerate(costs):
                costs[index] = max(1.0, cost * self.FORGET)
        return 0

    def took(self, rows: int, seconds: float) -> None:
        """Record the duration of a step of `rows` rows (1 + drafted)."""
        if rows == 1:
            self._single.append(seconds)
        elif self._single:
            self._costs[_timed_as(rows - 1)].append(seconds / max(median(self._single), 1e-9))

    def _gain(self, length: int, acceptance: float) -> float:
        """Expected tokens per one-row step's time for a draft of `length` tokens."""
        return sum(acceptance**i for i in range(length + 1)) / self._cost(length)

    def _cost(self, length: int) -> float:
        """Cost of a step of 1 + length rows in one-row steps; of the nearest measured length if unknown."""
        timed = _timed_as(length)
        for near in sorted(LENGTHS, key=lambda other: (abs(other - timed), other)):
            if self._costs[near]:
                return median(self._costs[near])
        return 1.0


def _timed_as(length: int) -> int:
    return next((known for known in LENGTHS if length <= known), LENGTHS[-1])
