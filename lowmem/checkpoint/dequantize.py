"""A quantized linear's tensors → the weight that they represent, on any device.

    weight[o, i] = (q[i, o] - zero[g_idx[i], o]) * scale[g_idx[i], o]

computed in float32 whatever dtype the scales have, then cast once. Works on slices of output columns, so that
the temporaries stay small beside the packed weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowmem.checkpoint.packing import unpack_rows, unpack_zeros

_SLICE_VALUES = 1 << 22  # weights dequantized at a time: 16 MiB in float32


@dataclass(frozen=True)
class PackedWeight:
    """The stored tensors of one quantized linear."""

    qweight: torch.Tensor
    """int32 [in * bits / 32, out]."""
    qzeros: torch.Tensor
    """int32 [groups, out * bits / 32]."""
    scales: torch.Tensor
    """[groups, out], any float."""
    g_idx: torch.Tensor
    """int32 [in], the group of each input column."""
    bits: int
    """Bits of a weight: 8, 4, 3 or 2."""
    zeros_v2: bool = False
    """`qzeros` holds the zero-points themselves; otherwise each is stored less one."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] as nn.Linear holds it, in `dtype`."""
        shape = (self.qweight.shape[1], self.g_idx.numel())
        weight = torch.empty(shape, dtype=dtype, device=self.qweight.device)
        for start, part in self.slices():
            weight[start : start + part.shape[1]] = part.T  # the assignment casts
        return weight

    def slices(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first output column, float32 weight [in, columns]) over all output columns."""
        zeros = unpack_zeros(self.qzeros, self.bits, v2=self.zeros_v2)  # [groups, out]
        count, inputs, outputs = self.scales.shape[0], self.g_idx.numel(), self.qweight.shape[1]
        in_order = self._groups_in_order()
        groups = self.g_idx.long()
        step = max(32, _SLICE_VALUES // max(1, inputs))
        for start in range(0, outputs, step):
            columns = slice(start, min(start + step, outputs))
            weight = unpack_rows(self.qweight[:, columns], self.bits).to(torch.float32)
            zero, scale = zeros[:, columns].to(torch.float32), self.scales[:, columns].to(torch.float32)
            if in_order:  # the same numbers without a gather of [in, columns]
                weight.view(count, inputs // count, -1).sub_(zero[:, None]).mul_(scale[:, None])
            else:
                weight.sub_(zero[groups]).mul_(scale[groups])
            yield start, weight

    def _groups_in_order(self) -> bool:
        """Groups of one size follow each other. False on a GPU, where the answer would cost a wait."""
        groups = self.scales.shape[0]
        if self.g_idx.device.type != "cpu" or groups == 0 or self.g_idx.numel() % groups:
            return False
        numbers = torch.arange(groups, dtype=self.g_idx.dtype)[:, None]
        return bool((self.g_idx.view(groups, -1) == numbers).all())
