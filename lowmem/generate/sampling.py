"""How the next token is chosen: pure functions on logits, in the order temperature, top-k, top-p.

The filters are those of transformers' logits processors (top-p: Holtzman et al. 2020, "The Curious Case
of Neural Text Degeneration"), so that a model card's settings mean the same here.
"""

from __future__ import annotations

import torch

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidRequestError for settings that mean nothing."""
    if params.max_new_tokens < 1:
        raise InvalidRequestError(f"max_new_tokens is {params.max_new_tokens}", "Ask for at least 1 token")
    if not 0 <= params.temperature < float("inf"):
        raise InvalidRequestError(
            f"temperature is {params.temperature}", "Use 0 for greedy, or a positive number such as 0.2"
        )
    if params.top_k < 0:
        raise InvalidRequestError(f"top_k is {params.top_k}", "Use 0 to turn it off, or a positive number")
    if not 0 < params.top_p <= 1:
        raise InvalidRequestError(f"top_p is {params.top_p}", "Use a number above 0, and 1 to turn it off")


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """logits [..., vocab] with all but the k largest at -inf; ties with the k-th stay. 0: all stay."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """logits [..., vocab] with all but the nucleus at -inf.

    The nucleus is the smallest set of most likely tokens with a total probability of at least p; the
    most likely token is always in it. 1: all stay.
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the mass of the more likely tokens
    outside = before >= p
    outside[..., 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """logits [..., vocab] → the float32 distribution that is sampled; temperature must not be 0."""
    scaled = logits.to(torch.float32) / params.temperature
    return keep_top_p(keep_top_k(scaled, params.top_k), params.top_p).softmax(dim=-1)


def choose(
    logits: torch.Tensor, params: SamplingParams, generator: torch.Generator | None = None
) -> torch.Tensor:
    """logits [batch, vocab] → token ids [batch], int64; greedy when temperature is 0.

    `generator` lives on the device of the logits; the same seed gives the same tokens on one device.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(probabilities(logits, params), 1, generator=generator)[:, 0]


def seeded_generator(seed: int | None, device: torch.device | str) -> torch.Generator:
    """A generator on `device`; without a seed, one that differs from run to run."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
