"""Training the integers of a quantized linear by the gradient of a loss.

Each weight has a hidden value, measured in steps of its group's grid: the integer (less the zero-point) plus
a fraction. The forward pass sees the integer; the gradient passes through the rounding to the hidden value
(Bengio et al. 2013, arXiv:1308.3432), and where that crosses the middle between two integers, the integer
changes. Hidden values begin at the unquantized weights, inside the cells of GPTQ's integers. Training the
rounding of a layer to its own output is due to AdaRound (Nagel et al. 2020, arXiv:2004.10568) and SignRound
(Cheng et al. 2023, arXiv:2309.05516).

The gradient is divided by its usual size, which is known by its rows and columns alone as in Adafactor
(Shazeer and Stern 2018, arXiv:1804.04235). So training holds two bytes a weight, the fraction in units of
2^-16, and moves the integers as soon as the gradient is known. On a CPU our C library does that
(csrc/gemm/train.c) in two passes; the torch code here does the same on GPUs, without waiting for the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lowmem.convert.math import products
from torch.autograd.function import once_differentiable

from lowmem.kernels.native import header
from lowmem.kernels.native import library as native

KEEP = 0.97
"""Share of the gradient's mean squares that stays from one step to the next."""
MOST = 2.0
"""The largest step, as a multiple of the usual one."""
START = 125
"""The largest distance of a hidden value from its integer at the start, in 256ths: below the middle."""
SLICE_VALUES = 1 << 20
"""Weights that torch works on at a time."""
_FINE = 1 << 16
"""Units of a fraction in a step of the grid."""


def start_of(error: torch.Tensor, scales: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The fractions at which training starts: int8 [in, out], in 256ths of a step.

    error: W - Q [in, out], rows in `order`. scales: [groups, out] in the checkpoint's order.
    """
    n, out = error.shape
    width = n // scales.shape[0]
    order = torch.arange(n, device=error.device) if order is None else order
    found = torch.empty(n, out, dtype=torch.int8, device=error.device)
    rows = max(1, SLICE_VALUES // out)
    for begin in range(0, n, rows):
        at = order[begin : begin + rows]
        fraction = error[begin : begin + rows].float() / scales[at // width].float()
        found[at] = fraction.mul_(256).round_().clamp_(-START, START).to(torch.int8)
    return found


class Scratch:
    """Memory that is used again and again: fresh pages cost as much time as what is written to them."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def of(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of the shape and device of `like`, whose values are unspecified."""
        memory = self._memory
        if memory is None or memory.numel() < like.numel() or memory.dtype != dtype:
            self._memory = memory = None  # free it first
            self._memory = memory = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return memory[: like.numel()].view(like.shape)

    def free(self) -> None:
        """Give the memory back."""
        self._memory = None


@dataclass
class TrainedWeight:
    """The weight of a quantized linear while it is tuned: z * scale."""

    z: torch.Tensor
    """Integers minus zero-points [in, out], int8 where they fit."""
    zeros: torch.Tensor
    """uint8 [groups, out]."""
    maxq: int
    """The largest stored integer."""
    fraction: torch.Tensor | None = None
    """int16 [in, out], hidden values less `z`; None if the integers stay."""
    rate: float = 0.0
    """The usual change of a hidden value in the next step; 0 changes nothing."""
    slopes: Scratch = field(default_factory=Scratch)
    """For the gradient of the weight, which weights may share."""
    rows: torch.Tensor = field(init=False)
    """float32 [in], mean squares of the gradient for z."""
    columns: torch.Tensor = field(init=False)
    """The same by output, float32 [out]."""
    _values: Scratch = field(default_factory=Scratch)
    _begun: bool = False

    def __post_init__(self) -> None:
        n, out = self.z.shape
        self.rows = torch.zeros(n, device=self.z.device)
        self.columns = torch.zeros(out, device=self.z.device)

    @classmethod
    def of(
        cls, codes: torch.Tensor, zeros: torch.Tensor, maxq: int, start: torch.Tensor | None
    ) -> TrainedWeight:
        """The weight of stored integers, uint8 [in, out]; start: see `start_of`, None if they stay."""
        width = codes.shape[0] // zeros.shape[0]
        z = codes.to(torch.int16)
        z -= zeros.to(torch.int16).repeat_interleave(width, 0)
        if int(z.min()) >= -128 and int(z.max()) <= 127:
            z = z.to(torch.int8)
        fraction = None if start is None else start.to(torch.int16) * (_FINE // 256)
        return cls(z, zeros, maxq, fraction)

    def values(self, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """W^T [in, out] with scales [groups, out]; the next call writes into the same memory."""
        found = self._values.of(self.z, dtype)
        by_group = found.view(scale.shape[0], -1, scale.shape[1])
        by_group.copy_(self.z.view(by_group.shape))  # then one type: mixed products are half as fast
        by_group.mul_(scale[:, None].to(dtype))
        return found

    def free(self) -> None:
        """Give back the memory that only steps need."""
        self._values.free()
        self.slopes.free()

    def codes(self) -> torch.Tensor:
        """The integers as they are stored, uint8 [in, out]."""
        width = self.z.shape[0] // self.zeros.shape[0]
        return (self.z.to(torch.int16) + self.zeros.to(torch.int16).repeat_interleave(width, 0)).to(
            torch.uint8
        )

    def learn(self, slope: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Move the integers against the gradient `slope` of the weight [in, out].

        Returns the gradient of the scales [groups, out], as it was before.
        """
        if self.fraction is None or self.rate == 0:
            found = torch.empty_like(scale)
            for part, groups in self._slices(scale):
                product = (slope[part] * self.z[part]).view(groups.stop - groups.start, -1, scale.shape[1])
                found[groups] = product.sum(1, dtype=torch.float32)
            return found
        keep, self._begun = KEEP * self._begun, True
        if products.ours(slope, scale) and self.z.dtype == torch.int8 and slope.shape[1] % 16 == 0:
            return self._learn_natively(slope.contiguous(), scale.contiguous(), keep)
        return self._learn(slope, scale, keep)

    def _slices(self, scale: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """Rows and the groups that they are."""
        groups, out = scale.shape
        width = self.z.shape[0] // groups
        step = max(1, SLICE_VALUES // (width * out))
        for begin in range(0, groups, step):
            end = min(begin + step, groups)
            yield slice(begin * width, end * width), slice(begin, end)

    def _learn(self, slope: torch.Tensor, scale: torch.Tensor, keep: float) -> torch.Tensor:
        assert self.fraction is not None
        found, columns = torch.empty_like(scale), torch.zeros_like(self.columns)
        for part, groups in self._slices(scale):
            by_group = slope[part].float().view(groups.stop - groups.start, -1, scale.shape[1])
            found[groups] = (by_group * self.z[part].view(by_group.shape)).sum(1)
            squares = (by_group * scale[groups, None]).square_().view(-1, scale.shape[1])
            self.rows[part] = keep * self.rows[part] + (1 - keep) * squares.mean(1)
            columns += squares.sum(0)
        self.columns.mul_(keep).add_(columns, alpha=(1 - keep) / slope.shape[0])
        by_row, by_column = _over_root(self.rows) * self.rows.mean().sqrt(), _over_root(self.columns)
        for part, groups in self._slices(scale):
            step = slope[part].float().view(groups.stop - groups.start, -1, scale.shape[1])
            step = (step * scale[groups, None]).view(-1, scale.shape[1])
            step *= by_row[part, None]
            step *= by_column
            step.clamp_(-MOST, MOST).mul_(-_FINE * self.rate).round_()
            hidden = (self.z[part].to(torch.int32) << 16) + self.fraction[part] + step.to(torch.int32)
            zeros = self.zeros[groups].to(torch.int32)
            hidden = hidden.view(zeros.shape[0], -1, scale.shape[1])
            low, high = (-zeros << 16) - _FINE // 2, ((self.maxq - zeros) << 16) + _FINE // 2 - 1
            hidden = torch.clamp(hidden, low[:, None], high[:, None]).view(step.shape)
            z = (hidden + _FINE // 2) >> 16
            self.z[part], self.fraction[part] = z.to(self.z.dtype), (hidden - (z << 16)).to(torch.int16)
        return found

    def _learn_natively(self, slope: torch.Tensor, scale: torch.Tensor, keep: float) -> torch.Tensor:
        assert self.fraction is not None
        n, out = self.z.shape
        found, zeros = torch.empty_like(scale), self.zeros.contiguous()
        kind = header.BF16 if slope.dtype == torch.bfloat16 else header.F32
        arguments = header.LmTrain(
            n, n // scale.shape[0], out, slope.data_ptr(), self.z.data_ptr(), self.fraction.data_ptr(),
            scale.data_ptr(), zeros.data_ptr(), found.data_ptr(), self.rows.data_ptr(),
            self.columns.data_ptr(), keep, self.rate, MOST, self.maxq, kind,
        )  # fmt: skip
        with native.running() as library:
            job = ctypes.addressof(arguments)
            library.lm_train_run(job, native.workspace(library.lm_train_workspace(job)))
        return found


def _over_root(squares: torch.Tensor) -> torch.Tensor:
    return torch.where(squares > 0, squares.rsqrt(), 0.0)


class Product(torch.autograd.Function):
    """x @ W^T for a TrainedWeight, without a float32 gradient for every weight: backward moves it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, weight: TrainedWeight) -> torch.Tensor:
        """Multiply x [..., in] with the weight of the scales, float32 [groups, out]."""
        values = weight.values(scale.detach(), x.dtype)
        ctx.save_for_backward(x, scale, values)
        ctx.weight = weight
        return x @ values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        """The gradients of x and of the scales; the integers take their own step."""
        x, scale, values = ctx.saved_tensors
        back = grad @ values.T if ctx.needs_input_grad[0] else None
        slope = ctx.weight.slopes.of(values, values.dtype)
        torch.mm(_rows(x).T, _rows(grad).to(values.dtype), out=slope)
        return back, ctx.weight.learn(slope, scale.detach()), None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
