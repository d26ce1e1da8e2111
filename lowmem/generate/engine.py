"""Token ids in, token ids out: prefill, then decode. Knows nothing of text.

`generate` is a generator: its first next() is the prefill and gives the first token (the TTFT), each
further one decodes a token with the KV cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, LowmemError
from lowmem.generate.sampling import check_sampling, choose, seeded_generator

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Token:
    """One generated token; the last one carries why it is the last.

    finish_reason: "stop" (the id is a stop id), "length" (max_new_tokens reached), "context" (the
    model's positions are used up), None while there is more to come.
    """

    id: int
    finish_reason: FinishReason | None


def generate(
    model: Any, prompt: Sequence[int], params: SamplingParams, stop_ids: Collection[int] = ()
) -> Iterator[Token]:
    """Continue `prompt` (token ids) with `model` (a transformers causal LM) until something ends it.

    Everything is checked before the first next(). Raises InvalidRequestError for an empty prompt, an id
    outside of the vocabulary, a prompt longer than the model's positions, or sampling settings that
    mean nothing.
    """
    check_sampling(params)
    positions = context_length(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not prompt:
        raise InvalidRequestError("the prompt is empty", "Give at least one token")
    if len(prompt) > positions:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens, the model has positions for {positions}",
            "Shorten the prompt",
        )
    if not all(0 <= token < vocabulary for token in prompt):
        raise InvalidRequestError(
            f"the prompt has a token id outside of the model's vocabulary of {vocabulary}",
            "The tokenizer and the model are not of the same checkpoint",
        )
    return _tokens(model, list(prompt), params, frozenset(stop_ids), positions)


def context_length(model: Any) -> int:
    """The number of positions that prompt and answer share; a model without a limit has 2^31 - 1."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else 2**31 - 1


def _tokens(
    model: Any, prompt: list[int], params: SamplingParams, stop_ids: frozenset[int], positions: int
) -> Iterator[Token]:
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    generator = seeded_generator(params.seed, device) if params.temperature > 0 else None
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt], device=device)  # [1, prompt] for the prefill, then [1, 1]
    for count in range(1, params.max_new_tokens + 1):
        # Not around the yield: what runs between two tokens is the caller's.
        with torch.inference_mode():
            logits = _last_logits(model, ids, cache)  # [1, vocab]
            if not bool(logits.isfinite().any()) or bool(logits.isnan().any()):
                raise LowmemError(
                    "the model's output is not finite",
                    "Check the checkpoint with `lowmem verify`; float16 may overflow where bfloat16 does not",
                )
            chosen = choose(logits, params, generator)
        token = int(chosen)
        reason: FinishReason | None = None
        if token in stop_ids:
            reason = "stop"
        elif count == params.max_new_tokens:
            reason = "length"
        elif len(prompt) + count > positions:  # the token just chosen has no position to be read at
            reason = "context"
        yield Token(token, reason)
        if reason:
            return
        ids = chosen[:, None]


def _last_logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Feed ids [1, n] behind what the cache holds; the logits [1, vocab] after the last of them."""
    # The whole prompt's logits of a large vocabulary can outweigh the model's activations.
    last_only = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, **last_only)
    logits: torch.Tensor = output.logits[:, -1]
    return logits
