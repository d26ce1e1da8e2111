"""Log-probabilities of a prompt's own tokens, as the model gives them to each from those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lowmem.errors import LowmemError
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.engine import Engine, Progress

ROWS = 128
"""Tokens in one forward: every row has logits of the whole vocabulary, in float32 as well."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of the prompt."""

    id: int
    logprob: float | None
    """In nats; None for the first token, which nothing precedes."""
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the most likely tokens at its place, best first."""


def score(
    engine: Engine, prompt: Sequence[int], top: int, on_prefill: Progress | None = None
) -> Iterator[list[ScoredToken]]:
    """Score a prompt, ROWS tokens at a time; the engine's cache then holds it, so that it can be continued.

    top: how many of the most likely tokens to report. on_prefill(done, total): called after each forward.
    Raises InvalidRequestError as `Engine.generate` does, and LowmemError when the model's output is not
    finite.
    """
    engine.check_prompt(prompt)
    return _score(engine, prompt, top, on_prefill)


def _score(
    engine: Engine, prompt: Sequence[int], top: int, on_prefill: Progress | None
) -> Iterator[list[ScoredToken]]:
    engine.sequence = None  # a request that has not ended may not continue
    slot = engine.cache.slots[0]
    slot.cut(0)
    last: torch.Tensor | None = None  # log-probabilities [1, vocab] after the previous part
    for at in range(0, len(prompt), ROWS):
        part = list(prompt[at : at + ROWS])
        (logits,) = engine.decoder.prefill([Feed(slot, part, len(prompt), keep=len(part))])
        with torch.inference_mode():
            after = logits.to(torch.float32).log_softmax(dim=-1)
            rows = after[:-1] if last is None else torch.cat((last, after[:-1]))
            scored = _scored(part[1:] if last is None else part, rows, top)
            last = after[-1:].clone()
        if on_prefill is not None:
            on_prefill(at + len(part), len(prompt))
        yield [ScoredToken(part[0], None), *scored] if at == 0 else scored


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
