"""The KV cache: transformers' own is the oracle, going back, and layers that an interrupt has left apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowmem.generate.cache import KVCache
from tests.helpers import KINDS, tiny_model


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 512, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def feed(model: Any, cache: KVCache, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
    return logits


@pytest.mark.parametrize(("kind", "window"), [*((kind, None) for kind in KINDS), ("starcoder2", 12)])
def test_logits_are_those_without_a_cache(kind: str, window: int | None) -> None:
    model = tiny_model(kind, vocab=512)
    ids = ids_of(40)
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[0]
        if window is not None:
            model.config.sliding_window = window
        expected = model(input_ids=ids).logits[0]
    assert torch.equal(expected, whole) == (window is None)
    cache = KVCache(2, 40)
    got = torch.cat([feed(model, cache, ids[:, a:b]) for a, b in ((0, 16), (16, 30), (30, 31), (31, 40))])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert cache.length == 40 and not cache.fixed


def test_cut_goes_back() -> None:
    model, cache = tiny_model("llama", vocab=512), KVCache(2, 64)
    ids, other = ids_of(20), ids_of(10, seed=1)
    feed(model, cache, ids)
    cache.cut(10)
    after = feed(model, cache, other)
    fresh = KVCache(2, 64)
    feed(model, fresh, ids[:, :10])
    torch.testing.assert_close(after, feed(model, fresh, other), rtol=1e-4, atol=1e-4)
    for length in (-1, 21):
        with pytest.raises(ValueError, match="cannot cut"):
            cache.cut(length)


def test_layers_that_disagree_count_as_the_shortest_and_are_cut_alike() -> None:
    cache, rows = KVCache(3, 16), torch.zeros(1, 1, 4, 8)
    for layer in range(3):
        cache.update(rows, rows, layer)
    cache.update(rows, rows, 0)  # and then the forward was interrupted
    assert cache.length == 4
    with pytest.raises(ValueError):
        cache.cut(5)
    cache.cut(4)
    assert [layer.length for layer in cache.kv_layers] == [4, 4, 4]


def test_too_much_is_refused_and_nothing_is_written() -> None:
    cache, rows = KVCache(1, 6), torch.ones(1, 1, 4, 8)
    cache.update(rows, rows, 0)
    with pytest.raises(ValueError, match="8 tokens do not fit a KV cache of 6"):
        cache.update(2 * rows, rows, 0)
    assert cache.length == 4 and cache.kv_layers[0].keys is not None
    assert cache.kv_layers[0].keys[0, 0, 4:].abs().max() == 0
    assert cache.nbytes == 2 * 6 * 8 * 4
    for layers, capacity in ((0, 1), (1, 0)):
        with pytest.raises(ValueError):
            KVCache(layers, capacity)


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_steps_are_the_steps_of_the_filled_part(kind: str) -> None:
    model = tiny_model(kind, vocab=512)
    ids = ids_of(20)
    cache, fixed = KVCache(2, 32), KVCache(2, 32)
    feed(model, cache, ids[:, :12])
    feed(model, fixed, ids[:, :12])
    for step in range(12, 20):
        if step == 16:  # back, and once more
            fixed.cut(14)
            cache.cut(14)
            feed(model, cache, ids[:, 14:16])
            for again in (14, 15):
                fixed_step(model, fixed, ids[:, again : again + 1])
        one = feed(model, cache, ids[:, step : step + 1])
        torch.testing.assert_close(
            fixed_step(model, fixed, ids[:, step : step + 1]), one, rtol=1e-4, atol=1e-4
        )
    assert fixed.fixed and fixed.length == cache.length == 20
    assert [int(layer.position) for layer in fixed.kv_layers] == [20, 20]
    fixed.set_fixed(False)
    more = ids_of(3, seed=2)
    torch.testing.assert_close(feed(model, fixed, more), feed(model, cache, more), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def fixed_step(model: Any, cache: KVCache, ids: torch.Tensor) -> torch.Tensor:
    if not cache.fixed:
        cache.set_fixed(True)
    place = torch.tensor([[cache.length]])
    logits: torch.Tensor = model(
        input_ids=ids, past_key_values=cache, position_ids=place, use_cache=True
    ).logits
    cache.advance(1)
    return logits[0]


@pytest.mark.parametrize("kind", ["gpt_bigcode_mqa", "llama"])
def test_a_one_row_step_packs_the_heads_that_share_a_kv_head(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own grouped queries take 22 times as long on a CPU, for a StarChat layer at 8192 tokens."""
    model, cache = tiny_model(kind, vocab=512), KVCache(2, 32)
    feed(model, cache, ids_of(12))
    shapes: list[tuple[int, ...]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        assert not options.get("enable_gqa")
        shapes.append(tuple(query.shape))
        return real(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    feed(model, cache, ids_of(1))
    heads = {"gpt_bigcode_mqa": (1, 1, 4, 16), "llama": (1, 2, 2, 16)}[kind]
    assert shapes == [heads, heads]
