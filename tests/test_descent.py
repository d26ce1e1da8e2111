"""Coordinate descent after GPTQ: it never raises the error, and knows what it took off."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from convert.gptq import prepare, quantize
from convert.hessian import Factor, factor_in_place
from lowmem.config import QuantConfig
from tests.test_gptq import correlated, dequantized, hessian_of, loss, weight_of


def damped(hessian: torch.Tensor, percent: float) -> torch.Tensor:
    return hessian + percent * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


CONFIGS = [
    QuantConfig(bits=bits, group_size=group, sym=sym, desc_act=act)
    for bits, group, sym, act in itertools.product((4, 2), (32, 128, -1), (True, False), (True, False))
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_pass_leaves_less_error_and_reports_it_exactly(config):
    n, out = 256, 24
    hessian, weight_t = hessian_of(correlated(700, n)), weight_of(n, out)
    with_damping = damped(hessian, config.damp_percent)
    before = float("inf")
    for passes in (0, 1, 2, 5):
        chosen = dataclasses.replace(config, passes=passes)
        result = quantize(weight_t.clone(), prepare(hessian.clone(), chosen), chosen)
        left = loss(weight_t, dequantized(result, n), with_damping)
        assert result.squared_error == pytest.approx(left, rel=1e-6)
        assert left < before
        assert int(result.codes.max()) <= config.maxq
        before = left


def test_no_single_integer_could_do_better_after_enough_passes():
    """A fixed point: with scales that stay (one wide group), every integer is the best given the others."""
    n, out = 640, 6
    config = QuantConfig(bits=3, group_size=-1, passes=60, desc_act=False)
    hessian, weight_t = hessian_of(correlated(1500, n)), weight_of(n, out)
    result = quantize(weight_t.clone(), prepare(hessian.clone(), config), config)
    h = damped(hessian, config.damp_percent)
    q = dequantized(result, n)
    pull = h @ (weight_t - q)
    step = result.scales.double()[0]
    codes = result.codes.double()
    for sign in (-1, 1):
        allowed = (codes + sign >= 0) & (codes + sign <= config.maxq)
        move = sign * step
        change = -2 * move * pull + move**2 * h.diagonal()[:, None]
        assert bool((change[allowed] > -1e-9).all())


def test_scales_are_refitted_to_the_integers():
    """What is left has no slope along a group's scale that float16 could still follow."""
    n, out = 128, 8
    config = QuantConfig(bits=4, group_size=32, passes=30, desc_act=False)
    hessian, weight_t = hessian_of(correlated(400, n)), weight_of(n, out)
    result = quantize(weight_t.clone(), prepare(hessian.clone(), config), config)
    h = damped(hessian, config.damp_percent)
    q = dequantized(result, n)
    z = (result.codes.double() - 8).view(4, 32, out)
    for group in range(4):
        for direction in (-1, 1):
            other = result.scales.clone()
            other[group] = torch.nextafter(other[group], other[group] + direction)
            changed = q.clone()
            changed[group * 32 : group * 32 + 32] = z[group] * other[group].double()
            error, now = weight_t - changed, weight_t - q
            assert bool(((error * (h @ error)).sum(0) > (now * (h @ now)).sum(0)).all())


def test_the_factor_still_knows_the_hessian():
    n = 1100  # more than one column block
    hessian = damped(hessian_of(correlated(1300, n)), 0.0)
    factor = factor_in_place(hessian.clone(), 0.01)
    whole = damped(hessian, 0.01)
    right = weight_of(n, 5)
    torch.testing.assert_close(factor.hessian_corner(1000, 1100), whole[1000:1100, 1000:1100])
    torch.testing.assert_close(factor.hessian_rows_times(300, 1050, right), whole[300:1050] @ right)
    solved = right.clone()
    factor.solve_in_place(solved)
    torch.testing.assert_close(whole @ solved, right)
    assert isinstance(factor, Factor)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_move_is_the_regression_of_what_is_lacking(act_order):
    """min over V of ||V x - (W x + d)||^2 by the normal equations, whatever the order of columns."""
    n, out = 64, 5
    x, d = correlated(500, n), torch.randn(500, out, dtype=torch.float64)
    config = QuantConfig(bits=4, group_size=32, desc_act=act_order, damp_percent=1e-14)
    lacking = x.T @ d / 500
    prepare(hessian_of(x), config).regress_in_place(lacking)
    torch.testing.assert_close(lacking, torch.linalg.lstsq(x, d).solution, rtol=1e-5, atol=1e-6)
