"""Attention on a CPU for steps of a few tokens, row by row, and for prompts by the native kernels.

torch's attention shares work between the rows of a step, so a row's last bits depend on how many rows there
are. A draft's rows would leave other keys and values than one-row steps do, and two tokens of almost equal
probability could change places. Here every row is computed as in a step of its own. Heads that share a KV
head become the rows of one product, which is also faster (one thread, 8 rows at 8192 tokens: 21 ms instead of
29 for 48 heads on 1 KV head, 48 instead of 88 for 32 on 8); it is slower where no heads share one.

The native kernels attend to a prompt's rows in bfloat16: a StarChat layer takes 10 ms for 512 tokens instead
of torch's 41, and 229 instead of 805 at 8192 keys (two threads).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowmem.kernels import dispatch
from lowmem.kernels.native import attention as native_attention

NAME = "lowmem_rows"
MAX_ROWS = 16  # of a step; more rows are a prompt


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend row by row in short steps, natively in prompts that the kernels take, else with sdpa.

    The signature is that of transformers' `AttentionInterface`. query [batch, heads, rows, head_dim], key and
    value [batch, kv_heads, length, head_dim], attention_mask bool [batch, 1, rows, length]. Returns the
    output [batch, rows, heads, head_dim] and no attention weights.
    """
    batch, heads, rows, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    if rows > MAX_ROWS and not dropout and _is_native(module, query, key, value, attention_mask, kwargs):
        return native_attention.prompt_attention(query, key, value, scaling), None
    if (
        rows > MAX_ROWS
        or dropout
        or query.device.type != "cpu"
        or attention_mask is None
        or attention_mask.shape[1] != 1
        or not getattr(module, "is_causal", False)
        or kwargs.get("position_bias") is not None
        # Keys behind the last row: a cache of fixed length. A single row follows its mask.
        or (rows > 1 and not bool(attention_mask[..., -1, -1].all()))
    ):
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    outputs = []
    for row in range(rows):
        seen = length - rows + row + 1
        # [batch, kv_heads, heads of each, head_dim]: heads that share a KV head are rows of its product
        packed = query[:, :, row].reshape(batch, kv_heads, heads // kv_heads, -1)
        if heads == kv_heads:  # torch takes 2.4 times as long for a product of one row as for one of two
            packed = packed.expand(-1, -1, 2, -1)
        output = scaled_dot_product_attention(
            packed,
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=attention_mask[:, :, row : row + 1, :seen],
            scale=scaling,
        )
        outputs.append(output[:, :, : heads // kv_heads].reshape(batch, 1, heads, -1))
    return torch.cat(outputs, dim=1), None


def _is_native(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> bool:
    """Whether this is plain causal attention of a prompt, in a form that the native kernels take."""
    if any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
        return False
    if not getattr(module, "is_causal", False) or kwargs.get("is_causal") is False:
        return False
    if not native_attention.takes(query, key, value) or dispatch.why_not_native():
        return False
    return query.shape[2] == key.shape[2] if mask is None else _is_causal(mask, query.shape[2], key.shape[2])


_known: tuple[weakref.ref[torch.Tensor] | None, bool] = (None, False)
"""The last mask that was checked, which all layers of a forward share, and the result."""


def _is_causal(mask: torch.Tensor, rows: int, length: int) -> bool:
    """Whether a mask lets each of the last rows see itself and all rows before it, and no others."""
    global _known
    if _known[0] is not None and _known[0]() is mask:
        return _known[1]
    found = mask.dtype is torch.bool and tuple(mask.shape) == (1, 1, rows, length)
    if found:
        found = torch.equal(mask[0, 0], torch.ones(rows, length, dtype=torch.bool).tril(length - rows))
    _known = (weakref.ref(mask), found)
    return found


def use_row_attention(model: Any) -> bool:
    """Replace a model's sdpa attention by `row_attention`; returns whether the model uses it now."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(NAME)
    return getattr(config, "_attn_implementation", None) == NAME


AttentionInterface.register(NAME, row_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
