"""Attention on a card where several heads share a KV head: no copy of keys and values for every head.

The decoders' steps come with a mask, and torch's fused kernels for a mask take as many KV heads as heads.
transformers packs the heads of a single row instead, and repeats one KV head without a copy. It copies two KV
heads and more for every head where there are several rows, in prefill and in steps with a draft: 128 MiB in
each layer with 32 heads on 8 KV heads and 8192 tokens. Here KV heads become the batch, and the heads of each
read the same memory through a stride of 0, which the kernels take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lowmem_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' sdpa does, without copies of keys and values.

    The signature is that of transformers' `AttentionInterface`. query [batch, heads, rows, head_dim], key and
    value [batch, kv_heads, length, head_dim], attention_mask [batch or 1, 1, rows, length]. Returns the
    output [batch, rows, heads, head_dim] and no attention weights. What transformers does without a copy is
    left to it, and so is what is not plain attention with a mask.
    """
    batch, heads, rows, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    if (
        kv_heads in (1, heads)
        or rows == 1
        or getattr(module, "num_key_value_groups", 1) != heads // kv_heads
        or attention_mask is None
        or attention_mask.shape[1] != 1
        or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
        or kwargs.get("output_attentions")
    ):
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    shared = heads // kv_heads
    if attention_mask.shape[0] > 1:
        attention_mask = attention_mask.repeat_interleave(kv_heads, dim=0, output_size=batch * kv_heads)
    output = scaled_dot_product_attention(
        query.reshape(batch * kv_heads, shared, rows, size),
        key.reshape(batch * kv_heads, 1, length, -1).expand(-1, shared, -1, -1),
        value.reshape(batch * kv_heads, 1, length, -1).expand(-1, shared, -1, -1),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None


def use_grouped_attention(model: Any) -> bool:
    """Replace a model's sdpa attention by `grouped_attention`; returns whether the model uses it now."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(NAME)
    return getattr(config, "_attn_implementation", None) == NAME


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
