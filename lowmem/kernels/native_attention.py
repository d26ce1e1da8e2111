"""A prompt's attention by our own kernels (csrc/attention.c): no key is expanded to the heads that share it."""

from __future__ import annotations

import ctypes

import torch

from lowmem.kernels import native

_UNIT = 16  # a head's size is a multiple of it


class LmKv(ctypes.Structure):
    """`lm_kv` of csrc/lowmem.h."""

    _fields_ = (
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `prompt_attention` takes these: bfloat16 on the CPU, one text, whole rows of a cache.

    query [1, heads, rows, size], key and value [1, kv_heads, length, size] with length >= rows.
    """
    if any(
        t.dtype is not torch.bfloat16 or t.device.type != "cpu" or t.dim() != 4 for t in (query, key, value)
    ):
        return False
    (batch, heads, rows, size), (_, kv_heads, length, _) = query.shape, key.shape
    if (
        key.shape != value.shape
        or key.stride() != value.stride()
        or key.shape[::3] != (1, size)
        or batch != 1
    ):
        return False
    if min(rows, size, kv_heads) < 1 or size % _UNIT or heads % kv_heads or rows > length:
        return False
    if any(t.requires_grad for t in (query, key, value)) and torch.is_grad_enabled():
        return False
    in_rows = query.stride(3) == key.stride(3) == 1 and (length == 1 or key.stride(2) == size)
    return in_rows and (kv_heads == 1 or (key.stride(1) % size == 0 and key.stride(1) >= length * size))


def prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """Causal attention of the last rows of a text: row r sees the keys 0..length - rows + r.

    Of what `takes` accepts; scaling: of a product of query and key, size ** -0.5 unless given. Gives bfloat16
    [1, rows, heads, size]. Products are of bfloat16 summed in float32 (all float32 without AVX-512 BF16), and
    a row's result does not depend on the others. Raises ValueError for anything else.
    """
    if not takes(query, key, value):
        raise ValueError(f"attention of {query.dtype} {list(query.shape)} to {key.dtype} {list(key.shape)}")
    _, heads, rows, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    capacity = length if kv_heads == 1 else key.stride(1) // size
    kv = LmKv(heads, kv_heads, size, capacity, key.data_ptr(), value.data_ptr())
    result = torch.empty((1, rows, heads, size), dtype=torch.bfloat16)
    with native.running() as library:
        space = native.workspace(library.lm_prompt_attention_workspace(ctypes.addressof(kv), length))
        library.lm_prompt_attention(
            ctypes.addressof(kv), query.data_ptr(), query.stride(2), query.stride(1), rows, length,
            size**-0.5 if scaling is None else scaling, result.data_ptr(), space,
        )  # fmt: skip
    return result
