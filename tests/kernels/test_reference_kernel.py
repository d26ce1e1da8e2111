"""The reference kernel against the formula in float64 and against numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowmem.checkpoint import dequantize as stored_weights
from lowmem.checkpoint.dequantize import PackedWeight, dequantize
from lowmem.checkpoint.formats import LAYOUTS, LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.config import BITS
from lowmem.kernels import reference
from tests.rtn_helpers import rtn

CASES = [(bits, layout) for layout, found in LAYOUTS.items() for bits in found.bits]


def packed(
    bits: int, n_in: int = 96, n_out: int = 64, act_order: bool = False, layout: str = ""
) -> tuple[PackedWeight, torch.Tensor]:
    """A packed weight, and the same in float64 [out, in]."""
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(bits))
    r = rtn(weight, bits, 32, act_order_seed=1 if act_order else None)
    rows = r.g_idx.long()
    exact = (r.q.double() - r.zeros.double()[rows]) * r.scales.double()[rows]
    format = LinearFormat(bits, 32, False, act_order, layout)
    words, zeros = pack_rows(r.q, bits, format.layout), pack_zeros(r.zeros, bits, format.layout)
    return PackedWeight(format, words, zeros, r.scales, r.g_idx), exact.T


@pytest.mark.parametrize("slice_values", [1, 96 * 40, 1 << 22], ids=["32-columns", "ragged", "whole"])
@pytest.mark.parametrize("act_order", [False, True], ids=["groups", "act-order"])
@pytest.mark.parametrize(("bits", "layout"), CASES)
def test_dequantize_is_the_formula(
    bits: int, layout: str, act_order: bool, slice_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights, "SLICE_WEIGHTS", slice_values)
    stored, exact = packed(bits, act_order=act_order, layout=layout)
    # An integer below 256 times a float16 scale has at most 8 + 11 bits: float32 holds it exactly.
    assert torch.equal(dequantize(stored).double(), exact)


def test_by_hand() -> None:
    """Two groups, one output of interest: (q - zero) * scale."""
    q = torch.zeros(16, 8, dtype=torch.uint8)
    q[0, 0], q[8, 0] = 9, 3
    zeros = torch.ones(2, 8, dtype=torch.int32)
    zeros[0, 0], zeros[1, 0] = 8, 5
    scales = torch.ones(2, 8).half()
    scales[0, 0], scales[1, 0] = 0.5, 0.25
    g_idx = torch.arange(16, dtype=torch.int32) // 8
    packed = PackedWeight(LinearFormat(4, 8), pack_rows(q, 4), pack_zeros(zeros, 4), scales, g_idx)
    weight = dequantize(packed)
    assert weight.shape == (8, 16)
    assert weight[0, 0] == (9 - 8) * 0.5
    assert weight[0, 8] == (3 - 5) * 0.25
    assert weight[0, 1] == -8 * 0.5
    assert weight[1, 0] == -1


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
    ids=["float64", "float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("bits", BITS)
def test_linear_against_float64(
    bits: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights, "SLICE_WEIGHTS", 96 * 40)
    stored, exact = packed(bits)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 5, 96, generator=generator, dtype=torch.float64)
    bias = torch.randn(64, generator=generator, dtype=torch.float64)
    result = reference.linear(x.to(dtype), replace(stored, bias=bias.to(dtype)))
    assert result.dtype is dtype and result.shape == (2, 5, 64)
    expected = x @ exact.T + bias
    assert (result.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_rounding_to_nearest_is_within_a_step() -> None:
    """The dequantized weight is near the weight that was quantized, transposed nowhere."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(8))
    stored, _ = packed(8)
    r = rtn(weight, 8, 32)
    step = r.scales.float()[r.g_idx.long()].T
    assert bool(((dequantize(stored) - weight).abs() <= step).all())
