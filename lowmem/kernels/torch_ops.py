"""torch's own operators for integer weights on a CPU: what is used where our own kernels are not compiled.

They multiply bfloat16 activations by 4-bit weights in groups of multiples of 32, and by 8-bit weights with
one scale an output. Both want the integers in an order of their own: each linear is repacked in its turn, and
its packed tensors are let go, so that a load needs a copy of one linear. cuda.replace_linears puts them in
place and holds each shape's first linear against the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import unpack_rows, unpack_zeros
from lowmem.kernels.gptqmodel import Candidate

INT4_GROUPS = (32, 64, 128, 256)
"""That the operator has code for."""
_SLICE_VALUES = 1 << 22  # weights unpacked at a time: 16 MiB as int32


class _TorchLinear(nn.Module):
    """Holds a GPTQ weight until `post_init` repacks it; the constructor is that of GPTQModel's kernels."""

    REQUIRES_FORMAT_V2 = True
    bits = 4

    def __init__(
        self,
        *,
        bits: int,
        group_size: int,
        desc_act: bool,
        in_features: int,
        out_features: int,
        bias: bool,
        **_: Any,
    ) -> None:
        super().__init__()
        if bits != self.bits:
            raise ValueError(f"{bits} bits")
        if desc_act:
            raise ValueError("its inputs do not lie group by group")
        self.in_features, self.out_features = in_features, out_features
        self.group_size = in_features if group_size == -1 else group_size
        if in_features % self.group_size:
            raise ValueError(f"groups of {group_size} of {in_features} inputs")
        self.register_buffer("qweight", torch.empty(0, dtype=torch.int32))
        self.register_buffer("qzeros", torch.empty(0, dtype=torch.int32))
        self.register_buffer("scales", torch.empty(0, dtype=torch.float16))
        self.register_buffer("g_idx", torch.empty(0, dtype=torch.int32))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    def post_init(self) -> None:
        """Repack; the tensors of GPTQ's format are let go."""
        self.repack(unpack_zeros(self._tensor("qzeros"), self.bits, v2=True))
        del self.qweight, self.qzeros, self.scales, self.g_idx

    def repack(self, zeros: torch.Tensor) -> None:
        """Make the operator's tensors. zeros: uint8 [groups, out]."""
        raise NotImplementedError

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows bfloat16 [n, in] → [n, out] without the bias."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out] in x's dtype."""
        result = self.product(x.reshape(-1, self.in_features).to(torch.bfloat16))
        if self._buffers["bias"] is not None:
            result = result + self._tensor("bias")
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self._buffers[name]
        assert tensor is not None
        return tensor

    def _slices(self) -> list[slice]:
        """Of outputs: multiples of 64, whose integers as int32 stay within 16 MiB where they can."""
        step = max(64, _SLICE_VALUES // self.in_features // 64 * 64)
        return [slice(start, start + step) for start in range(0, self.out_features, step)]


class TorchInt4Linear(_TorchLinear):
    """`_weight_int4pack_mm_for_cpu`: weight = (q - 8) scale + offset, both in bfloat16, a pair a group."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.size = next((size for size in reversed(INT4_GROUPS) if self.group_size % size == 0), 0)
        if self.size == 0:
            raise ValueError(f"groups of {self.group_size} inputs")
        if self.out_features % 16:
            raise ValueError(f"{self.out_features} outputs")

    def repack(self, zeros: torch.Tensor) -> None:
        """packed uint8 [out, in / 2]; pairs bfloat16 [in / group, out, 2] of scale and offset."""
        qweight, scales = self._tensor("qweight"), self._tensor("scales").float()
        packed = torch.empty((self.out_features, self.in_features // 2), dtype=torch.uint8)
        for part in self._slices():
            values = unpack_rows(qweight[:, part], 4).T.to(torch.int32).contiguous()
            packed[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        offsets = (8 - zeros.float()) * scales
        pairs = torch.stack((scales, offsets), dim=-1).bfloat16()
        self.register_buffer("packed", packed)
        # A wide group is several of the operator's.
        self.register_buffer("pairs", pairs.repeat_interleave(self.group_size // self.size, 0))

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows bfloat16 [n, in] → [n, out] without the bias."""
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.packed, self.size, self.pairs
        )
        return result


class TorchInt8Linear(_TorchLinear):
    """`_weight_int8pack_mm`: symmetric 8-bit weights with one scale an output."""

    bits = 8

    def __init__(self, *, sym: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not sym or self.group_size != self.in_features:
            raise ValueError("8 bits in groups, or with zero-points")

    def repack(self, zeros: torch.Tensor) -> None:
        """packed int8 [out, in]; row_scales bfloat16 [out]."""
        qweight = self._tensor("qweight")
        packed = torch.empty((self.out_features, self.in_features), dtype=torch.int8)
        for part in self._slices():
            packed[part] = (unpack_rows(qweight[:, part], 8) ^ 128).view(torch.int8).T  # q - 128
        self.register_buffer("packed", packed)
        self.register_buffer("row_scales", self._tensor("scales")[0].bfloat16())

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows bfloat16 [n, in] → [n, out] without the bias."""
        result: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.row_scales)
        return result


def refuses(format: LinearFormat, dtype: torch.dtype) -> str:
    """Why torch's operators cannot multiply this format with these activations; nothing when they can."""
    if dtype is not torch.bfloat16:
        return f"for bfloat16, not {str(dtype).removeprefix('torch.')}"
    if format.bits == 4 and (format.group_size == -1 or format.group_size % 32 == 0):
        return ""
    if format.bits == 8 and format.group_size == -1 and format.sym:
        return ""
    return "for 4 bits in groups of multiples of 32, or 8 bits without groups and zero-points"


def candidates(format: LinearFormat, dtype: torch.dtype) -> tuple[Candidate, ...]:
    """The operators for this format, as cuda.replace_linears takes kernels; none where they refuse it."""
    if refuses(format, dtype):
        return ()
    kernel = TorchInt4Linear if format.bits == 4 else TorchInt8Linear
    return (Candidate(kernel.__name__, lambda: kernel),)
