"""A request being answered: its tokens, how the next one is chosen, and why the answer ends."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from lowmem.config import SamplingParams
from lowmem.generate.cache.contract import Slot
from lowmem.generate.decoders.contract import Feed, StepOutput
from lowmem.generate.lookup import Acceptance, Lookup, Pace
from lowmem.generate.sampling import SampledToken, Sampler

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

    drafts: look for drafts in the tokens so far. They change no token.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        slot: Slot,
        sampler: Sampler,
        stop_ids: Collection[int] = (),
        *,
        drafts: bool = False,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.slot = slot
        """Where its keys and values are."""
        self.new_tokens = 0
        """Tokens chosen so far."""
        self.cached_tokens = 0
        """Tokens of the prompt that the slot held already."""
        self.drafted_tokens = 0
        """Tokens fed as drafts."""
        self.accepted_tokens = 0
        """Drafted tokens that were right."""
        self._sampler, self._stop_ids = sampler, stop_ids
        self._acceptance = Acceptance()
        self._lookup = Lookup(prompt) if drafts else None
        self._last = -1
        self._draft: list[int] = []  # fed behind the last chosen token
        self._guess: int | None = None  # the first token of the draft that was found, fed or not
        self._unclear = False  # rounding could change the choice that comes next

    def choose(self, output: StepOutput, index: int = 0) -> Iterator[Token]:
        """Choose a token from each row of the sequence's logits in `output`, as long as its draft is right.

        Gives no token if the rows' rounding could change the first choice: then the next feed has no draft.
        """
        # A step without a draft is what its logits are defined by.
        rounding = output.rounding if self._draft else 0.0
        self._unclear = False
        rows = output.logits[index]
        for row in range(len(self._draft) + 1):
            with torch.inference_mode():  # not around the yield
                chosen = self._sampler.choose_clear(rows[row], rounding)
            right = self._compare(row, chosen)
            if chosen is None:
                self._unclear = True
                return
            self._last, self.new_tokens = chosen.id, self.new_tokens + 1
            if self._lookup is not None:
                self._lookup.append(chosen.id)
            yield Token(chosen.id, self._finish_reason(), chosen.logprob, chosen.top)
            if not right:
                return

    def next_feed(self, pace: Pace) -> Feed:
        """The last chosen token and the draft behind it; the slot is cut to the tokens before them."""
        length = len(self.prompt) + self.new_tokens
        self.slot.cut(length - 1)
        self._draft, self._guess = [], None
        if self._lookup is not None and not self._unclear:
            # Drafting beyond the last token that may come is useless.
            available = min(self.params.max_new_tokens - self.new_tokens, self.slot.capacity + 1 - length)
            found = self._lookup.draft(available - 1)
            self._draft = found[: pace.length(len(found), self._acceptance.rate)]
            self._guess = found[0] if found else None
        self.drafted_tokens += len(self._draft)
        return Feed(self.slot, [self._last, *self._draft])

    def release(self) -> None:
        """Free what only further choices need; the counters stay."""
        self._lookup = None

    def _compare(self, row: int, chosen: SampledToken | None) -> bool:
        """Whether the draft, if there is one, has the chosen token at this row; counts it."""
        drafted = row < len(self._draft)
        guess = self._draft[row] if drafted else self._guess if row == 0 else None
        right = chosen is not None and chosen.id == guess
        if guess is not None:
            self._acceptance.saw(right)
            self.accepted_tokens += right and drafted
        return right

    def _finish_reason(self) -> FinishReason | None:
        if self._last in self._stop_ids or self._sampler.ended:
            return "stop"
        if self.new_tokens == self.params.max_new_tokens:
            return "length"
        if len(self.prompt) + self.new_tokens > self.slot.capacity:  # the token has no position left
            return "context"
        return None
