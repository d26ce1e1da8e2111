"""Rounding inside a column block, in torch and in the C library."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from lowmem.convert.math.gptq import prepare, quantize
from lowmem.convert.math.hessian import factor_in_place
from lowmem.convert.math.rounding import Block, Rule, round_block
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.config import QuantConfig
from tests.convert.test_gptq import correlated, dequantized, hessian_of, loss, weight_of
from tests.convert.test_products import isa, needs_library  # noqa: F401


def damped(hessian: torch.Tensor, percent: float) -> torch.Tensor:
    return hessian + percent * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


CONFIGS = [
    QuantConfig(bits=bits, group_size=group, sym=sym, desc_act=act)
    for bits, group, sym, act in itertools.product((4, 2), (32, 128, -1), (True, False), (True, False))
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_reported_error_is_exact_and_less_than_gptqs(config):
    n, out = 256, 24
    hessian, weight_t = hessian_of(correlated(700, n)), weight_of(n, out)
    with_damping = damped(hessian, config.damp_percent)
    left = {}
    for passes in (0, 1, 3):
        chosen = dataclasses.replace(config, passes=passes)
        result = quantize(weight_t.clone(), prepare(hessian.clone(), chosen), chosen)
        left[passes] = loss(weight_t, dequantized(result, n), with_damping)
        assert result.squared_error == pytest.approx(left[passes], rel=1e-6)
        assert int(result.codes.max()) <= config.maxq
    if config.group_size != -1:
        assert left[1] < 0.98 * left[0]
        assert left[3] < 0.98 * left[0]


def one_group(passes: int, bits: int = 3, width: int = 64, out: int = 16, sym: bool = True):
    """One group that is the whole weight: its rule, R, W^T, and the results of `round_block`."""
    hessian = damped(hessian_of(correlated(300, width)), 0.01)
    r = factor_in_place(hessian.clone(), 1e-9).matrix
    weight = weight_of(width, out)
    rule = Rule(bits, sym, width, passes)
    error, residual = weight.clone(), torch.zeros_like(weight)
    codes = torch.zeros(width, out, dtype=torch.uint8)
    scales, zeros = torch.zeros(1, out, dtype=weight.dtype), torch.zeros(1, out, dtype=weight.dtype)
    round_block(rule, Block(r, error, residual, codes, scales, zeros))
    return rule, r.triu(), weight, error, residual, codes, scales, zeros


@pytest.mark.parametrize("sym", [True, False])
def test_no_pass_makes_an_output_worse(sym):
    left = [one_group(passes, sym=sym)[4].square().sum(0) for passes in (1, 2, 4, 8)]
    for before, after in itertools.pairwise(left):
        assert bool((after <= before + 1e-12).all())
    assert float(left[-1].sum()) < float(left[0].sum())


def test_after_enough_passes_no_single_integer_can_improve():
    rule, r, _, _, residual, codes, scales, _ = one_group(60)
    metric, pull = r @ r.T, r @ residual
    for sign in (-1, 1):
        allowed = (codes.double() + sign >= 0) & (codes.double() + sign <= rule.maxq)
        move = sign * scales
        change = -2 * move * pull + move**2 * metric.diagonal()[:, None]
        assert bool((change[allowed] > -1e-9).all())


def test_the_scale_is_fitted_to_its_integers():
    """Neither neighbouring float16 scale has less error."""
    _, r, weight, _, residual, codes, scales, zeros = one_group(6)
    z = codes.double() - zeros
    for direction in (-1, 1):
        half = scales.half()
        other = torch.nextafter(half, half + direction).double()
        left = (r.T @ (weight - z * other)).square().sum(0)
        assert bool((left >= residual.square().sum(0) - 1e-12).all())


BLOCKS = [
    Rule(bits, sym, width, passes)
    for bits, sym, width, passes in [
        (4, True, 128, 2), (4, True, 128, 0), (3, True, 64, 1), (2, False, 32, 2), (8, False, 128, 1),
        (4, True, 96, 1), (4, False, 256, 1),
    ]
]  # fmt: skip


def native_block(rule: Rule, search: bool = True):
    """A block in float32: its inputs and the results of `round_block`."""
    size = rule.width * max(1, 128 // rule.width)
    out = 150  # no whole number of slabs
    factor = factor_in_place(hessian_of(correlated(600, size)).float(), 0.01).matrix
    weight, asked = weight_of(size, out).float(), 0.3 * weight_of(size, out, seed=9).float()
    error, residual = weight.clone(), asked.clone()
    codes = torch.zeros(size, out, dtype=torch.uint8)
    scales, zeros = torch.zeros(size // rule.width, out), torch.zeros(size // rule.width, out)
    if not search:
        rule = dataclasses.replace(rule, search=False)
        scales, zeros = torch.full((1, out), 0.25), torch.full((1, out), float(2 ** (rule.bits - 1)))
    round_block(rule, Block(factor, error, residual, codes, scales, zeros))
    return rule, factor, weight, asked, error, residual, codes, scales, zeros


@needs_library
@pytest.mark.parametrize("rule", BLOCKS, ids=str)
@pytest.mark.parametrize("search", [True, False])
def test_the_library_agrees_with_torch(isa, rule, search):  # noqa: F811
    rule, factor, weight, asked, error, residual, codes, scales, zeros = native_block(rule, search)
    r, width = factor.triu().double(), len(codes) // len(scales)
    rows = torch.arange(len(codes)) // width
    values = (codes.double() - zeros.double()[rows]) * scales.double()[rows]
    # The reported values are consistent.
    torch.testing.assert_close(error.double(), weight.double() - values, atol=2e-6, rtol=1e-5)
    left = r.T @ (weight.double() - values) + asked.double()
    torch.testing.assert_close(residual.double(), left, atol=2e-4, rtol=1e-3)
    assert torch.equal(scales.half().float(), scales)
    assert int(codes.max()) <= rule.maxq
    assert bool(((zeros >= 1) & (zeros <= rule.maxq) & (zeros == zeros.round())).all())
    # They agree with float64 in torch, except for ties.
    expected_error, expected = weight.double(), asked.double()
    expected_codes = torch.zeros_like(codes)
    other_scales, other_zeros = scales.double(), zeros.double()
    round_block(
        rule, Block(factor.double(), expected_error, expected, expected_codes, other_scales, other_zeros)
    )
    assert float(left.square().sum()) == pytest.approx(float(expected.square().sum()), rel=5e-3)
    if rule.bits < 8:
        assert float((codes == expected_codes).float().mean()) > 0.97


@needs_library
def test_threads_change_no_bit_of_a_block(isa):  # noqa: F811
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(native_block(BLOCKS[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(found[0][4:], found[1][4:], strict=True))


@needs_library
def test_zeros_and_extreme_columns_are_rounded(isa):  # noqa: F811
    """Weights of zeros, of one value, and too large for float16 scales."""
    rule = Rule(4, True, 32, 2)
    r = torch.eye(32)
    error = torch.randn(32, 5)
    error[:, 0], error[:, 1], error[:, 2], error[:, 3] = 0, 3, 1e-12, 1e9
    weight = error.clone()
    codes = torch.zeros(32, 5, dtype=torch.uint8)
    scales, zeros = torch.zeros(1, 5), torch.zeros(1, 5)
    round_block(rule, Block(r, error, torch.zeros(32, 5), codes, scales, zeros))
    values = (codes.float() - zeros) * scales
    assert torch.isfinite(values).all()
    assert torch.equal(values[:, 0], weight[:, 0])
    torch.testing.assert_close(values[:, 1], weight[:, 1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [32, -1])
def test_a_wanted_change_is_regressed_on_the_input(act_order, group):
    """Rounding W with d wanted equals rounding the weight whose output is closest to W x + d."""
    n, out = 96, 40
    generator = torch.Generator().manual_seed(17)
    x, d = correlated(500, n), 0.2 * torch.randn(500, out, dtype=torch.float64, generator=generator)
    config = QuantConfig(bits=4, group_size=group, desc_act=act_order, damp_percent=1e-12)
    weight_t = weight_of(n, out)
    prepared = prepare(hessian_of(x), config)
    found = quantize(weight_t.clone(), prepared, config, wanted=prepared.whiten_in_place(x.T @ d / 500))
    moved = weight_t + torch.linalg.lstsq(x, d).solution
    expected = quantize(moved.clone(), prepared, config)
    if group == -1:  # its grid is that of W itself
        assert found.squared_error < 1.2 * expected.squared_error
        return
    # All codes of an output are equal, except where two grids tie: about one output in forty.
    same = (found.codes == expected.codes).double().mean(0) > 0.99
    assert float(same.double().mean()) > 0.9
    left = (x @ (moved - dequantized(found, n))).square().sum(1).mean()
    assert found.squared_error == pytest.approx(float(left), rel=1e-6)


def test_bfloat16_weights_give_the_result_of_the_same_weights_in_float32():
    n, out = 2176, 40  # more than two far blocks
    hessian = hessian_of(correlated(3000, n)).float()
    weight = weight_of(n, out).bfloat16()
    config = QuantConfig(bits=4, group_size=128)
    prepared = prepare(hessian, config)
    narrow = quantize(weight.clone(), prepared, config)
    wide = quantize(weight.float(), prepared, config)
    assert narrow.squared_error == pytest.approx(wide.squared_error, rel=0.01)
    assert float((narrow.codes == wide.codes).float().mean()) > 0.9


class _HostReads(TorchDispatchMode):
    """Counts operations that wait for the device: values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("passes", [0, 1])
def test_the_column_loop_never_waits_for_the_device(group, sym, passes):
    """The host reads one value per linear, its error, for any number of columns."""
    config = QuantConfig(bits=4, group_size=group, sym=sym, passes=passes)
    for n in (128, 384):
        prepared = prepare(hessian_of(correlated(500, n)), config)
        wanted, weight_t = torch.randn(n, 4, dtype=torch.float64), weight_of(n, 4)
        with _HostReads() as reads:
            quantize(weight_t, prepared, config, wanted=wanted)
        assert reads.count == 1
