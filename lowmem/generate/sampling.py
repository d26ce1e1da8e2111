"""How the next token is chosen: pure functions on logits, and the `Sampler` that carries one answer's state.

The order is that of transformers' generate: repetition penalty (greedy too), then temperature, top-k, top-p,
min-p. The filters are those of its logits processors (repetition penalty: Keskar et al. 2019, "CTRL"; top-p:
Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"; min-p: Nguyen et al. 2024, "Turning Up
the Heat"), so that a model card's settings mean the same here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem.config import SamplingParams
from lowmem.errors import LowmemError

_BINS, _SPAN = 4096, 32.0  # of `nucleus`: e^-32 of the likeliest token's probability is nothing


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """logits [..., vocab] with those of `seen` (bool [vocab]) divided by penalty, or multiplied if < 0."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """logits [..., vocab] with all but the k largest at -inf; ties with the k-th stay. 0: all stay."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float, *, ordered: bool = False) -> torch.Tensor:
    """logits [..., vocab] with all but the nucleus at -inf.

    The nucleus is the smallest set of most likely tokens with a total probability of at least p; the
    most likely token is always in it. 1: all stay. ordered: the logits fall already, so nothing is sorted.
    """
    if p >= 1:
        return logits
    falling, order = (logits, None) if ordered else logits.sort(dim=-1, descending=True)
    likely = falling.softmax(dim=-1)
    before = likely.cumsum(dim=-1) - likely  # the mass of the more likely tokens
    outside = before >= p
    outside[..., 0] = False
    if order is not None:
        outside = torch.zeros_like(outside).scatter(-1, order, outside)
    return logits.masked_fill(outside, -torch.inf)


def nucleus(logits: torch.Tensor, p: float) -> torch.Tensor | None:
    """The ids that `keep_top_p` keeps of logits [vocab], rising; None when they are not finite.

    Only those are sorted that share a bin of 1/128 with the last one: 0.2 ms on a CPU for 49156 logits, of
    which the sort alone would take 3.
    """
    peak = logits.amax()
    if not math.isfinite(float(peak)):
        return None
    likely = logits.softmax(dim=-1)
    bins = ((peak - logits) * (_BINS / _SPAN)).clamp(max=_BINS - 1).to(torch.int32)
    mass = torch.bincount(bins, weights=likely, minlength=_BINS).cumsum(dim=-1)
    edge = min(int(torch.searchsorted(mass, p)), _BINS - 1)
    kept = bins < edge
    there = (bins == edge).nonzero()[:, 0]
    falling, order = likely[there].sort(descending=True)
    before = falling.cumsum(dim=-1) - falling
    if edge:
        before += mass[edge - 1]
    kept[there[order[before < p]]] = True
    return kept.nonzero()[:, 0]


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """logits [..., vocab] with all below p times the likeliest's probability at -inf. 0: all stay."""
    if p == 0:
        return logits
    likely = logits.softmax(dim=-1)
    top = likely.amax(dim=-1, keepdim=True)
    return logits.masked_fill((likely < p * top) & (likely < top), -torch.inf)


def candidates(
    logits: torch.Tensor, params: SamplingParams, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """logits [vocab] → (float32 probabilities [n], their token ids [n]); the temperature must not be 0.

    ids None: the probabilities are those of the whole vocabulary. With top_k they are of the k likeliest
    (more where tokens tie with the k-th) and with top_p alone of the nucleus, so that the vocabulary is
    seldom sorted; in the vocabulary's order, so that two tokens of almost one probability may change ranks
    and a number still means the same token.
    seen: bool [vocab], the tokens that the repetition penalty is for.
    """
    scores = logits.to(torch.float32)
    if seen is not None and params.repetition_penalty != 1:
        scores = penalize(scores, seen, params.repetition_penalty)
    scores = scores / params.temperature
    ids = found = None
    # A sort is cheap on a GPU, and waiting for the number of ties is not.
    if 0 < params.top_k < scores.shape[-1] and scores.device.type == "cpu":
        values, ids = scores.topk(params.top_k)
        tied = int((scores >= values[-1]).sum())
        if tied > params.top_k:
            values, ids = scores.topk(tied)
        scores = values
    elif params.top_p < 1 and params.top_k == 0 and scores.device.type == "cpu":
        found = nucleus(scores, params.top_p)
    else:
        scores = keep_top_k(scores, params.top_k)
    if found is not None:
        scores, ids = scores[found], found
    else:
        scores = keep_top_p(scores, params.top_p, ordered=ids is not None)
    scores = keep_min_p(scores, params.min_p)
    likely = scores.softmax(dim=-1)
    if ids is None:
        return likely, None
    ids, order = ids.sort()
    return likely[order], ids


def probabilities(
    logits: torch.Tensor, params: SamplingParams, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """logits [vocab] → the float32 distribution [vocab] that is sampled; the temperature must not be 0."""
    likely, ids = candidates(logits, params, seen)
    return likely if ids is None else torch.zeros_like(logits, dtype=torch.float32).scatter(0, ids, likely)


def draw(likely: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """probabilities [n], uniform numbers [...] in [0, 1) → indices [...]: the inverse of the distribution.

    One number decides a token, and no value in `likely`, not even a NaN, makes it fail: on a GPU nothing has
    to be waited for.
    """
    return _draw(likely, points)[0]


def _draw(likely: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indices, the mass before each, the mass with it); see `draw`."""
    mass = likely.to(torch.float64).cumsum(dim=-1)
    mass = mass / mass[-1]
    index = torch.searchsorted(mass, points.to(mass), right=True).clamp(max=likely.shape[-1] - 1)
    return index, torch.where(index > 0, mass[index - 1], 0.0), mass[index]


@dataclass(frozen=True)
class Choice:
    """A chosen token. logprob and top (the likeliest tokens, best first): None and () unless asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer, one after the other.

    Holds what the choice depends on beside the logits: the tokens that are there already, and a stream of
    random numbers of which each token takes one, whatever the device and the number of rows in a forward.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocabulary: int, device: torch.device | str
    ) -> None:
        self.params = params
        self._random = random.Random(params.seed)  # without a seed it differs from run to run
        self._point = self._random.random()
        self._seen: torch.Tensor | None = None
        if params.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[list(prompt)] = True
            self._seen = self._seen.to(device)

    def choose(self, logits: torch.Tensor) -> Choice:
        """logits [vocab] → the next token; LowmemError when they are not finite.

        logprob and top are log-softmax of the raw logits in float32: the model's own distribution, before
        penalty, temperature and filters.
        """
        choice = self.choose_clear(logits, 0.0)
        assert choice is not None
        return choice

    def choose_clear(self, logits: torch.Tensor, noise: float) -> Choice | None:
        """As `choose`, on logits that may be off by `noise` as a share of the largest.

        None: that much could make it another token. Then nothing has changed, and the choice can be made once
        more on better logits. (Sampling looks at the borders of the chosen token's share; that another token
        may just be in the nucleus, or not, is left out.)
        """
        if self.params.temperature == 0:
            chosen, low, high = self._greedy(logits, second=noise > 0)
        else:
            likely, ids = candidates(logits, self.params, self._seen)
            index, low, high = _draw(likely, torch.tensor(self._point, dtype=torch.float64))
            chosen = index if ids is None else ids[index]
        # All numbers in one transfer: a GPU is waited for once a token. A NaN is its own maximum.
        plain = self.params.temperature == 0 and self._seen is None
        numbers = [part.to(torch.float64) for part in (chosen, high if plain else logits.amax(), low, high)]
        token, peak, below, above = torch.stack(numbers).tolist()
        if not math.isfinite(peak):
            raise LowmemError(
                "the model's output is not finite",
                "Check the checkpoint with `lowmem verify`; float16 may overflow where bfloat16 does not",
            )
        if noise > 0 and not self._clear(below, above, noise * abs(peak)):
            return None
        self._point = self._random.random()
        if self._seen is not None:
            self._seen[int(token)] = True
        return self._choice(int(token), logits)

    def _greedy(
        self, logits: torch.Tensor, *, second: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(token, the runner-up's score, the token's score)."""
        scores = logits
        if self._seen is not None:
            scores = penalize(logits.to(torch.float32), self._seen, self.params.repetition_penalty)
        best, token = scores.max(dim=-1)
        return token, scores.topk(2).values[1] if second and scores.shape[-1] > 1 else best, best

    def _clear(self, low: float, high: float, error: float) -> bool:
        """Whether no logits that are off by less than `error` choose another token."""
        if self.params.temperature == 0:
            return high - low > error
        # d(mass)/d(logits): a border at mass c moves by at most 2 c (1 - c) error / temperature.
        shift = 2 * error / self.params.temperature
        point = self._point
        return point - low >= shift * low * (1 - low) and high - point >= shift * high * (1 - high)

    def _choice(self, token: int, logits: torch.Tensor) -> Choice:
        if self.params.logprobs is None:
            return Choice(token)
        logprobs = logits.to(torch.float32).log_softmax(dim=-1)
        best = logprobs.topk(min(self.params.logprobs, logprobs.shape[-1]))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Choice(token, float(logprobs[token]), top)
