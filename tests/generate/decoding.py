"""Helpers for tests that decode with drafts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from lowmem.config import SamplingParams
from lowmem.generate.engine import Engine
from lowmem.generate.pace import ALONE, Beside, Pace
from lowmem.generate.scoring import PromptScores, ScoredToken


class Always(Pace):
    """Drafts whatever there is to draft, as much of it as possible."""

    known = True

    def gain(self, drafted: int, expected: float, seconds: float, beside: Beside) -> float:
        return 2.0 + drafted

    def length(self, available: int, acceptance: float, beside: Beside = ALONE) -> int:
        return min(available, 7)


def drafting() -> defaultdict[int, Pace]:
    """An engine's paces that always draft."""
    return defaultdict(Always)


def score(
    engine: Engine, prompt: list[int], top: int, on_prefill: Callable[[int, int], object] | None = None
) -> list[ScoredToken]:
    """A prompt's log-probabilities; on_prefill(done, total) after each part."""
    scores = PromptScores(top)
    sequence = engine.start(prompt, SamplingParams(max_new_tokens=1), scores=scores)
    while sequence.reads:
        engine.advance()
        if on_prefill is not None:
            on_prefill(sequence.read, len(prompt))
    engine.end(sequence)
    if sequence.error is not None:
        raise sequence.error
    return [token for part in scores.tokens for token in part]


def kept_rows(*engines: Engine) -> list[tuple[torch.Tensor, ...]]:
    """Each engine's keys and values of the tokens that all of them hold."""
    slots = [engine.cache.slots[0] for engine in engines]
    length = min(slot.length for slot in slots)
    return [slot.save(length) for slot in slots]
