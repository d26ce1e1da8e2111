"""Attention on a card: transformers' sdpa is the oracle, and no head gets a copy of keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowmem.generate import grouped_attention
from lowmem.generate.cache.dense import DenseKVCache
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.graph import GraphDecoder
from lowmem.generate.grouped_attention import NAME, use_grouped_attention
from tests.generate.test_attention import logits_of, rows_left_to_sdpa
from tests.helpers import KINDS, tiny_model
from tests.kernels.test_contract import peak_bytes
from tests.pretended_card import OnCard, PretendedCard, RepeatedGraphs

HEADS, LENGTH = 48, 8192


@pytest.mark.parametrize(("kind", "window"), [*((kind, None) for kind in KINDS), ("starcoder2", 12)])
def test_logits_are_those_of_sdpa(kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind, vocab=512)
    model.config.sliding_window = window
    parts = [20, 2, 1, 16, 5, 17]
    expected = logits_of(model, DenseKVCache(2, 64).slots[0].view, parts)
    left = rows_left_to_sdpa(grouped_attention, monkeypatch)
    assert use_grouped_attention(model) and model.config._attn_implementation == NAME
    torch.testing.assert_close(
        logits_of(model, DenseKVCache(2, 64).slots[0].view, parts), expected, rtol=1e-4, atol=1e-4
    )
    if kind in ("gpt_bigcode_mqa", "gpt_bigcode_mha"):
        assert len(left) == 2 * len(parts)
    else:  # a single row, and a prompt without a mask
        assert set(left) <= {1, 20}


def test_masks_of_several_rows_of_a_batch_are_kept() -> None:
    """Padding: each row of the batch has a mask of its own."""
    model = tiny_model("llama", vocab=512)
    ids = torch.randint(1, 512, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = mask[2, :1] = 0
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert use_grouped_attention(model)
        got = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_other_attention_is_left_as_it_is() -> None:
    model = tiny_model("llama", vocab=512)
    model.set_attn_implementation("eager")
    assert not use_grouped_attention(model) and model.config._attn_implementation == "eager"
    assert not use_grouped_attention(torch.nn.Linear(1, 1))


def filled(model: Any, capacity: int, slots: int = 1) -> DenseKVCache:
    """A cache that is full but for 64 tokens of each slot, as after a long prompt."""
    cache = DenseKVCache(model.config.num_hidden_layers, capacity, slots)
    EagerDecoder(model).prefill([Feed(slot, [1]) for slot in cache.slots])
    for slot in cache.slots:
        rows = [
            OnCard(torch.randn(1, *slot.layout().shape, generator=torch.Generator().manual_seed(7)))
            for _ in range(2 * len(slot.layers))
        ]
        slot.load(rows, [1] * (capacity - 64))
    return cache


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama"])
def test_a_step_copies_no_keys_for_every_head(kind: str) -> None:
    """The decoders of a card, by what they allocate: 48 heads on 1 KV head, or on 24.

    Keys and values of all heads would be 48 MiB.
    """
    model = tiny_model(kind, layers=1, hidden=HEADS * 16, heads=HEADS, vocab=512, positions=LENGTH)
    with PretendedCard() as card:
        cache = filled(card.move(model), LENGTH)
        (slot,) = cache.slots
        eager = EagerDecoder(model)
        assert model.config._attn_implementation == NAME
        captured = GraphDecoder(eager, cache, graphs=RepeatedGraphs(card))
        assert len(slot.tokens) == LENGTH - 64
        for step in (
            lambda: eager.step([Feed(slot, [5])]),
            lambda: eager.step([Feed(slot, [6, 7, 8, 9])]),
            lambda: eager.prefill([Feed(slot, list(range(10, 30)))]),
            lambda: captured.step([Feed(slot, [5])]),
        ):
            peak, _ = peak_bytes(step)
            assert peak < 2 << 20
    assert len(slot.tokens) == LENGTH - 64 + 26


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama"])
def test_a_step_of_several_sequences_copies_none(kind: str) -> None:
    model = tiny_model(kind, layers=1, hidden=HEADS * 16, heads=HEADS, vocab=512, positions=LENGTH)
    with PretendedCard() as card:
        cache = filled(card.move(model), LENGTH, slots=2)
        captured = GraphDecoder(EagerDecoder(model), cache, graphs=RepeatedGraphs(card))
        feeds = [Feed(slot, [5]) for slot in cache.slots]
        captured.step(feeds)  # makes the graph
        peak, _ = peak_bytes(lambda: captured.step(feeds))
    assert not captured.batches.why_not and peak < 2 << 20
