"""Dequantize and multiply in plain torch, on any device: the oracle that other kernels are tested against."""

from __future__ import annotations

import torch

from lowmem.checkpoint.dequantize import PackedWeight


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    dtype: torch.dtype = torch.float32,
    *,
    v2: bool = False,
) -> torch.Tensor:
    """The weight [out, in] as nn.Linear holds it, in `dtype`.

    qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out],
    g_idx [in] with the group of each input column. v2: zero-points are stored as they are.
    """
    return PackedWeight(qweight, qzeros, scales, g_idx, bits, v2).dequantize(dtype)


def linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    *,
    v2: bool = False,
) -> torch.Tensor:
    """x [..., in] times the dequantized weight, plus bias: [..., out] in x's dtype.

    The weight is rounded to x's dtype before the product, as a dense model in that dtype would hold it.
    """
    rows = x.reshape(-1, x.shape[-1])
    result = torch.empty((rows.shape[0], qweight.shape[1]), dtype=x.dtype, device=x.device)
    for start, part in PackedWeight(qweight, qzeros, scales, g_idx, bits, v2).slices():
        stop = start + part.shape[1]
        result[:, start:stop] = rows @ part.to(x.dtype)
    if bias is not None:
        result += bias.to(x.dtype)
    return result.view(*x.shape[:-1], -1)
