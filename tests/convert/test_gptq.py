"""GPTQ against a naive float64 oracle, and properties of any correct implementation."""

from __future__ import annotations

import pytest
import torch
from lowmem.convert.math.gptq import column_order, prepare, quantize
from lowmem.convert.math.grid import find_grid, quantize_to
from lowmem.convert.math.hessian import Hessian, factor_in_place
from lowmem.convert.math.products import permute

from lowmem.config import BITS, QuantConfig
from lowmem.errors import CalibrationError


def correlated(tokens: int, n: int, seed: int = 0) -> torch.Tensor:
    """Inputs [tokens, n] with correlated columns of different sizes, like activations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    sizes = torch.rand(n, generator=generator, dtype=torch.float64) * 3 + 0.1
    return torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix * sizes


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / x.shape[0]


def weight_of(n: int, out: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, out, generator=generator, dtype=torch.float64)


def run(weight_t: torch.Tensor, hessian: torch.Tensor, config: QuantConfig, block: int = 32):
    return quantize(weight_t.clone(), prepare(hessian.clone(), config), config, column_block=block)


def dequantized(result, n: int) -> torch.Tensor:
    group = torch.arange(n) // (n // result.scales.shape[0])
    return (result.codes.double() - result.zeros.double()[group]) * result.scales.double()[group]


def loss(weight_t: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor) -> float:
    error = weight_t - q
    return float(torch.trace(error.T @ hessian @ error))


def naive_gptq(weight_t: torch.Tensor, hessian: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    """The published algorithm in its simplest form, [in, out].

    Cholesky, inverse, Cholesky; then column by column, each error is corrected in all later columns. The grid
    of a group is found at its first column.
    """
    n = weight_t.shape[0]
    order = column_order(hessian.diagonal(), config)
    order = torch.arange(n) if order is None else order
    damped = hessian[order][:, order] + torch.eye(n, dtype=torch.float64) * (
        config.damp_percent * hessian.diagonal().mean()
    )
    inverse = torch.linalg.inv(damped)
    upper = torch.linalg.cholesky(inverse, upper=True)
    w = weight_t[order].T.clone()  # [out, in]
    codes = torch.zeros_like(w)
    width = n if config.group_size == -1 else config.group_size
    for j in range(n):
        if j % width == 0:
            pivots = 1 / upper.diagonal()[j : j + width]
            grid = find_grid(w[:, j : j + width].T, pivots.square(), config.bits, config.sym)
        q = quantize_to(w[:, j], grid.scale, grid.zero, config.maxq)
        codes[:, j] = q
        error = (w[:, j] - (q - grid.zero) * grid.scale) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    return codes.T[torch.argsort(order)]


CONFIGS = [
    QuantConfig(bits=bits, group_size=group, sym=sym, desc_act=act, passes=0)
    for bits, group, sym, act in [
        (4, 32, True, False),
        (4, 32, True, True),
        (3, 32, False, True),
        (8, 64, True, True),
        (2, 32, False, False),
        (4, -1, True, True),
        (3, -1, False, False),
    ]
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_same_integers_as_the_published_algorithm(config):
    n, out = 128, 24
    hessian = hessian_of(correlated(512, n))
    weight_t = weight_of(n, out)
    result = run(weight_t, hessian, config)
    expected = naive_gptq(weight_t, hessian, config)
    assert torch.equal(result.codes.double(), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_result_does_not_depend_on_the_column_block(config):
    n = 128
    hessian = hessian_of(correlated(512, n))
    weight_t = weight_of(n, 16)
    results = [run(weight_t, hessian, config, block) for block in (1, 32, 48, 128)]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        assert torch.equal(other.scales, results[0].scales)
        assert torch.equal(other.zeros, results[0].zeros)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_identity_hessian_gives_round_to_nearest(bits, sym):
    n, width = 96, 32
    weight_t = weight_of(n, 20)
    config = QuantConfig(bits=bits, group_size=width, sym=sym, desc_act=False, passes=0)
    result = run(weight_t, torch.eye(n, dtype=torch.float64), config)
    for group in range(n // width):
        part = weight_t[group * width : (group + 1) * width]
        grid = find_grid(part, torch.ones(width, dtype=torch.float64), bits, sym)
        expected = quantize_to(part, grid.scale, grid.zero, config.maxq)
        assert torch.equal(result.codes[group * width : (group + 1) * width].double(), expected)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_correlated_inputs_give_less_error_than_rounding_to_nearest(bits):
    n = 256
    hessian = hessian_of(correlated(1024, n))
    weight_t = weight_of(n, 32)
    config = QuantConfig(bits=bits, group_size=64, passes=0)
    gptq = loss(weight_t, dequantized(run(weight_t, hessian, config), n), hessian)
    nearest = run(weight_t, torch.eye(n, dtype=torch.float64), config)
    assert gptq < 0.7 * loss(weight_t, dequantized(nearest, n), hessian)


def test_reported_error_is_the_error_of_the_outputs():
    n = 128
    x = correlated(700, n)
    weight_t = weight_of(n, 24)
    config = QuantConfig(bits=3, group_size=32, damp_percent=1e-9, passes=0)
    result = run(weight_t, hessian_of(x), config)
    measured = (x @ (weight_t - dequantized(result, n))).square().sum(1).mean()
    assert result.squared_error == pytest.approx(float(measured), rel=1e-3)


def test_arguments_are_transposed_weights_and_groups_stay_static():
    """Act-order must not scatter a group: group g covers columns 32 g .. 32 g + 31 of the checkpoint."""
    n = 128
    weight_t = weight_of(n, 8)
    weight_t[32:64] *= 100
    config = QuantConfig(bits=4, group_size=32, desc_act=True, passes=0)
    result = run(weight_t, hessian_of(correlated(512, n)), config)
    assert (result.scales[1].abs() > 20 * result.scales[0].abs()).all()
    relative = (weight_t - dequantized(result, n)).norm() / weight_t.norm()
    assert relative < 0.2


@pytest.mark.parametrize("n", [7, 1024, 2500])
def test_factor_equals_the_inverse_of_the_published_one(n):
    """R^-1 equals Cholesky, inverse, Cholesky, also across column blocks."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n + 50, n, generator=generator, dtype=torch.float64)
    hessian = x.T @ x / n + torch.eye(n, dtype=torch.float64)
    r = factor_in_place(hessian.clone(), 1e-6).matrix.triu()
    damped = hessian + torch.eye(n, dtype=torch.float64) * 1e-6 * hessian.diagonal().mean()
    assert torch.allclose(r @ r.T, damped, atol=1e-9)
    if n < 2000:
        published = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        assert torch.allclose(torch.linalg.inv(r), published, atol=1e-8)


def test_incremental_hessian_equals_the_batch_one():
    x = correlated(300, 1100).float()
    hessian = Hessian(1100)
    for part in x.split(77):
        hessian.add(part.to(torch.float32))
    matrix = hessian.finish()
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix.double(), hessian_of(x.double()), atol=1e-4, rtol=1e-4)


def test_permute_is_indexing():
    matrix = torch.randn(1500, 1500)
    order = torch.randperm(1500)
    expected = matrix[order][:, order]
    permute(matrix, order)
    assert torch.equal(matrix, expected)


def test_dead_columns_are_rounded_to_nearest_and_counted():
    n = 64
    x = correlated(200, n)
    x[:, [3, 40]] = 0
    weight_t = weight_of(n, 8)
    config = QuantConfig(bits=4, group_size=32, passes=0)
    result = run(weight_t, hessian_of(x), config)
    assert result.dead_columns == 2
    error = (weight_t - dequantized(result, n))[[3, 40]].abs()
    steps = result.scales.double().abs()[[0, 1]]
    clipped = weight_t[[3, 40]].abs() > 7 * steps
    assert ((error <= steps / 2 + 1e-9) | clipped).all()


def test_all_columns_dead_still_quantizes():
    config = QuantConfig(bits=4, group_size=32, passes=0)
    result = run(weight_of(64, 8), torch.zeros(64, 64, dtype=torch.float64), config)
    assert result.dead_columns == 64
    assert torch.isfinite(result.scales).all()


def test_hessian_that_is_not_positive_definite_gets_more_damping():
    """Rank 10 in float32 with little damping: rounding makes it indefinite."""
    n = 1300
    x = torch.randn(10, n)
    hessian = x.T @ x / 10
    hessian[0, 1] += 5
    hessian[1, 0] += 5
    config = QuantConfig(bits=4, group_size=-1, damp_percent=1e-8, desc_act=False, passes=0)
    result = quantize(torch.randn(n, 4), prepare(hessian, config), config)
    assert result.damping > config.damp_percent
    assert torch.isfinite(result.scales).all()


def test_hopeless_hessian_is_refused():
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1e12
    with pytest.raises(CalibrationError, match="positive definite"):
        prepare(hessian, QuantConfig(bits=4, group_size=32, desc_act=False, passes=0))


def test_infinite_activation_is_refused():
    hessian = Hessian(32)
    x = torch.ones(4, 32)
    x[2, 5] = torch.inf
    hessian.add(x)
    with pytest.raises(CalibrationError, match="not finite"):
        hessian.finish()


def test_search_beats_min_max():
    """The chosen grid has less weighted error than the full range, at every width."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(128, 200, generator=generator) ** 3
    importance = torch.rand(128, generator=generator) + 0.01
    for bits in (4, 3, 2):
        maxq, half = 2**bits - 1, 2 ** (bits - 1)
        grid = find_grid(weight, importance, bits, sym=True)
        found = (quantize_to(weight, grid.scale, grid.zero, maxq) - grid.zero) * grid.scale
        scale = weight.abs().amax(0) / (half - 1)
        zero = torch.full_like(scale, half)
        plain = (quantize_to(weight, scale, zero, maxq) - zero) * scale
        searched = (importance[:, None] * (found - weight) ** 2).sum()
        assert searched < 0.8 * (importance[:, None] * (plain - weight) ** 2).sum()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_grid_can_be_stored(bits, sym):
    """Scales are exact in float16 and zero-points in 1..maxq, also for constant, tiny and zero groups."""
    weight = torch.randn(32, 40)
    weight[:, 0] = 0
    weight[:, 1] = 1e-12
    weight[:, 2] = 3.0
    weight[:, 3] = -3.0
    weight[:, 4] = 6e4
    grid = find_grid(weight, torch.ones(32), bits, sym)
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert torch.isfinite(grid.scale).all()
    assert ((grid.zero >= 1) & (grid.zero <= 2**bits - 1) & (grid.zero == grid.zero.round())).all()
    value = (quantize_to(weight, grid.scale, grid.zero, 2**bits - 1) - grid.zero) * grid.scale
    assert torch.equal(value[:, 0], weight[:, 0])
    assert torch.allclose(value[:, 2:5], weight[:, 2:5], rtol=2e-3)
