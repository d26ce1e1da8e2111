"""The divergence between two models: figures of each token, and their summary.

Everything is computed in float64 from logits, a few tokens at a time. P is the reference's distribution, Q
the other model's.

- KL divergence, at every position: sum over the vocabulary of p (log p - log q), in nats.
- same top-1, at every position: both have the same most likely token.
- perplexity, over predicted tokens (all of a row but its first): exp of the mean of -log q(correct token).
- Δp, over predicted tokens: q(correct) - p(correct).

Standard errors treat rows as independent samples, because tokens of one row are correlated: the standard
deviation of the row means over the root of the number of rows. With a single row, tokens are treated as
independent, which underestimates the error. The ratio of perplexities is exp of the mean difference of the
two losses, token by token, so difficulty common to both cancels; its error is the ratio times the error of
that mean (the delta method).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from lowmem.benchmarks.common.records import Bucket, Spread, TextQuality

EDGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
"""Edges of the buckets of the reference's largest probability; the last bucket includes its upper edge."""


@dataclass(frozen=True)
class Tokens:
    """Figures of each token; float64 or bool tensors [rows, row_length]."""

    kld: np.ndarray
    same_top1: np.ndarray
    confidence: np.ndarray
    """The reference's largest probability."""
    loss: np.ndarray
    """-log probability of the following token, [rows, row_length - 1]."""
    reference_loss: np.ndarray
    """The reference's, [rows, row_length - 1]."""
    change: np.ndarray
    """Δp, [rows, row_length - 1]."""


def compare(rows: torch.Tensor, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Tokens:
    """Compare the logits at all positions of token rows [rows, row_length].

    pairs: (reference's, other's) logits [some tokens, vocabulary], row after row. Raises ValueError if they
    do not cover the rows, or are not finite.
    """
    length = rows.shape[1]
    following = torch.roll(rows, -1, 1).reshape(-1)  # the value for a row's last token is not used
    found: dict[str, list[torch.Tensor]] = {}
    start = 0
    for reference, other in pairs:
        end = start + len(reference)
        for name, values in _of_part(reference, other, following[start:end]).items():
            found.setdefault(name, []).append(values)
        start = end
    if start != rows.numel():
        raise ValueError(f"{start} logits for {rows.numel()} tokens")
    whole = {name: torch.cat(parts).view(-1, length).numpy() for name, parts in found.items()}
    if unusable := [name for name, figures in whole.items() if not np.isfinite(figures).all()]:
        raise ValueError(f"{unusable[0]} is not finite")
    predicted = ("loss", "reference_loss", "change")
    return Tokens(**{name: v[:, :-1] if name in predicted else v for name, v in whole.items()})


def _of_part(
    reference: torch.Tensor, other: torch.Tensor, following: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The figures of some tokens, [tokens] each, on the CPU."""
    p = torch.log_softmax(reference.cpu().double(), -1)
    q = torch.log_softmax(other.cpu().double(), -1)
    right = following.cpu()[:, None]
    right_p, right_q = p.gather(-1, right)[:, 0], q.gather(-1, right)[:, 0]
    best, first = p.max(-1)
    weight = p.exp()
    # A probability of the reference that underflows to 0 contributes nothing.
    terms = torch.where(weight > 0, weight * (p - q), 0.0)
    return {
        "kld": terms.sum(-1),
        "same_top1": first == q.argmax(-1),
        "confidence": best.exp(),
        "loss": -right_q,
        "reference_loss": -right_p,
        "change": right_q.exp() - right_p.exp(),
    }


def summarize(text: str, tokens: Tokens) -> TextQuality:
    """Summarize the figures of one text."""
    difference = tokens.loss - tokens.reference_loss
    ratio = math.exp(difference.mean())
    same = tokens.same_top1.astype(np.float64)
    return TextQuality(
        text=text,
        tokens=int(tokens.kld.size),
        ppl=math.exp(tokens.loss.mean()),
        reference_ppl=math.exp(tokens.reference_loss.mean()),
        ppl_ratio=ratio,
        ppl_ratio_standard_error=ratio * standard_error(difference),
        kld=spread(tokens.kld),
        same_top1=float(same.mean()),
        same_top1_standard_error=standard_error(same),
        rms_dp=float(np.sqrt(np.mean(tokens.change**2))),
        buckets=tuple(_buckets(tokens)),
    )


def standard_error(values: np.ndarray) -> float:
    """Compute the standard error of the mean of values [rows, tokens].

    It is computed from the row means, or from the values if there is a single row.
    """
    samples = values.mean(1) if values.shape[0] > 1 else values[0]
    if len(samples) < 2:
        return 0.0
    return float(samples.std(ddof=1) / math.sqrt(len(samples)))


def spread(values: np.ndarray) -> Spread:
    """Compute mean and quantiles of values [rows, tokens]; quantiles are interpolated linearly."""
    median, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    return Spread(
        float(values.mean()),
        standard_error(values),
        float(median),
        float(p90),
        float(p99),
        float(values.max()),
    )


def _buckets(tokens: Tokens) -> Iterator[Bucket]:
    place = np.clip(np.searchsorted(EDGES, tokens.confidence, side="right") - 1, 0, len(EDGES) - 2)
    for index, (low, high) in enumerate(pairwise(EDGES)):
        inside = place == index
        count = int(inside.sum())
        kld = float(tokens.kld[inside].mean()) if count else 0.0
        same = float(tokens.same_top1[inside].mean()) if count else 0.0
        yield Bucket(low, high, count, kld, same)
