"""Prompt-lookup speculation: what followed the same few tokens before is a guess at what follows now.

`Lookup` finds drafts (Saxena 2023, "Prompt Lookup Decoding"), `Pace` says from measured times and hits how
long a draft pays, if any does. Neither decides a token: the model does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

NGRAMS = (3, 2)  # the longest match counts
LENGTHS = (2, 5, 10)  # drafts that are tried and timed; an odd rest is timed as the next longer one


class Lookup:
    """The tokens of prompt and answer, and where each n-gram of them was last continued."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._next: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in NGRAMS)
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token."""
        ids, end = self._ids, len(self._ids)
        for size, places in zip(NGRAMS, self._next, strict=True):
            if end >= size:
                places[tuple(ids[end - size : end])] = end
        ids.append(token)

    def draft(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the last occurrence of the last 3 (else 2) tokens; [] for none.

        A copy that reaches the end goes on with what it has copied: a period is repeated.
        """
        ids = self._ids
        for size, places in zip(NGRAMS, self._next, strict=True):
            start = places.get(tuple(ids[-size:]))
            if start is not None:
                period = len(ids) - start
                return [ids[start + i % period] for i in range(length)]
        return []


class Pace:
    """How many tokens to draft, from what was measured while running.

    A draft of k tokens, each right with probability a if those before it were, gives 1 + a + … + aᵏ tokens in
    one forward. It pays when that is more than the forward costs in one-row steps. `a` is a running mean,
    kept up to date for nothing where no draft is made: the guess is compared with the token that came.
    """

    START = 0.6  # `a` before anything is known: the first drafts are tried
    MEMORY = 0.12  # the weight of the newest hit or miss in `a`
    GAIN = 1.05  # below that an expected gain is not worth its scatter
    FORGET = (
        0.995  # a forward that was found too dear looks cheaper each time: it may have been a busy moment
    )

    def __init__(self) -> None:
        self._acceptance = self.START
        self._single: deque[float] = deque(maxlen=9)
        self._costs: dict[int, deque[float]] = {length: deque(maxlen=5) for length in LENGTHS}

    def new_answer(self) -> None:
        """The times stay, what is known of the text does not."""
        self._acceptance = self.START

    def length(self, most: int) -> int:
        """How many tokens of a draft of up to `most` to take; 0 where one-row steps are as fast."""
        if most < 1 or len(self._single) < 2:
            return 0
        options = {min(length, most): self._gain(min(length, most)) for length in LENGTHS}
        best = max(options, key=lambda length: options[length])
        if options[best] > self.GAIN:
            return best
        for costs in self._costs.values():
            for index, cost in enumerate(costs):
                costs[index] = max(1.0, cost * self.FORGET)
        return 0

    def took(self, rows: int, seconds: float) -> None:
        """Note the time of a forward of so many rows (1 + drafted)."""
        if rows == 1:
            self._single.append(seconds)
        elif self._single:
            self._costs[_timed_as(rows - 1)].append(seconds / max(median(self._single), 1e-9))

    def saw(self, hit: bool) -> None:
        """Note whether a drafted token, all before it being right, was right too."""
        self._acceptance += self.MEMORY * (hit - self._acceptance)

    def _gain(self, length: int) -> float:
        """Expected tokens a one-row step's time when `length` are drafted."""
        tokens = sum(self._acceptance**i for i in range(length + 1))
        return tokens / self._cost(length)

    def _cost(self, length: int) -> float:
        """A forward of 1 + length rows in one-row steps; before it was measured, that of its neighbour."""
        timed = _timed_as(length)
        for near in sorted(LENGTHS, key=lambda other: (abs(other - timed), other)):
            if self._costs[near]:
                return median(self._costs[near])
        return 1.0


def _timed_as(length: int) -> int:
    return next((known for known in LENGTHS if length <= known), LENGTHS[-1])
