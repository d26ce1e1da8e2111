"""The reference kernel: plain torch, on any device. Other kernels are tested against it."""

from __future__ import annotations

import torch

from lowmem.checkpoint.dequantize import PackedLinear, slices


def linear(x: torch.Tensor, linear: PackedLinear) -> torch.Tensor:
    """Multiply x [..., in] by the dequantized weight and add the bias; returns [..., out] in x's dtype.

    The weight is rounded to x's dtype before the product, as a dense model in that dtype would hold it.
    """
    rows = x.reshape(-1, x.shape[-1])
    result = torch.empty((rows.shape[0], linear.qweight.shape[1]), dtype=x.dtype, device=x.device)
    for start, part in slices(linear):
        result[:, start : start + part.shape[1]] = rows @ part.to(x.dtype)
    if linear.bias is not None:
        result += linear.bias.to(x.dtype)
    return result.view(*x.shape[:-1], -1)
