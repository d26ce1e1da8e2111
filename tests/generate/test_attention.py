"""Attention row by row: transformers' sdpa is the oracle, and a row's bits do not depend on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from lowmem.generate import attention
from lowmem.generate.attention import NAME, use_row_attention
from lowmem.generate.cache.dense import DenseKVCache
from tests.helpers import KINDS, tiny_model


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(1, 512, (1, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits_of(model: Any, cache: Any, parts: list[int], **options: Any) -> torch.Tensor:
    """Logits of `ids_of`, fed in parts of the given lengths."""
    ids, start, logits = ids_of(sum(parts)), 0, []
    for count in parts:
        part = ids[:, start : start + count]
        logits.append(model(input_ids=part, past_key_values=cache, use_cache=True, **options).logits[0])
        start += count
    return torch.cat(logits)


def rows_left_to_sdpa(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each later call that an attention of ours leaves to transformers. module: where it is."""
    found: list[int] = []
    real = module.sdpa_attention_forward

    def sdpa(owner: Any, query: torch.Tensor, *args: Any, **options: Any) -> Any:
        found.append(query.shape[2])
        return real(owner, query, *args, **options)

    monkeypatch.setattr(module, "sdpa_attention_forward", sdpa)
    return found


@pytest.mark.parametrize(("kind", "window"), [*((kind, None) for kind in KINDS), ("starcoder2", 12)])
def test_logits_are_those_of_sdpa(kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind, vocab=512)
    model.config.sliding_window = window
    parts = [20, 2, 1, 16, 5, 17]
    expected = logits_of(model, DenseKVCache(2, 64).slots[0].view, parts)
    whole = rows_left_to_sdpa(attention, monkeypatch)
    assert use_row_attention(model) and model.config._attn_implementation == NAME
    torch.testing.assert_close(
        logits_of(model, DenseKVCache(2, 64).slots[0].view, parts), expected, rtol=1e-4, atol=1e-4
    )
    assert whole == [20, 20, 17, 17]  # what is not a step of a few rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_how_many_came_with_it(kind: str) -> None:
    """In bfloat16, where products of two rows and more give each row the same bits."""
    model = tiny_model(kind, vocab=512, dtype=torch.bfloat16, hidden=128)
    use_row_attention(model)
    caches = [DenseKVCache(2, 64).slots[0].view for _ in range(3)]
    parts = [[40, 10], [40, 2, 8], [40, 5, 2, 3]]
    first, *others = [logits_of(model, cache, part) for cache, part in zip(caches, parts, strict=True)]
    for logits in others:
        assert torch.equal(logits, first)


def test_a_cache_of_fixed_length_is_left_to_sdpa() -> None:
    """Its last keys are not the last row's."""
    model = tiny_model("llama", vocab=512)
    expected = logits_of(model, DenseKVCache(2, 64).slots[0].view, [20, 5, 1, 7])
    use_row_attention(model)
    static = StaticCache(config=model.config, max_cache_len=64)
    torch.testing.assert_close(logits_of(model, static, [20, 5, 1, 7]), expected, rtol=1e-4, atol=1e-4)


def test_other_attention_is_left_as_it_is() -> None:
    model = tiny_model("llama", vocab=512)
    model.set_attn_implementation("eager")
    assert not use_row_attention(model) and model.config._attn_implementation == "eager"
    assert not use_row_attention(torch.nn.Linear(1, 1))
