"""Whatever a GPTQ file may hold, the installed kernel multiplies by the weight that it represents."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowmem.checkpoint.formats import LAYOUTS, LinearFormat, QuantizationFormat, layout_for
from lowmem.checkpoint.packed_values import examine
from lowmem.checkpoint.packing import pack_rows, stored_shapes
from lowmem.kernels import dispatch
from lowmem.kernels.native import header
from lowmem.kernels.quant_linear import QuantLinear
from tests.kernels.test_native_linear import error, needs_native


@dataclass(frozen=True)
class Stored:
    """A linear as some tool may store it."""

    stored: tuple[int, str]
    """The width and the layout."""
    inputs: int
    outputs: int
    group_size: int
    sym: bool
    order: str
    """"static": groups in order; else every input in any group, but each group of its size."""
    scales: torch.dtype
    bias: bool
    seed: int

    @property
    def bits(self) -> int:
        return self.stored[0]

    @property
    def layout(self) -> str:
        return self.stored[1]

    def make(self) -> tuple[nn.Module, torch.Tensor]:
        """The linear, and its weight [out, in] by the format's own definition."""
        g = torch.Generator().manual_seed(self.seed)
        shapes = stored_shapes(self.inputs, self.outputs, self.bits, self.group_size)
        most = (1 << self.bits) - 1
        q = torch.randint(0, most + 1, (self.inputs, self.outputs), generator=g)
        # v1 stores zero-points of 1 to 2^bits - 1 alone: see packing.py
        zeros = torch.randint(int(self.layout == "gptq"), most + 1, shapes.scales, generator=g)
        zeros = torch.full_like(zeros, 1 << (self.bits - 1)) if self.sym else zeros
        scales = (torch.rand(shapes.scales, generator=g) + 0.1).to(self.scales) / most
        size = self.inputs if self.group_size == -1 else self.group_size
        g_idx = torch.arange(self.inputs) // size
        if self.order == "blocks":
            g_idx = g_idx.view(-1, 32)[torch.randperm(self.inputs // 32, generator=g)].flatten()
        elif self.order == "scattered":
            g_idx = g_idx[torch.randperm(self.inputs, generator=g)]
        elif self.order == "reversed":
            g_idx = g_idx.flip(0)
        format = LinearFormat(self.bits, self.group_size, self.sym, self.order != "static", self.layout)
        linear = QuantLinear(self.inputs, self.outputs, format, bias=self.bias)
        linear.qweight = pack_rows(q, self.bits, self.layout)
        less = zeros - int(self.layout == "gptq")
        linear.qzeros = pack_rows(less.T, self.bits, self.layout).T.contiguous()
        linear.scales, linear.g_idx = scales, g_idx.int()
        if self.bias:
            linear.bias = torch.randn(self.outputs, generator=g)
        weight = (q - zeros[g_idx]).double() * scales.double()[g_idx]
        return nn.ModuleDict({"linear": linear}), weight.T


files = st.builds(
    Stored,
    stored=st.sampled_from([(bits, name) for name, found in LAYOUTS.items() for bits in found.bits]),
    inputs=st.integers(1, 9).map(lambda n: 32 * n),
    outputs=st.integers(1, 5).map(lambda n: 32 * n),
    group_size=st.sampled_from((-1, 16, 32, 48, 64, 128)),
    sym=st.booleans(),
    order=st.sampled_from(("static", "blocks", "scattered", "reversed")),
    scales=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(files, st.integers(1, 3))
def test_the_product_is_that_of_the_stored_weight(stored: Stored, rows: int) -> None:
    """In float32, with the kernels that a load would choose; dequantized it is the weight itself."""
    model, weight = stored.make()
    linear = model["linear"]  # type: ignore[index]
    assert not examine("linear", linear, QuantizationFormat(linear.format)).faults
    bias = 0 if linear.bias is None else linear.bias.double()
    assert torch.allclose(linear.dequantize().double(), weight, rtol=1e-6, atol=1e-9)
    x = torch.randn(rows, stored.inputs, generator=torch.Generator().manual_seed(stored.seed))
    dispatch.install(model, torch.device("cpu"), torch.float32)
    assert error(model["linear"](x).double(), x.double() @ weight.T + bias) < 2e-5  # type: ignore[index]


@needs_native
@pytest.mark.parametrize("bits", header.WIDTHS)
def test_our_kernels_take_every_order_of_whole_groups(bits: int) -> None:
    """No order falls back to the reference."""
    for order in ("static", "blocks", "scattered", "reversed"):
        stored = Stored((bits, layout_for((bits,))), 256, 64, 64, False, order, torch.float16, True, 1)
        model, _ = stored.make()
        assert "lowmem" in dispatch.install(model, torch.device("cpu"), torch.float32)
