"""Helpers for tests that decode with drafts."""

from __future__ import annotations

import torch

from lowmem.generate.engine import Engine
from lowmem.generate.lookup import Pace


class Always(Pace):
    """Drafts whatever there is to draft."""

    def length(self, available: int, acceptance: float) -> int:
        return min(available, 7)


def kept_rows(*engines: Engine) -> list[tuple[torch.Tensor, ...]]:
    """Each engine's keys and values of the tokens that all of them hold."""
    slots = [engine.cache.slots[0] for engine in engines]
    length = min(slot.length for slot in slots)
    return [slot.save(length) for slot in slots]
