"""Choosing the next token: pure functions on logits, and the `Sampler` that carries one answer's state.

The order is that of transformers' generate: repetition penalty (greedy too), then temperature, top-k, top-p,
min-p. The filters are those of its logits processors (repetition penalty: Keskar et al. 2019, "CTRL"; top-p:
Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"; min-p: Nguyen et al. 2024, "Turning Up
the Heat"), so a model card's settings mean the same here. OpenAI's presence and frequency penalties and its
logit bias follow the repetition penalty, as in vLLM.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem.cards.find import widest_float
from lowmem.config import SamplingParams
from lowmem.errors import LowmemError
from lowmem.generate.constraint import Constraint
from lowmem.generate.noise import gumbel
from lowmem.generate.transfer import fetch

_BINS, _SPAN = 4096, 32.0  # of `nucleus`: probabilities below e^-32 of the largest one are negligible


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """logits [..., vocab], those of `seen` (bool [vocab]) divided by penalty, or multiplied if negative."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """logits [..., vocab] with all but the k largest set to -inf; ties with the k-th stay. 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float, *, ordered: bool = False) -> torch.Tensor:
    """logits [..., vocab] with all outside of the nucleus set to -inf. 1 keeps all.

    The nucleus is the smallest set of most likely tokens with a total probability of at least p; the most
    likely token is always in it. ordered: the logits are in descending order already.
    """
    if p >= 1:
        return logits
    descending, order = (logits, None) if ordered else logits.sort(dim=-1, descending=True)
    likely = descending.softmax(dim=-1)
    before = likely.cumsum(dim=-1) - likely  # the mass of the more likely tokens
    outside = before >= p
    outside[..., 0] = False
    if order is not None:
        outside = torch.zeros_like(outside).scatter(-1, order, outside)
    return logits.masked_fill(outside, -torch.inf)


def nucleus(logits: torch.Tensor, p: float) -> torch.Tensor | None:
    """The ids that `keep_top_p` keeps of logits [vocab], in ascending order; None if they are not finite.

    Sorts only the logits in the bin, 1/128 wide, in which the nucleus ends: 0.2 ms on a CPU for 49156 logits
    instead of 3 for a full sort.
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
    descending, order = likely[there].sort(descending=True)
    before = descending.cumsum(dim=-1) - descending
    if edge:
        before += mass[edge - 1]
    kept[there[order[before < p]]] = True
    return kept.nonzero()[:, 0]


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """logits [..., vocab] with tokens below p times the largest probability set to -inf. 0 keeps all."""
    if p == 0:
        return logits
    likely = logits.softmax(dim=-1)
    top = likely.amax(dim=-1, keepdim=True)
    return logits.masked_fill((likely < p * top) & (likely < top), -torch.inf)


def distribution(
    logits: torch.Tensor, params: SamplingParams, seen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convert logits [vocab] to (float32 probabilities [n], their token ids [n]).

    The temperature must not be 0. ids None: the probabilities are of the whole vocabulary. With top_k they
    are of the k most likely tokens (more if some tie with the k-th), with top_p alone of the nucleus, so the
    vocabulary is seldom sorted.
    seen: bool [vocab], the tokens that the repetition penalty applies to.
    """
    scores = logits.to(torch.float32)
    if seen is not None and params.repetition_penalty != 1:
        scores = penalize(scores, seen, params.repetition_penalty)
    scores = scores / params.temperature
    ids = found = None
    # On a GPU a sort is cheap, and waiting for the number of ties is not.
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
    return scores.softmax(dim=-1), ids


@dataclass(frozen=True)
class SampledToken:
    """A chosen token."""

    id: int
    logprob: float | None = None
    """None unless `SamplingParams.logprobs` is set."""
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the most likely tokens, best first."""


class Sampler:
    """Chooses the tokens of one answer, one after the other.

    Holds the tokens so far, for the repetition penalty, and the key of the noise that decides (`gumbel`).
    A token depends on its logits, the key and its place in the answer, not on the rows of a forward.

    constraint: which tokens may be chosen. Temperature and filters then see only those, as in vLLM.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocabulary: int,
        device: torch.device | str,
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self._constraint = constraint
        self._key = random.Random(params.seed).getrandbits(64)  # without a seed it differs from run to run
        self._place = 0  # in the answer, of the token that comes next
        self._ids = torch.arange(vocabulary, device=device)
        self._seen: torch.Tensor | None = None
        if params.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[list(prompt)] = True
            self._seen = self._seen.to(device)
        self._chosen: set[int] = set()  # tokens of the answer
        self._bias: torch.Tensor | None = None  # float32 [vocab], added to the logits
        if params.logit_bias or params.presence_penalty or params.frequency_penalty:
            self._bias = torch.zeros(vocabulary)
            for token, bias in params.logit_bias:
                self._bias[token] = bias
            self._bias = self._bias.to(device)

    @property
    def ended(self) -> bool:
        """Whether the constraint allows no further token."""
        return self._constraint is not None and self._constraint.ended

    def choose(self, logits: torch.Tensor) -> SampledToken:
        """Choose the next token from logits [vocab]. Raises LowmemError when they are not finite.

        logprob and top are of the model's own distribution, before penalty, temperature and filters: the
        log-softmax of the logits in float32.
        """
        choice = self.choose_clear(logits, 0.0)
        assert choice is not None
        return choice

    def choose_clear(self, logits: torch.Tensor, noise: float) -> SampledToken | None:
        """As `choose`, on logits that may be off by `noise`, a share of the largest logit.

        Returns None if that error could change the token. The state is then unchanged, and the choice can be
        repeated on better logits. (It is ignored that a token may just enter or leave the nucleus.)
        """
        scores, ids = self._scores(logits), None
        if self._constraint is not None:
            ids = self._constraint.allowed().to(scores.device)
            scores = scores.take(ids)
        scores, ids = self._decisive(scores, ids, self._place)
        chosen, low, high = _best(scores, second=noise > 0)
        if ids is not None:
            chosen = ids.take(chosen)
        # One transfer, so a GPU is waited for once a token. amax propagates NaN.
        plain = scores is logits
        wide = widest_float(logits.device)
        numbers = torch.stack(
            [part.to(wide) for part in (chosen, high if plain else logits.amax(), low, high)]
        )
        (token, peak, below, above), *own = fetch(numbers, *self._logprobs(logits, chosen))
        if not math.isfinite(peak):
            raise LowmemError(
                "the model's output is not finite",
                "Check the checkpoint with `lowmem verify`, or use bfloat16 if it ran in float16",
            )
        # Of sampling, the gap of two logits is divided by the temperature.
        if noise > 0 and above - below <= noise * abs(peak) / (self.params.temperature or 1):
            return None
        self._place += 1
        self._saw(int(token))
        if not own:
            return SampledToken(int(token))
        (logprob,), names, values = own
        return SampledToken(int(token), logprob, tuple(zip(map(int, names), values, strict=True)))

    def guess(self, logits: torch.Tensor, ahead: int) -> int:
        """The token that would be chosen `ahead` tokens after the next one, if these were its logits.

        logits: [n] of a draft model, for the first n ids of the vocabulary. Changes nothing; a constraint,
        and the penalties of tokens that are not chosen yet, are passed over.
        """
        scores, ids = self._decisive(self._scores(logits), None, self._place + ahead)
        chosen = scores.argmax(dim=-1)
        return int(chosen if ids is None else ids.take(chosen))

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits with penalties and bias; `logits` itself without any."""
        scores, count = logits, logits.shape[-1]
        if self._seen is not None:
            scores = penalize(scores.to(torch.float32), self._seen[:count], self.params.repetition_penalty)
        if self._bias is not None:
            scores = scores.to(torch.float32) + self._bias[:count]
        return scores

    def _decisive(
        self, scores: torch.Tensor, ids: torch.Tensor | None, place: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(what the chosen token has the largest of, the ids of its entries; None: the vocabulary's).

        scores: [n], of these ids. The scores themselves are decisive without a temperature; else
        log-probabilities, with the noise of the place.
        """
        if self.params.temperature == 0:
            return scores, ids
        likely, kept = distribution(scores, self.params)
        if kept is not None:
            ids = kept if ids is None else ids.take(kept)
        names = self._ids[: likely.shape[-1]] if ids is None else ids
        return likely.to(widest_float(likely.device)).log() + gumbel(self._key, place, names), ids

    def _saw(self, token: int) -> None:
        """Count a chosen token for the penalties and the constraint."""
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._bias is not None:
            first = token not in self._chosen
            self._chosen.add(token)
            self._bias[token] -= self.params.frequency_penalty + first * self.params.presence_penalty

    def _logprobs(self, logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(the chosen token's, ids of the most likely tokens, theirs); empty if none are asked for."""
        if self.params.logprobs is None:
            return ()
        logprobs = logits.to(torch.float32).log_softmax(dim=-1)
        best = logprobs.topk(min(self.params.logprobs, logprobs.shape[-1]))
        return logprobs.take(chosen), best.indices, best.values


def _best(scores: torch.Tensor, *, second: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index of the best, the runner-up's score, the best score); without `second` the best score twice.

    Without a runner-up its score is -inf.
    """
    best, index = scores.max(dim=-1)
    if not second:
        return index, best, best
    if scores.shape[-1] == 1:
        return index, torch.full_like(best, -torch.inf), best
    return index, scores.topk(2).values[1], best
