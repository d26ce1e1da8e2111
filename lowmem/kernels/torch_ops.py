"""Linears by torch's own operators for integer weights on a CPU, for when our kernels are not compiled.

The operators multiply bfloat16 activations by 4-bit weights in groups of 32 to 256, or by 8-bit weights with
one scale for each output. Both want the integers in a layout of their own, so a linear is a repacked copy.
See registry.TorchOperators for what they take.
"""

from __future__ import annotations

import torch
from torch import nn

from lowmem.checkpoint.dequantize import PackedLinear
from lowmem.checkpoint.packing import unpack_rows, unpack_zeros
from lowmem.config import SLICE_WEIGHTS

INT4_GROUPS = (32, 64, 128, 256)
"""Group sizes that the operator has code for."""


class _TorchLinear(nn.Module):
    bias: torch.Tensor | None

    def __init__(self, linear: PackedLinear) -> None:
        """Repack the weight of `linear`."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", linear.bias)
        self.repack(linear)

    def repack(self, linear: PackedLinear) -> None:
        """Make the operator's tensors."""
        raise NotImplementedError

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows bfloat16 [n, in] → [n, out] without the bias."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out] in x's dtype."""
        result = self.product(x.reshape(-1, self.in_features).to(torch.bfloat16))
        if self.bias is not None:
            result = result + self.bias
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _slices(self) -> list[slice]:
        """Of outputs: multiples of 64, with SLICE_WEIGHTS or fewer weights where possible."""
        step = max(64, SLICE_WEIGHTS // self.in_features // 64 * 64)
        return [slice(start, start + step) for start in range(0, self.out_features, step)]


class TorchInt4Linear(_TorchLinear):
    """`_weight_int4pack_mm_for_cpu`: weight = (q - 8) scale + offset, a bfloat16 pair for each group."""

    def repack(self, linear: PackedLinear) -> None:
        """packed uint8 [out, in / 2]; pairs bfloat16 [in / group, out, 2] of scale and offset."""
        group_size = self.in_features // linear.scales.shape[0]
        self.size = next(size for size in reversed(INT4_GROUPS) if group_size % size == 0)
        scales = linear.scales.float()
        packed = torch.empty((self.out_features, self.in_features // 2), dtype=torch.uint8)
        for part in self._slices():
            values = unpack_rows(linear.qweight[:, part], 4).T.to(torch.int32).contiguous()
            packed[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        offsets = (8 - unpack_zeros(linear.qzeros, 4, linear.format.layout).float()) * scales
        pairs = torch.stack((scales, offsets), dim=-1).bfloat16()
        self.register_buffer("packed", packed)
        # A wide group is several of the operator's.
        self.register_buffer("pairs", pairs.repeat_interleave(group_size // self.size, 0))

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows bfloat16 [n, in] → [n, out] without the bias."""
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.packed, self.size, self.pairs
        )
        return result


class TorchInt8Linear(_TorchLinear):
    """`_weight_int8pack_mm`: symmetric 8-bit weights with one scale for each output."""

    def repack(self, linear: PackedLinear) -> None:
        """packed int8 [out, in]; row_scales bfloat16 [out]."""
        packed = torch.empty((self.out_features, self.in_features), dtype=torch.int8)
        for part in self._slices():
            packed[part] = (unpack_rows(linear.qweight[:, part], 8) ^ 128).view(torch.int8).T  # q - 128
        self.register_buffer("packed", packed)
        self.register_buffer("row_scales", linear.scales[0].bfloat16())

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows bfloat16 [n, in] → [n, out] without the bias."""
        result: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.row_scales)
        return result
