"""A quantized linear's tensors → the weight that they represent, on any device.

    weight[o, i] = (q[i, o] - zero[g_idx[i], o]) * scale[g_idx[i], o]

computed in float32 whatever dtype the scales have, then cast once. Works on slices of output columns, so that
the temporaries stay small beside the packed weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import unpack_rows, unpack_zeros
from lowmem.config import SLICE_WEIGHTS


class PackedLinear(Protocol):
    """A linear with its weight in GPTQ's tensors: a PackedWeight, or a module (kernels/quant_linear.py)."""

    format: LinearFormat
    qweight: torch.Tensor
    """int32 [in * bits / 32, out]."""
    qzeros: torch.Tensor
    """int32 [groups, out * bits / 32]."""
    scales: torch.Tensor
    """[groups, out], any float."""
    g_idx: torch.Tensor
    """int32 [in], the group of each input column."""
    bias: torch.Tensor | None
    """[out]."""

    @property
    def in_features(self) -> int:
        """Input columns."""

    @property
    def out_features(self) -> int:
        """Outputs."""

    @property
    def bits(self) -> int:
        """Bits of a weight."""


@dataclass
class PackedWeight:
    """A PackedLinear that is its stored tensors alone."""

    format: LinearFormat
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        """See PackedLinear."""
        return self.g_idx.numel()

    @property
    def out_features(self) -> int:
        """See PackedLinear."""
        return self.qweight.shape[1]

    @property
    def bits(self) -> int:
        """See PackedLinear."""
        return self.format.bits


def dequantize(linear: PackedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Dequantize a packed weight to [out, in], the layout of nn.Linear, in `dtype`."""
    shape = (linear.qweight.shape[1], linear.g_idx.numel())
    weight = torch.empty(shape, dtype=dtype, device=linear.qweight.device)
    for start, part in slices(linear):
        weight[start : start + part.shape[1]] = part.T  # the assignment casts
    return weight


def slices(linear: PackedLinear) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first output column, float32 weight [in, columns]) until all output columns are dequantized."""
    qweight, scales, g_idx, bits = linear.qweight, linear.scales, linear.g_idx, linear.bits
    layout = linear.format.layout
    zeros = unpack_zeros(linear.qzeros, bits, layout)  # [groups, out]
    count, inputs, outputs = scales.shape[0], g_idx.numel(), qweight.shape[1]
    in_order = _groups_in_order(g_idx, count)
    groups = g_idx.long()
    step = max(32, SLICE_WEIGHTS // max(1, inputs))
    for start in range(0, outputs, step):
        columns = slice(start, min(start + step, outputs))
        weight = unpack_rows(qweight[:, columns], bits, layout).to(torch.float32)
        zero, scale = zeros[:, columns].to(torch.float32), scales[:, columns].to(torch.float32)
        if in_order:  # the same numbers without a gather of [in, columns]
            weight.view(count, inputs // count, -1).sub_(zero[:, None]).mul_(scale[:, None])
        else:
            weight.sub_(zero[groups]).mul_(scale[groups])
        yield start, weight


def _groups_in_order(g_idx: torch.Tensor, groups: int) -> bool:
    """Groups of one size follow each other. False on a GPU, where the answer would cost a wait."""
    if g_idx.device.type != "cpu" or groups == 0 or g_idx.numel() % groups:
        return False
    numbers = torch.arange(groups, dtype=g_idx.dtype)[:, None]
    return bool((g_idx.view(groups, -1) == numbers).all())
