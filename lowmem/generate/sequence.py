"""A request being answered: its tokens, how the next one is chosen, and why the answer ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch

from lowmem.config import SamplingParams
from lowmem.generate.cache.contract import Slot
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.draft_model import Ask
from lowmem.generate.lookup import Lookup
from lowmem.generate.pace import Acceptance
from lowmem.generate.sampling import SampledToken, Sampler
from lowmem.generate.scoring import PromptScores

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    finish_reason: FinishReason | None
    """None if more tokens follow; "stop" (a stop id, or a constraint has ended), "length" (max_new_tokens is
    reached) or "context" (the context is full)."""
    logprob: float | None = None
    """Its log-probability in the model's own distribution; None unless `SamplingParams.logprobs` is set."""
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the most likely tokens, best first; as many as `logprobs` says."""


class Sequence:
    """Prompt and answer of one request.

    drafts: may have drafts, which change no token. scores: receives the log-probabilities of the prompt,
    which is then read as a whole.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        sampler: Sampler,
        stop_ids: Collection[int] = (),
        *,
        drafts: bool = False,
        scores: PromptScores | None = None,
    ) -> None:
        self.prompt = prompt
        self.ids = list(prompt)
        """The tokens of prompt and answer."""
        self.params = params
        self.scores = scores
        self.slot: Slot | None = None
        """Where its keys and values are, once reading has begun."""
        self.read = 0
        """Tokens of the prompt that the slot holds."""
        self.turn = 0
        """When a part of the prompt was read last, by the engine's count."""
        self.tokens: deque[Token] = deque()
        """Tokens that are chosen and not yet taken."""
        self.error: Exception | None = None
        """What ended it, other than a token."""
        self.ended = False
        """No further token is wanted."""
        self.new_tokens = 0
        """Tokens chosen so far."""
        self.cached_tokens = 0
        """Tokens of the prompt that the slot held already."""
        self.drafted_tokens = 0
        """Tokens fed as drafts."""
        self.accepted_tokens = 0
        """Drafted tokens that were right."""
        self.found, self.proposed = Acceptance(), Acceptance(settled=1)
        """How often drafts from the text itself and those of a draft model were right."""
        self.accepted = 0
        """Drafted tokens of the latest step that were right."""
        self._sampler, self._stop_ids = sampler, stop_ids
        self._lookup = Lookup() if drafts else None
        self._draft: list[int] = []  # fed behind the last chosen token
        self._by_model = False  # the draft is a draft model's
        self._guess: int | None = None  # the first token of the draft that the text has, if that was not fed
        self._unclear = False  # rounding could change the choice that comes next

    @property
    def reads(self) -> bool:
        """Whether tokens of the prompt are still to be read."""
        return not self.ended and self.read < len(self.prompt)

    @property
    def waits(self) -> bool:
        """Whether it needs a decode step: its prompt is read, and all its tokens are taken."""
        return not self.ended and not self.reads and not self.tokens

    def part(self, rows: int) -> Feed:
        """The next `rows` tokens of the prompt, or as many as there are."""
        assert self.slot is not None
        ids = self.prompt[self.read : self.read + rows]
        return Feed(self.slot, ids, len(self.prompt), keep=1 if self.scores is None else len(ids))

    def has_read(self, feed: Feed, logits: torch.Tensor) -> None:
        """A part of the prompt has been read. logits: [feed.keep, vocab]; the last one gives a token."""
        self.read += len(feed.ids)
        if self.scores is not None:
            self.scores.add(list(feed.ids), logits)
        if not self.reads:
            self.choose(logits[-1:])

    def fail(self, error: Exception) -> None:
        """End the sequence with an error."""
        self.error, self.ended = error, True

    def take(self) -> Token | None:
        """Remove and return the next chosen token, or None. Raises the error that ended the sequence."""
        if self.tokens:
            return self.tokens.popleft()
        if self.error is not None:
            raise self.error
        return None

    def choose(self, rows: torch.Tensor, rounding: float = 0.0) -> None:
        """Choose a token from each row of the logits [1 + draft, vocab] as long as its draft is right.

        Chooses none if the rows' rounding could change the first choice: then the next feed has no draft.
        """
        if not self._draft:  # a step without a draft is what its logits are defined by
            rounding = 0.0
        self._unclear, self.accepted = False, 0
        for row in range(len(self._draft) + 1):
            with torch.inference_mode():
                chosen = self._sampler.choose_clear(rows[row], rounding)
            right = self._compare(row, chosen)
            if chosen is None:
                self._unclear = True
                return
            self.ids.append(chosen.id)
            self.new_tokens += 1
            reason = self._finish_reason()
            self.tokens.append(Token(chosen.id, reason, chosen.logprob, chosen.top))
            self.ended = reason is not None
            if self.ended or not right:
                return

    @property
    def room(self) -> int:
        """Tokens that a draft may have: none beyond the last that may come, or after an unclear choice."""
        if self._lookup is None or self._unclear:
            return 0
        assert self.slot is not None
        return min(self.params.max_new_tokens - self.new_tokens, self.slot.capacity + 1 - len(self.ids)) - 1

    def look_up(self) -> list[int]:
        """The longest draft that the text so far has, [] if none."""
        found = self._lookup.draft(self.ids, self.room) if self._lookup is not None else []
        self._guess = found[0] if found else None
        return found

    def ask(self, length: int) -> Ask:
        """What to ask a draft model for: a draft of this length, or of `room` if that is less."""
        assert self.slot is not None
        return Ask(self.slot.index, self.ids, min(length, self.room), self._sampler.guess)

    def feed(self, draft: list[int], by_model: bool = False) -> Feed:
        """The last chosen token and a draft behind it; the slot is cut to the tokens before them."""
        assert self.slot is not None
        self.slot.cut(len(self.ids) - 1)
        self._draft, self._by_model = draft, by_model
        self.drafted_tokens += len(draft)
        return Feed(self.slot, [self.ids[-1], *draft])

    def release(self) -> None:
        """End it, and free what only further choices need; the counters stay."""
        self.ended, self._lookup = True, None

    def _compare(self, row: int, chosen: SampledToken | None) -> bool:
        """Whether the draft goes on with the chosen token at this row; counts it, and a draft not fed."""
        token = None if chosen is None else chosen.id
        if row == 0 and self._guess is not None and (self._by_model or not self._draft):
            self.found.saw(token == self._guess)
        if row == len(self._draft):
            return False
        right = token == self._draft[row]
        (self.proposed if self._by_model else self.found).saw(right)
        self.accepted += right
        self.accepted_tokens += right
        return right

    def _finish_reason(self) -> FinishReason | None:
        if self.ids[-1] in self._stop_ids or self._sampler.ended:
            return "stop"
        if self.new_tokens == self.params.max_new_tokens:
            return "length"
        assert self.slot is not None
        if len(self.ids) > self.slot.capacity:  # the token has no position left
            return "context"
        return None
