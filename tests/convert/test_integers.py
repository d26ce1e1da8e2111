"""Training integers by a gradient: the step against its definition, in torch and in the C library."""

from __future__ import annotations

import pytest
import torch
from lowmem.convert.math.gptq import prepare, quantize
from lowmem.convert.stages.integers import KEEP, MOST, Product, Scratch, TrainedWeight, start_of

from lowmem.config import QuantConfig
from tests.convert.test_gptq import correlated, dequantized, hessian_of, weight_of
from tests.convert.test_products import isa, needs_library  # noqa: F401

SHAPES = [
    (256, 96, 32, 2, True),
    (256, 128, 64, 4, False),
    (512, 64, 512, 3, True),
    (192, 160, 96, 6, False),
    (90, 48, 30, 3, True),
]


def made(n, out, width, bits, sym, seed=0):
    """A weight with any integers and fractions, and scales."""
    generator = torch.Generator().manual_seed(seed)
    maxq = 2**bits - 1
    codes = torch.randint(0, maxq + 1, (n, out), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, maxq + 1, (n // width, out), generator=generator).to(torch.uint8)
    if sym:
        zeros.fill_(2 ** (bits - 1))
    start = torch.randint(-125, 126, (n, out), generator=generator).to(torch.int8)
    scale = torch.rand(n // width, out, generator=generator) + 0.1
    return TrainedWeight.of(codes, zeros, maxq, start), scale


def slopes(n, out, steps, dtype):
    """Gradients whose rows and columns differ in size by orders of magnitude; a row and a column are 0."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = (10 ** (4 * torch.rand(size, generator=generator)) for size in ((n, 1), (1, out)))
    rows[3], columns[:, 5] = 0, 0
    for _ in range(steps):
        yield (torch.randn(n, out, generator=generator) * rows * columns * 1e-9).to(dtype)


class Defined:
    """The same step, in float64 and written as it is defined."""

    def __init__(self, weight, scale):
        width = weight.z.shape[0] // scale.shape[0]
        self.scale = scale.double().repeat_interleave(width, 0)
        zeros = weight.zeros.double().repeat_interleave(width, 0)
        self.low, self.high = -zeros, weight.maxq - zeros
        self.hidden = weight.z.double() + weight.fraction.double() / 65536
        self.squares = None

    def learn(self, slope, rate):
        gradient = slope.double() * self.scale
        new = gradient.square()
        self.squares = new if self.squares is None else KEEP * self.squares + (1 - KEEP) * new
        rows, columns = self.squares.mean(1, keepdim=True), self.squares.mean(0, keepdim=True)
        usual = (rows * columns / rows.mean()).sqrt()
        step = torch.where(usual > 0, gradient / usual, 0.0).clamp(-MOST, MOST)
        moved = torch.maximum(self.hidden - rate * step, self.low - 0.5)
        self.hidden = torch.minimum(moved, self.high + 0.5 - 1 / 65536)


def hidden(weight):
    return weight.z.double() + weight.fraction.double() / 65536


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_what_it_is_defined_to_be(shape, dtype, isa):  # noqa: F811
    """In whichever way it is computed; float16 is torch's."""
    weight, scale = made(*shape)
    defined, steps = Defined(weight, scale), 6
    scaled = {torch.float16: 1e5}.get(dtype, 1.0)  # float16 has no such small numbers
    for number, slope in enumerate(slopes(*shape[:2], steps, torch.float32)):
        slope = (slope * scaled).to(dtype)
        weight.rate = 0.2 * (1 - number / steps)
        weight.learn(slope, scale)
        defined.learn(slope, weight.rate)
        assert float((hidden(weight) - defined.hidden).abs().max()) <= (number + 1) * 4 / 65536
    codes = weight.codes()
    assert int(codes.max()) <= weight.maxq  # and none was wrapped below 0
    clear = (defined.hidden - defined.hidden.floor() - 0.5).abs() > 0.001  # not in the middle of two integers
    assert torch.equal(weight.z[clear], defined.hidden.round().to(torch.int8)[clear])


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    from lowmem.kernels.native import library

    found = []
    for count in (1, threads):
        weight, scale = made(512, 96, 32, 3, False)
        weight.rate = 0.1
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            grads = [weight.learn(slope, scale) for slope in slopes(512, 96, 3, torch.bfloat16)]
        finally:
            torch.set_num_threads(before)
        found.append([weight.z, weight.fraction, weight.rows, weight.columns, *grads])
    assert library.available()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("fixed", [False, True])
def test_the_gradient_is_that_of_the_plain_product(fixed):
    weight, scale = made(64, 16, 16, 4, False)
    weight.rate = 0.1
    if fixed:
        weight.fraction = None
    generator = torch.Generator().manual_seed(0)
    scale.requires_grad_()
    x = torch.randn(3, 5, 64, generator=generator).requires_grad_()
    plain, before = weight.z.float() * scale.repeat_interleave(16, 0), weight.z.clone()
    other = torch.randn(3, 5, 16, generator=generator)
    expected = torch.autograd.grad((x @ plain).mul(other).sum(), (x, scale))
    found = torch.autograd.grad(Product.apply(x, scale, weight).mul(other).sum(), (x, scale))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(weight.z, before) == fixed


def test_weights_that_share_memory_learn_what_they_learn_alone():
    """A chain of linears of different sizes; each value and each gradient is in memory used before."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))

    def learned(shared):
        pairs = [
            made(32, 64, 32, 4, True),
            made(64, 16, 16, 4, False, seed=1),
            made(16, 48, 16, 3, True, seed=2),
        ]
        slopes = Scratch()
        for weight, scale in pairs:
            scale.requires_grad_()
            weight.slopes = slopes if shared else weight.slopes
        found = []
        for _ in range(3):
            y = x
            for weight, scale in pairs:
                weight.rate = 0.2
                y = Product.apply(y, scale, weight)
            found += torch.autograd.grad(y.square().sum(), [scale for _, scale in pairs])
        return found + [weight.z for weight, _ in pairs]

    assert all(torch.equal(one, other) for one, other in zip(learned(True), learned(False), strict=True))


def test_integers_follow_the_gradient_to_the_edge_of_the_grid():
    weight, scale = made(64, 32, 32, 2, False)
    weight.rate = 0.4
    for _ in range(40):
        weight.learn(torch.ones(64, 32), scale)
    assert int(weight.codes().max()) == 0
    for _ in range(80):
        weight.learn(-torch.ones(64, 32), scale)
    assert int(weight.codes().min()) == weight.maxq


@pytest.mark.parametrize("order", [True, False])
def test_training_starts_at_the_unquantized_weights(order):
    n, out = 128, 24
    config = QuantConfig(bits=4, group_size=32, desc_act=order)
    hessian, weight_t = hessian_of(correlated(400, n)).float(), weight_of(n, out).float()
    prepared, error = prepare(hessian, config), weight_t.clone()
    result = quantize(error, prepared, config)
    start = start_of(error, result.scales, prepared.order)
    scales = result.scales.double().repeat_interleave(32, 0)
    wanted = (weight_t.double() - dequantized(result, n).double()) / scales
    inside = wanted.abs() < 0.48
    found = start.double() / 256
    assert 0.5 < float(inside.double().mean()) < 1
    assert float((found - wanted)[inside].abs().max()) < 0.003
    assert float(found.abs().max()) < 0.49
