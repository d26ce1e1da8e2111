"""Integers and scales of GPTQ → ggml's blocks, and which block type holds a linear exactly.

ggml's symmetric types store 32 weights of a row as one float16 d and 32 integers n; a weight is n * d:

    Q4_0   n from -8 to 7      18 bytes: d, then n + 8: weights 0..15 in the low nibbles, 16..31 in the high
    Q5_0   n from -16 to 15    22 bytes: d, the fifth bits of n + 16 in one word, then nibbles as in Q4_0
    Q8_0   n from -128 to 127  34 bytes: d, then n

A weight of GPTQ is (q - zero) * scale, so a linear fits exactly where its groups are whole blocks of
neighbouring columns, its scales are float16 numbers, and q - zero is in the range of n. The layout is
`block_q4_0` and its neighbours in ggml's ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowmem.checkpoint.dequantize import PackedLinear
from lowmem.checkpoint.packing import unpack_rows, unpack_zeros

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
BLOCK = 32
"""Weights of a row that share d."""
RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
"""The integers n of each type, the smallest type first."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""ggml's types that are not blocks."""
_ROUNDED_WIDTHS = 6
"""The widest linears that Q8_0 may round. Its step is 1/16 of a 4-bit grid's, and half of a 7-bit grid's."""


@dataclass(frozen=True)
class GridFacts:
    """What decides how a packed linear fits into blocks; read from all of its tensors but the integers."""

    bits: int
    low: int
    """The smallest q - zero that its format allows."""
    high: int
    """The largest."""
    whole_rows: bool
    """The row is a whole number of blocks of 32 columns."""
    blocks: bool
    """So it is, and each block lies in one group."""
    float16_scales: bool
    """Every scale is a float16 number."""

    @property
    def block_type(self) -> str | None:
        """The smallest type whose integers are the linear's; None if its weights have to be rounded."""
        if not self.blocks:
            return None
        fitting = (name for name, (low, high) in RANGES.items() if low <= self.low and self.high <= high)
        return next(fitting, None)

    @property
    def kind(self) -> str:
        """The type to store the linear in: `block_type`, or else one that rounds the weights little."""
        if self.block_type:
            return self.block_type
        return "Q8_0" if self.whole_rows and self.bits <= _ROUNDED_WIDTHS else "F16"

    @property
    def exact(self) -> bool:
        """Whether no weight changes."""
        return self.block_type is not None and self.float16_scales


def grid_facts(linear: PackedLinear) -> GridFacts:
    """The facts of a linear; its `qweight` is not read."""
    zeros = unpack_zeros(linear.qzeros, linear.bits, linear.format.layout)
    low, high = (int(edge) for edge in zeros.aminmax())
    whole_rows = linear.in_features % BLOCK == 0
    groups = linear.g_idx.view(-1, BLOCK) if whole_rows else linear.g_idx
    scales = linear.scales.float()
    return GridFacts(
        linear.bits,
        low=-high,
        high=(1 << linear.bits) - 1 - low,
        whole_rows=whole_rows,
        blocks=whole_rows and bool((groups == groups[:, :1]).all()),
        float16_scales=bool((scales.half().float() == scales).all()),
    )


class LinearEncoder:
    """Encodes rows of a packed linear as blocks of `kind`, its `block_type`."""

    def __init__(self, linear: PackedLinear, kind: str) -> None:
        self.linear, self.kind = linear, kind
        self._groups = linear.g_idx.long()
        self._zeros = unpack_zeros(linear.qzeros, linear.bits, linear.format.layout)  # [groups, out]

    def encode(self, outputs: torch.Tensor) -> Bytes:
        """The rows of these outputs, int64, in this order: uint8 [outputs, bytes of a row]."""
        linear, groups = self.linear, self._groups
        values = unpack_rows(linear.qweight[:, outputs], linear.bits, linear.format.layout).to(
            torch.int16
        )  # [in, outputs]
        values -= self._zeros[:, outputs].to(torch.int16)[groups]
        d = linear.scales[:, outputs].half()[groups[::BLOCK]]  # [blocks, outputs]
        return pack_blocks(values.T.reshape(len(outputs), -1, BLOCK), d.T, self.kind)


def pack_blocks(integers: torch.Tensor, d: torch.Tensor, kind: str) -> Bytes:
    """Blocks of `kind` from int16 n [rows, blocks, 32] and float16 d [rows, blocks].

    Returns uint8 [rows, bytes of a row].
    """
    rows, blocks, _ = integers.shape
    parts = [d.contiguous().view(torch.uint8).view(rows, blocks, 2)]
    if kind == "Q8_0":
        parts.append(integers.to(torch.int8).view(torch.uint8))
    else:
        shifted = (integers - RANGES[kind][0]).to(torch.uint8)
        low = shifted & 15
        if kind == "Q5_0":
            fifth = (shifted >> 4).view(rows, blocks, 4, 8) << torch.arange(8, dtype=torch.uint8)
            parts.append(fifth.sum(-1, dtype=torch.uint8))
        parts.append(low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4)
    packed: Bytes = torch.cat(parts, dim=-1).view(rows, -1).numpy()
    return packed


def encode_dense(weight: torch.Tensor, kind: str) -> Bytes:
    """A float tensor as `kind`, rounded where that holds less: uint8 [rows, bytes of a row], 1-D: [bytes]."""
    if kind in FLOATS:
        return weight.to(FLOATS[kind]).contiguous().view(torch.uint8).numpy()
    from gguf import GGMLQuantizationType, quantize

    packed: Bytes = quantize(weight.float().contiguous().numpy(), GGMLQuantizationType[kind])
    return packed


def decode(data: bytes, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 tensor that bytes of `kind` hold, by the gguf package's own reading."""
    from gguf import GGMLQuantizationType, dequantize

    if kind in FLOATS:
        return torch.frombuffer(bytearray(data), dtype=FLOATS[kind]).view(shape).float()
    raw = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
    values = dequantize(raw, GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(shape)
