"""Attention of prompts by lowmem's own kernels: float64 is the oracle, and rows are independent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowmem.generate import attention
from lowmem.generate.attention import use_row_attention
from lowmem.generate.cache.dense import DenseKVCache
from lowmem.kernels import dispatch
from lowmem.kernels.native import attention as native_attention
from lowmem.kernels.native import library as native
from tests.helpers import tiny_model
from tests.kernels.native_oracle import ISAS, using

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())


def tensors(
    heads: int, kv_heads: int, size: int, rows: int, length: int, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as a model passes them: heads side by side in a token, keys from a cache."""
    generator = torch.Generator().manual_seed(heads * length + rows)
    wide = torch.randn(1, rows, heads * size + 32, generator=generator).bfloat16() * 2
    query = wide[..., : heads * size].view(1, rows, heads, size).transpose(1, 2)
    caches = torch.randn(2, 1, kv_heads, length + room, size, generator=generator).bfloat16()
    caches[:, :, :, length:] = torch.nan  # the rest of the cache is never read
    return query, caches[0, :, :, :length], caches[1, :, :, :length]


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """In float64: [1, rows, heads, size]."""
    share, rows, length = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    keys, values = (t.double().repeat_interleave(share, 1) for t in (key, value))
    seen = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    weights = (query.double() @ keys.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ values).transpose(1, 2)


SHAPES = [
    (48, 1, 128, 40, 40), (48, 1, 128, 17, 600), (8, 2, 64, 33, 257), (6, 6, 16, 20, 512), (3, 1, 48, 1, 1),
    (9, 3, 64, 5, 255),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_agrees_with_float64(isa: str, shape: tuple[int, int, int, int, int]) -> None:
    query, key, value = tensors(*shape, room=7)
    with using(isa) as there:
        if not there:
            pytest.skip(f"no {isa}")
        for scaling in (None, 0.05):
            got = native_attention.prompt_attention(query, key, value, scaling)
            right = exact(query, key, value, shape[2] ** -0.5 if scaling is None else scaling)
            assert got.shape == right.shape and got.dtype is torch.bfloat16
            assert float((got.double() - right).norm() / right.norm()) < 0.005


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_depends_on_no_other_row(isa: str) -> None:
    query, key, value = tensors(8, 2, 32, 50, 300)
    with using(isa) as there:
        if not there:
            pytest.skip(f"no {isa}")
        whole = native_attention.prompt_attention(query, key, value)
        for first, last in ((0, 1), (0, 17), (17, 33), (49, 50)):
            seen = 250 + last
            part = native_attention.prompt_attention(
                query[:, :, first:last], key[:, :, :seen], value[:, :, :seen]
            )
            assert torch.equal(part, whole[:, first:last])


def test_several_texts_are_independent() -> None:
    query, key, value = (t.repeat(3, 1, 1, 1) for t in tensors(8, 2, 32, 20, 30))
    key, value = key * torch.arange(1, 4)[:, None, None, None], value.flip(2)
    whole = native_attention.prompt_attention(query, key, value)
    for text in range(3):
        alone = native_attention.prompt_attention(*(t[text : text + 1] for t in (query, key, value)))
        assert torch.equal(whole[text : text + 1], alone)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_keys_and_values_may_have_any_strides(kv_heads: int) -> None:
    query, key, value = tensors(4, kv_heads, 32, 20, 30, room=2)
    right = native_attention.prompt_attention(query, key, value)
    for change in (
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat([t, t], -1)[..., :32],
    ):
        assert torch.equal(native_attention.prompt_attention(query, change(key), change(value)), right)
        assert torch.equal(native_attention.prompt_attention(query, key, change(value)), right)
    one = key[:, :1].expand(1, 2, -1, -1), value[:, :1].expand(1, 2, -1, -1)
    again = native_attention.prompt_attention(query, key[:, :1], value[:, :1])
    assert torch.equal(native_attention.prompt_attention(query, *one), again)


def test_unsupported_tensors_are_refused() -> None:
    query, key, value = tensors(4, 2, 32, 6, 9)
    assert native_attention.takes(query, key, value)
    others: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = [
        (query.float(), key, value),
        (query, key.float(), value.float()),
        (query, key, value[:, :, :8]),
        (query[:, :3], key, value),
        (query[..., :24], key[..., :24], value[..., :24]),
        (query, key[:, :, :5], value[:, :, :5]),
        (query.to("meta"), key, value),
        (query.mT.contiguous().mT, key, value),
        (query.expand(2, -1, -1, -1), key, value),
        (query, key[:, :0], value[:, :0]),
    ]
    key_cache, value_cache = (torch.zeros(1, 2, 12, 32).bfloat16() for _ in range(2))
    assert native_attention.takes(query, key_cache[:, :, :9], value_cache[:, :, :9])
    for three in others:
        assert not native_attention.takes(*three)
        with pytest.raises(ValueError, match="unsupported attention of"):
            native_attention.prompt_attention(*three)


@pytest.mark.parametrize(("kind", "window"), [("gpt_bigcode_mqa", None), ("llama", None), ("starcoder2", 12)])
@torch.inference_mode()
def test_a_models_prompt_uses_it_if_its_mask_is_causal(
    kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model(kind, vocab=512).bfloat16()
    model.config.sliding_window = window
    ids = torch.randint(1, 512, (1, 60), generator=torch.Generator().manual_seed(0))
    size = model.config.hidden_size // model.config.num_attention_heads
    assert size % 16 == 0
    calls: list[int] = []
    real = native_attention.prompt_attention

    def counted(query: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(query.shape[2])
        return real(query, *others)

    monkeypatch.setattr(native_attention, "prompt_attention", counted)

    def logits() -> torch.Tensor:
        cache = DenseKVCache(model.config.num_hidden_layers, 64).slots[0].view
        parts = [model(input_ids=part, past_key_values=cache).logits[0] for part in ids.split(30, dim=1)]
        return torch.cat(parts).double()

    expected = logits()
    assert use_row_attention(model) and not calls
    found = logits()
    layers = model.config.num_hidden_layers
    assert calls == ([] if window else [30] * 2 * layers)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    calls.clear()
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    logits()
    assert not calls


def test_a_causal_mask_is_told_from_others() -> None:
    causal = torch.ones(20, 50, dtype=torch.bool).tril(30)[None, None]
    window = causal & ~torch.ones(20, 50, dtype=torch.bool).tril(20)
    for mask, right in ((causal, True), (window, False), (causal, True), (causal.clone(), True)):
        assert attention._is_causal(mask, 20, 50) is right
        assert attention._is_causal(mask, 20, 50) is right
    assert not attention._is_causal(causal.float(), 20, 50)
    assert not attention._is_causal(causal, 20, 49)
