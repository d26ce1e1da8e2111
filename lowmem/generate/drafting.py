"""What the sequences of a step draft: tokens found in their texts first, else those of a draft model.

A draft changes no token, so this decides about time alone, from measured times and acceptance rates.
"""

from __future__ import annotations

import time
from collections import defaultdict

from lowmem.checkpoint.files.reading import one_line
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.draft_model import Ask, DraftModel
from lowmem.generate.pace import GAIN, LENGTHS, Acceptance, Beside, Pace
from lowmem.generate.sequence import Sequence

PROBING = 0.01
"""The share of a step's time that goes to trying a draft model again which has not paid so far."""
SAVED_UP = 4
"""Steps whose time such attempts may take at once."""
SPREAD = 100
"""Tokens over which the time is spread that a draft model needs to catch up with a sequence."""
DEBT = 1
"""Steps whose time may be lost before attempts wait for PROBING to make up for it."""


class Drafting:
    """Chooses a draft for each sequence of a step; keeps what is known of their costs."""

    def __init__(self) -> None:
        self.paces: defaultdict[int, Pace] = defaultdict(Pace)
        """By the number of sequences in a step."""
        self.model: DraftModel | None = None
        """Drafts where the texts give nothing. None without a draft model, and after it has failed."""
        self.why_not = ""
        """The error that ended the draft model's work; "" without one."""
        self.rate = Acceptance.START
        """Of the model's drafts lately, which a new sequence begins with."""
        self._drafted = 0  # tokens of the step that comes next
        self._asked: list[Sequence] = []
        self._seconds = 0.0  # that the model's drafts took
        self._credit = 0.0  # seconds that may be spent on drafts of which no gain is expected

    def feeds(self, waiting: list[Sequence]) -> list[Feed]:
        """What to feed for each of the sequences, its draft included."""
        pace = self.paces[len(waiting)]
        drafts: list[list[int]] = []
        beside = Beside(len(waiting))
        for sequence in waiting:
            found = sequence.look_up()
            draft = found[: pace.length(len(found), sequence.found.rate, beside)]
            expected = beside.expected + sequence.found.expected(len(draft))
            beside = Beside(len(waiting), beside.drafted + len(draft), expected)
            drafts.append(draft)
        self._asked, self._seconds = [], 0.0
        if self.model is not None and pace.known:
            self._ask(waiting, drafts, pace, beside)
        feeds = [s.feed(draft, s in self._asked) for s, draft in zip(waiting, drafts, strict=True)]
        self._drafted = sum(len(feed.ids) - 1 for feed in feeds)
        return feeds

    def took(self, sequences: int, seconds: float, *, timed: bool) -> None:
        """The step that `feeds` was for took so long, drafts not counted.

        timed: it did what every step does.
        """
        pace = self.paces[sequences]
        if timed:
            pace.took(self._drafted, seconds)
        if self.model is None or not pace.known:
            return
        self._credit += PROBING * seconds - self._seconds
        if self._asked:
            right = sum(sequence.accepted for sequence in self._asked)
            self._credit += right * pace.single / sequences - max(0.0, seconds - pace.single)
            self.rate = sum(s.proposed.rate for s in self._asked) / len(self._asked)
        self._credit = max(-DEBT * pace.single, min(self._credit, SAVED_UP * pace.single))

    def _ask(self, sequences: list[Sequence], drafts: list[list[int]], pace: Pace, beside: Beside) -> None:
        """Fill the empty ones of `drafts` with the draft model's, if that is expected to pay."""
        assert self.model is not None
        places = [i for i, draft in enumerate(drafts) if not draft and sequences[i].room > 0]
        most = (LENGTHS[-1] - beside.drafted) // max(1, len(places))
        best: list[Ask] = []
        best_gain = price = 0.0
        reading = self.model.reading_seconds([sequences[i].ask(1) for i in places])
        rates = [sequences[i].proposed for i in places]
        tokens = min(SPREAD, max((sequences[i].room for i in places), default=1))
        for length in range(1, most + 1):
            asks = [sequences[i].ask(length) for i in places]
            if not asks or all(ask.length < length for ask in asks):
                break
            drafted, seconds = sum(ask.length for ask in asks), length * self.model.step_seconds
            expected = sum(rate.expected(ask.length) for rate, ask in zip(rates, asks, strict=True))
            gain = pace.gain(drafted, expected, seconds + reading / tokens, beside)
            if gain > best_gain:
                rows = pace.cost(beside.drafted + drafted) - pace.cost(beside.drafted)
                best, best_gain, price = asks, gain, seconds + reading + rows * pace.single
        if not best:
            return
        if best_gain <= GAIN and price > self._credit:
            pace.forget()
            return
        started = time.perf_counter()
        try:
            proposed = self.model.propose(best)
        except Exception as error:  # whatever a draft raises, the large model goes on without it
            self.model, self.why_not = None, one_line(error)
            return
        self._seconds = time.perf_counter() - started
        for place, draft in zip(places, proposed, strict=True):
            drafts[place] = draft
        self._asked = [sequences[place] for place in places if drafts[place]]
