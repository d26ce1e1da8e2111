"""Attention of a prompt by lowmem's own kernels (csrc/attention/), without expanding shared keys."""

from __future__ import annotations

import ctypes

import torch

from lowmem.kernels.native import library as native
from lowmem.kernels.native.header import LmKv, LmQuery

_UNIT = 16  # the size of a head is a multiple of this


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `prompt_attention` supports these: bfloat16 on the CPU, without gradients.

    query [texts, heads, rows, size], key and value [texts, kv_heads, length, size] with length >= rows.
    """
    three = (query, key, value)
    if any(t.dtype is not torch.bfloat16 or t.device.type != "cpu" or t.dim() != 4 for t in three):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in three):
        return False
    (texts, heads, rows, size), (_, kv_heads, length, _) = query.shape, key.shape
    if key.shape != value.shape or key.shape[::3] != (texts, size):
        return False
    if min(texts, rows, size, kv_heads) < 1 or size % _UNIT or heads % kv_heads or rows > length:
        return False
    return query.stride(3) == 1


def prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """Causal attention of the last rows of each text: row r sees the keys 0..length - rows + r.

    scaling: of the product of query and key; the default is size ** -0.5. Returns bfloat16 [texts, rows,
    heads, size]. Keys and values that are not slices of a cache are copied. With AVX-512 BF16, products are
    of bfloat16 summed in float32; otherwise everything is float32. A row's result does not depend on the
    other rows. Raises ValueError if `takes` is False.
    """
    if not takes(query, key, value):
        raise ValueError(
            f"unsupported attention of {query.dtype} {list(query.shape)} to {key.dtype} {list(key.shape)}"
        )
    texts, heads, rows, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    if not _in_rows(key) or key.stride() != value.stride():
        key, value = key.contiguous(), value.contiguous()
    capacity = length if kv_heads == 1 else key.stride(1) // size
    result = torch.empty((texts, rows, heads, size), dtype=torch.bfloat16)
    with native.running() as library:
        for q, k, v, out in zip(query, key, value, result, strict=True):
            kv = LmKv(heads, kv_heads, size, capacity, k.data_ptr(), v.data_ptr())
            scale = size**-0.5 if scaling is None else scaling
            rows_of = LmQuery(q.data_ptr(), q.stride(1), q.stride(0), rows, length, scale)
            space = native.workspace(library.lm_prompt_attention_workspace(ctypes.byref(kv), length))
            library.lm_prompt_attention(ctypes.byref(kv), ctypes.byref(rows_of), out.data_ptr(), space)
    return result


def _in_rows(cache: torch.Tensor) -> bool:
    """Whether each head's [length, size] is contiguous and a whole number of rows from the next."""
    _, heads, length, size = cache.shape
    if cache.stride(3) != 1 or (length > 1 and cache.stride(2) != size):
        return False
    return heads == 1 or (cache.stride(1) % size == 0 and cache.stride(1) >= length * size)
