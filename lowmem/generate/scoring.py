"""Log-probabilities of a prompt's own tokens, as the model gives them to each from those before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem.errors import LowmemError

SCORED_ROWS = 128
"""Tokens in one forward: every row has logits of the whole vocabulary, in float32 as well."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of the prompt."""

    id: int
    logprob: float | None
    """In nats; None for the first token, which nothing precedes."""
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the most likely tokens at its place, best first."""


class PromptScores:
    """The scores of a prompt that a sequence reads, part by part.

    top: how many of the most likely tokens to report at each place.
    """

    def __init__(self, top: int) -> None:
        self.tokens: deque[list[ScoredToken]] = deque()
        """The parts that are scored and not yet taken."""
        self._top = top
        self._last: torch.Tensor | None = None  # log-probabilities [1, vocab] after the previous part

    def add(self, part: list[int], logits: torch.Tensor) -> None:
        """Score the next tokens of the prompt. Raises LowmemError when the model's output is not finite.

        logits: [len(part), vocab], after each of them.
        """
        with torch.inference_mode():
            after = logits.to(torch.float32).log_softmax(dim=-1)
            first = self._last is None
            rows = after[:-1] if self._last is None else torch.cat((self._last, after[:-1]))
            scored = _scored(part[1:] if first else part, rows, self._top)
            self._last = after[-1:].clone()
        self.tokens.append([ScoredToken(part[0], None), *scored] if first else scored)


def _scored(ids: Sequence[int], logprobs: torch.Tensor, top: int) -> list[ScoredToken]:
    """The tokens with their log-probabilities in the rows of logprobs [len(ids), vocab]."""
    own = logprobs.gather(1, torch.tensor(ids, dtype=torch.int64, device=logprobs.device)[:, None])[:, 0]
    best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    found = [
        ScoredToken(token, value, tuple(zip(names, values, strict=True)))
        for token, value, names, values in zip(
            ids, own.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
    if any(math.isnan(token.logprob or 0) for token in found):
        raise LowmemError("the model's output is not finite", "Check the checkpoint with `lowmem verify`")
    return found
