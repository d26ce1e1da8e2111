"""A linear whose packed weight our Triton kernels multiply. Tensors are checked once, when it is made."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lowmem.cards.find import using
from lowmem.checkpoint.dequantize import PackedLinear
from lowmem.checkpoint.packing import all_middle, rows_in_order
from lowmem.kernels.contract import Unsuitable
from lowmem.kernels.triton import decode, prefill
from lowmem.kernels.triton.choice import FEW_ROWS, TILE_ROWS, Choice, PrefillShape, scratch_columns


class TritonLinear(nn.Module):
    """x [..., in] → [..., out] in x's dtype. Holds the packed tensors as they are stored.

    An act-order weight with scattered groups gets its rows sorted by group, once, and each x its inputs.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    order: torch.Tensor | None

    invariant_rows = FEW_ROWS
    """A row's bits do not depend on the other rows while there are no more than these."""

    def __init__(self, linear: PackedLinear, choice: Choice | None = None) -> None:
        """Take over the tensors of `linear`. choice: by default the plainest.

        Raises Unsuitable for tensors that the kernels cannot read.
        """
        super().__init__()
        self.format, self.choice = linear.format, choice or Choice()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        groups = linear.scales.shape[0]
        self.group = self.in_features if linear.format.group_size == -1 else linear.format.group_size
        order = group_order(linear.g_idx, self.group)
        qweight = linear.qweight
        if order is not None:
            qweight = rows_in_order(qweight, linear.bits, linear.format.layout, order)
        for name, tensor in (("qweight", qweight), ("qzeros", linear.qzeros)):
            if tensor.dtype is not torch.int32:
                raise Unsuitable(f"its {name} is {tensor.dtype}")
        if groups != -(-self.in_features // self.group):
            raise Unsuitable(f"it has {groups} groups")
        self.register_buffer("qweight", qweight.contiguous())
        self.register_buffer("qzeros", linear.qzeros.contiguous())
        self.register_buffer("scales", linear.scales.contiguous())
        self.register_buffer("bias", linear.bias)
        self.register_buffer("order", order)
        self.middle = all_middle(self.qzeros, linear.bits, linear.format.layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        rows = rows.contiguous()
        with using(rows.device):  # Triton launches on the current card
            y = self._product(rows)
        return y.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, in] → [n, out], by the code for so many rows."""
        count = rows.shape[0]
        if count <= FEW_ROWS:
            return self._few(rows)
        if count < self.choice.dense_rows and rows.dtype is not torch.float32:
            return self._many(rows, self.choice.tile if count <= TILE_ROWS else self.choice.prefill)
        return self._dense(rows)

    def _constants(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        return {
            "BITS": self.format.bits,
            "PLANAR": self.format.planar,
            "LESS_ONE": not self.format.zeros_v2,
            "MIDDLE": self.middle,
            "GROUP": self.group,
            "enable_fp_fusion": True,  # Triton 3.10 changes its default
        }

    def _few(self, rows: torch.Tensor) -> torch.Tensor:
        """Up to FEW_ROWS rows."""
        count, K, N = rows.shape[0], self.in_features, self.out_features
        y = rows.new_empty((count, N))
        if count == 0:
            return y
        shape = self.choice.decode
        wide = rows.dtype is torch.float32
        if not wide:
            if rows.data_ptr() % 8:  # four activations are read at once
                rows = rows.clone()
            rows = rows.view(torch.int64)
        units = -(-K // 32)
        per_part = -(-units // (shape.parts * shape.warps)) * shape.warps
        parts = -(-units // per_part)
        block = shape.outputs(count)
        target = y if parts == 1 else rows.new_empty((parts, count, N), dtype=torch.float32)
        decode.few_rows[(-(-N // block), parts)](
            rows, self.qweight, self.qzeros, self.scales, self._bias(y), target, K, N, per_part,
            **self._constants(),
            SHARED=math.gcd(self.group, 32),
            ROWS=count,
            FLOAT=str(y.dtype).removeprefix("torch."),
            BIAS=self.bias is not None,
            WHOLE=K % (32 * per_part) == 0 and N % block == 0,
            SPLIT=parts > 1,
            UNITS=shape.warps,
            BLOCK=block,
            num_warps=shape.warps,
        )  # fmt: skip
        if parts > 1:
            decode.add_parts[(-(-y.numel() // 1024),)](
                target, self._bias(y), y, y.numel(), N,
                PARTS=parts, BIAS=self.bias is not None, BLOCK=1024, num_warps=4,
            )  # fmt: skip
        return y

    def _many(self, rows: torch.Tensor, shape: PrefillShape) -> torch.Tensor:
        """More rows, in 16 bits, a tile of the weight at a time."""
        count, K, N = rows.shape[0], self.in_features, self.out_features
        y = rows.new_empty((count, N))
        prefill.many_rows[(-(-N // shape.block), -(-count // shape.rows))](
            rows, self.qweight, self.qzeros, self.scales, self._bias(y), y, count, K, N,
            **self._constants(),
            BIAS=self.bias is not None,
            FACTORS="float32" if rows.device.type == "cpu" else "",
            STEP=shape.step,
            BLOCK_M=shape.rows,
            BLOCK_N=shape.block,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )  # fmt: skip
        return y

    def _dense(self, rows: torch.Tensor) -> torch.Tensor:
        """Many rows: slices of the weight are dequantized and multiplied densely."""
        K, N = self.in_features, self.out_features
        y = rows.new_empty((rows.shape[0], N))
        step, block = 64, 128
        columns = scratch_columns(K, N)
        for start in range(0, N, columns):
            count = min(columns, N - start)
            scratch = rows.new_empty((K, count))
            prefill.dequantize[(-(-K // step), -(-count // block))](
                self.qweight, self.qzeros, self.scales, scratch, K, N, start, count,
                **self._constants(), STEP=step, BLOCK=block, num_warps=4,
            )  # fmt: skip
            y[:, start : start + count] = rows @ scratch
        if self.bias is not None:
            y += self.bias
        return y

    def _bias(self, y: torch.Tensor) -> torch.Tensor:
        """The bias; where there is none, any pointer."""
        return y if self.bias is None else self.bias

    def extra_repr(self) -> str:
        """As nn.Linear prints its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.label}, "
            f"bias={self.bias is not None}"
        )


def group_order(g_idx: torch.Tensor, size: int) -> torch.Tensor | None:
    """The order of inputs (position → input) that brings groups of `size` side by side; None: they are.

    Raises Unsuitable where the groups are of other sizes.
    """
    numbers = torch.arange(g_idx.numel(), device=g_idx.device) // size
    if bool((g_idx == numbers).all()):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not bool((g_idx[order] == numbers).all()):
        raise Unsuitable(f"its groups are not of {size} inputs")
    return order
