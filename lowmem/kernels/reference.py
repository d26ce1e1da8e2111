"""Dequantize and multiply in plain torch, on any device: the oracle that other kernels are tested against.

    weight[o, i] = (q[i, o] - zero[g_idx[i], o]) * scale[g_idx[i], o]

computed in float32 whatever the scales are stored as, then cast once. Works on slices of output
columns, so that the temporaries stay small beside the packed weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lowmem.checkpoint.packing import unpack_rows, unpack_zeros

_SLICE_VALUES = 1 << 22  # weights dequantized at a time: 16 MiB in float32


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
    weight = torch.empty((qweight.shape[1], g_idx.numel()), dtype=dtype, device=qweight.device)
    for start, part in _slices(qweight, qzeros, scales, g_idx, bits, v2):
        weight[start : start + part.shape[1]] = part.T  # the assignment casts
    return weight


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
    for start, part in _slices(qweight, qzeros, scales, g_idx, bits, v2):
        stop = start + part.shape[1]
        result[:, start:stop] = rows @ part.to(x.dtype)
    if bias is not None:
        result += bias.to(x.dtype)
    return result.view(*x.shape[:-1], -1)


def _slices(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    v2: bool,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first output column, float32 weight [in, columns]) over all output columns."""
    zeros = unpack_zeros(qzeros, bits, v2=v2)  # [groups, out]
    count, inputs, outputs = scales.shape[0], g_idx.numel(), qweight.shape[1]
    in_order = _groups_in_order(g_idx, count)
    groups = g_idx.long()
    step = max(32, _SLICE_VALUES // max(1, inputs))
    for start in range(0, outputs, step):
        columns = slice(start, min(start + step, outputs))
        weight = unpack_rows(qweight[:, columns], bits).to(torch.float32)
        zero, scale = zeros[:, columns].to(torch.float32), scales[:, columns].to(torch.float32)
        if in_order:  # the same numbers without a gather of [in, columns]
            weight.view(count, inputs // count, -1).sub_(zero[:, None]).mul_(scale[:, None])
        else:
            weight.sub_(zero[groups]).mul_(scale[groups])
        yield start, weight


def _groups_in_order(g_idx: torch.Tensor, groups: int) -> bool:
    """The columns lie group by group, all groups of one size. False on a GPU, which would have to wait."""
    if g_idx.device.type != "cpu" or groups == 0 or g_idx.numel() % groups:
        return False
    numbers = torch.arange(groups, dtype=g_idx.dtype)[:, None]
    return bool((g_idx.view(groups, -1) == numbers).all())
