"""Our kernels for cards, in Triton's interpreter, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.checkpoint.dequantize import PackedWeight, dequantize
from lowmem.checkpoint.formats import LAYOUTS, LinearFormat
from lowmem.checkpoint.packing import pack_zeros
from lowmem.kernels.contract import LinearSpec, Unsuitable
from lowmem.kernels.trial import sample_linear

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter needs TRITON_INTERPRET=1", allow_module_level=True)

from lowmem.kernels.triton.choice import FEW_ROWS, Choice, DecodeShape, PrefillShape, usual
from lowmem.kernels.triton.linear import TritonLinear

CPU = torch.device("cpu")
FORMATS = [(layout.name, bits) for layout in LAYOUTS.values() for bits in layout.bits]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = Choice(DecodeShape(64, 2), PrefillShape(16, 32, 64), PrefillShape(32, 64, 64), 40)
"""Launches of several programs and steps for the small linears here; 40 rows and more are dense."""


def error(linear: PackedWeight, x: torch.Tensor, choice: Choice = SMALL) -> float:
    """The kernel's distance from float64, in the norm of the result."""
    right = x.double() @ dequantize(linear, torch.float64).T
    if linear.bias is not None:
        right += linear.bias.double()
    got = TritonLinear(linear, choice)(x)
    assert got.dtype is x.dtype and got.shape == right.shape
    return float((got.double() - right).norm() / right.norm())


@st.composite
def linears(draw: st.DrawFn) -> tuple[LinearSpec, int]:
    """(a linear of any format that files have, a seed)."""
    layout, bits = draw(st.sampled_from(FORMATS))
    unit = LinearFormat(bits, 32, layout=layout).unit
    inputs = unit * draw(st.integers(1, 200 // unit))
    outputs = unit * draw(st.integers(1, 160 // unit))
    size = draw(st.sampled_from([-1, 16, 24, 32, 64, 128, inputs]))
    sym, desc_act = draw(st.booleans()), draw(st.booleans())
    format = LinearFormat(bits, size, sym, desc_act, layout)
    return LinearSpec(inputs, outputs, draw(st.booleans()), format), draw(st.integers(0, 99))


@settings(max_examples=30, deadline=None)
@given(
    linears(),
    st.sampled_from([1, 2, 3, 4, 5, 17, 40]),
    st.sampled_from(sorted(TOLERANCES, key=str)),
    st.sampled_from([1, 2, 4]),
)
def test_any_linear(made: tuple[LinearSpec, int], rows: int, dtype: torch.dtype, parts: int) -> None:
    """Widths, layouts, groups, odd sizes, rows and dtypes in any combination."""
    spec, seed = made
    linear = sample_linear(spec, CPU, dtype, seed)
    x = (torch.randn(rows, spec.in_features) + 1).to(dtype)
    choice = replace(SMALL, decode=replace(SMALL.decode, parts=parts))
    assert error(linear, x, choice) < TOLERANCES[dtype], spec


@pytest.mark.parametrize(("layout", "bits"), FORMATS)
@pytest.mark.parametrize("rows", [1, 6])
def test_each_format(layout: str, bits: int, rows: int) -> None:
    """Every format in every run, with zero-points and negative scales, decode and prefill."""
    spec = LinearSpec(192, 96, True, LinearFormat(bits, 64, sym=False, layout=layout))
    linear = sample_linear(spec, CPU, torch.bfloat16, bits)
    assert (linear.scales < 0).any() and (linear.scales > 0).any()
    x = (torch.randn(rows, 192) + 1).bfloat16()
    assert error(linear, x) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "parts", "several"), [(torch.float32, 2, 0), (torch.bfloat16, 1, 0), (torch.bfloat16, 2, 32)]
)
def test_a_few_rows_have_the_bits_of_one(dtype: torch.dtype, parts: int, several: int) -> None:
    linear = sample_linear(LinearSpec(160, 96, True, LinearFormat(4, 32, sym=False)), CPU, dtype)
    shape = replace(SMALL.decode, parts=parts, several=several)
    module = TritonLinear(linear, replace(SMALL, decode=shape))
    x = torch.randn(FEW_ROWS, 160).to(dtype)
    whole = module(x)
    assert torch.equal(module(x[:1]), whole[:1])
    assert torch.equal(module(x[1:]), whole[1:])


def test_units_are_added_two_halves_at_a_time() -> None:
    """(unit 0 + unit 2) + (unit 1 + unit 3): one order, whatever a compiler makes of a sum."""
    linear = sample_linear(LinearSpec(128, 32, False, LinearFormat(4, 128)), CPU, torch.float32)
    linear.qweight.fill_(int.from_bytes(b"\x99" * 4, "little", signed=True))  # 9 - 8 = 1
    linear.scales.fill_(1)
    x = torch.zeros(1, 128)
    x[0, ::32] = torch.tensor([2.0**30, 1, -(2.0**30), 1])
    module = TritonLinear(linear, replace(SMALL, decode=DecodeShape(32, 4)))
    assert torch.equal(module(x), torch.full((1, 32), 2.0))


def test_activations_of_every_size() -> None:
    """Integers are read as subnormal floats: no activation of a model may reach the ends of float32."""
    linear = sample_linear(LinearSpec(128, 64, False, LinearFormat(4, 32)), CPU, torch.float32)
    for size in (2.0**-33, 2.0**-14, 1.0, 2.0**16, 2.0**40):
        x = (torch.randn(2, 128) + 1) * size
        assert error(linear, x.bfloat16()) < TOLERANCES[torch.bfloat16], size


def test_zero_points_that_overflow() -> None:
    """A stored 15 is 0, and adds one to the next field of its word, as in GPTQModel (see packing.py)."""
    linear = sample_linear(LinearSpec(64, 64, False, LinearFormat(4, 32, sym=False)), CPU)
    linear.qzeros = pack_zeros(torch.randint(0, 16, (2, 64)), 4, "gptq_v2")
    assert error(linear, torch.randn(3, 64)) < TOLERANCES[torch.float32]
    assert error(linear, torch.randn(9, 64)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(dtype: torch.dtype) -> None:
    linear = sample_linear(LinearSpec(64, 64, False, LinearFormat(8, 32)), CPU)
    linear.scales = linear.scales.to(dtype)
    assert error(linear, torch.randn(3, 64)) < TOLERANCES[torch.float32]


def test_rows_at_odd_addresses() -> None:
    """Four activations are read at once: rows that begin in the middle of 8 bytes are copied first."""
    linear = sample_linear(LinearSpec(64, 32, False, LinearFormat(4, 32)), CPU)
    x = torch.randn(2 * 64 + 1).bfloat16()[1:].view(2, 64)
    assert x.data_ptr() % 8 and error(linear, x) < TOLERANCES[torch.bfloat16]


def test_no_rows() -> None:
    linear = sample_linear(LinearSpec(64, 32, True, LinearFormat(4, 32)), CPU)
    assert TritonLinear(linear, SMALL)(torch.randn(2, 0, 64)).shape == (2, 0, 32)


def test_groups_of_several_sizes_are_refused() -> None:
    linear = sample_linear(LinearSpec(64, 32, True, LinearFormat(4, 32)), CPU)
    linear.g_idx[:8] = 1
    with pytest.raises(Unsuitable, match="groups"):
        TritonLinear(linear, SMALL)


def test_the_usual_choice_has_work_for_the_whole_card() -> None:
    """Eight warps for each multiprocessor, where there are inputs enough."""
    for inputs, outputs in ((6144, 6400), (6144, 6144), (6144, 24576), (24576, 6144), (4096, 1024)):
        for count in (28, 46, 128, 170):
            shape = usual(LinearSpec(inputs, outputs), count).decode
            programs = -(-outputs // shape.block) * shape.parts
            units = inputs // 32 // shape.parts
            assert programs * shape.warps >= 8 * count or units < 2 * 8 * shape.warps or shape.parts == 16
            assert units >= 8 * shape.warps or shape.parts == 1
