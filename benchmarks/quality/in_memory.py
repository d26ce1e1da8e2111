"""Output quality of small models, whole and in memory: mean KL divergence, same top-1, perplexity.

The reference is the unquantized source, computed in float32; every candidate is computed in float32
too, so that what is measured is the quantization and not the arithmetic. The arithmetic's own share,
the noise floor, is the reference once more in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.quality.divergence import compare

from lowmem.loading.loader import load

ROWS, ROW_LENGTH = 24, 512
ROWS_AT_A_TIME = 4


@dataclass(frozen=True)
class Quality:
    """One candidate against the reference, over the same tokens.

    kld: mean KL divergence from the reference's next-token distribution, in nats. same_top1: how often
    both put the same token first. ppl: perplexity of the text.
    """

    kld: float
    same_top1: float
    ppl: float


def text_rows(tokenizer: Any, text: str, rows: int = ROWS, length: int = ROW_LENGTH) -> torch.Tensor:
    """The first `rows` × `length` tokens of a text: int64 [rows, length]."""
    ids = tokenizer(text, verbose=False)["input_ids"][: rows * length]
    usable = len(ids) // length
    return torch.tensor(ids[: usable * length], dtype=torch.int64).view(usable, length)


def log_probabilities(model: Any, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """float32 [some rows, length, vocabulary], a few rows at a time."""
    for part in rows.split(ROWS_AT_A_TIME):
        with torch.no_grad():
            logits = model(input_ids=part.to(model.device), use_cache=False).logits
        yield torch.log_softmax(logits.float().cpu(), -1)


class Comparison:
    """The reference's log-probabilities of some rows, held as float32, and what is compared to them."""

    def __init__(self, reference: Iterable[torch.Tensor], rows: torch.Tensor) -> None:
        self.rows = rows
        self.reference = list(reference)

    def measure(self, candidate: Iterable[torch.Tensor]) -> Quality:
        """The candidate's log-probabilities, in the same parts."""
        pairs = (
            (expected.flatten(0, 1), found.flatten(0, 1))
            for expected, found in zip(self.reference, candidate, strict=True)
        )
        tokens = compare(self.rows, pairs)
        return Quality(
            float(tokens.kld.mean()), float(tokens.same_top1.mean()), math.exp(float(tokens.loss.mean()))
        )


def measure_folder(comparison: Comparison, folder: Path, dtype: torch.dtype = torch.float32) -> Quality:
    """Load a checkpoint, quantized or not, and compare it."""
    loaded = load(folder, dtype=dtype)
    return comparison.measure(log_probabilities(loaded.model, comparison.rows))
