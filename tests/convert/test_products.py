"""Matrix products of the conversion: every instruction set agrees with torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.convert.math import products
from lowmem.convert.math.products import add_product

from lowmem.kernels.native import library as native
from tests.kernels.native_oracle import ISAS, using

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(products.name(CPU) == "torch", reason="the library is not compiled")


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    """The kernels of every instruction set in turn, by their name."""
    if not native.available():
        yield "torch"
        return
    with using(request.param) as can:
        if not can:
            pytest.skip(f"this CPU has no {request.param}")
        yield products.name(CPU)


def matrix(rows: int, columns: int, seed: int, *, turned: bool, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns], a part of a larger matrix; turned: stored transposed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if turned else (rows, columns)
    whole = torch.randn(shape[0] + 2, shape[1] + 3, generator=generator)
    part = whole.to(dtype)[1:-1, 2:-1]
    return part.T if turned else part


def rounds(isa: str) -> bool:
    return isa == "AVX-512 BF16"


SHAPES = [(1, 1, 1), (13, 33, 3), (12, 32, 1024), (200, 129, 1031), (97, 4200, 37), (400, 70, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_the_product_is_added_for_any_layout_of_the_factors(isa, shape, dtype, rounded, turned):
    m, n, k = shape
    a = matrix(m, k, 1, turned=turned, dtype=dtype)
    b = matrix(k, n, 2, turned=not turned, dtype=torch.float32)
    whole = matrix(m + 1, n + 1, 3, turned=False, dtype=torch.float32)
    into = whole[:m, :n]
    before = whole.double()
    left, right = a.double(), b.double()
    if rounded and rounds(isa):
        left, right = a.bfloat16().double(), b.bfloat16().double()
    expected = before.clone()
    expected[:m, :n] += -0.5 * left @ right
    found = add_product(into, a, b, alpha=-0.5, rounded=rounded)
    assert found is into
    # Memory beside the result is untouched; the sums are exact up to float32.
    torch.testing.assert_close(whole.double(), expected, atol=1e-6 * k**0.5 + 2e-6, rtol=2e-6 * k**0.5)


@pytest.mark.parametrize("n", [1, 40, 300, 4200])
def test_only_the_upper_triangle_is_touched(isa, n):
    x = matrix(5, n, 1, turned=False, dtype=torch.bfloat16)
    into = matrix(n, n, 2, turned=False, dtype=torch.float32)
    before = into.double()
    add_product(into, x.T, x, rounded=True, upper=True)
    expected = before + (x.double().T @ x.double()).triu()
    torch.testing.assert_close(into.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(into.tril(-1).double(), before.tril(-1))


@needs_library
def test_the_number_of_threads_changes_no_bit(isa):
    a = matrix(700, 1100, 1, turned=True, dtype=torch.float32)
    b = matrix(1100, 260, 2, turned=False, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(
                [add_product(torch.zeros(700, 260), a, b, rounded=rounded) for rounded in (False, True)]
            )
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_products_of_bfloat16_are_exact(isa):
    """A Hessian of bfloat16 activations is as exact as one in float32."""
    x = matrix(512, 96, 4, turned=False, dtype=torch.bfloat16)
    exact = x.double().T @ x.double()
    size = x.double().norm(dim=0)
    error = (add_product(torch.zeros(96, 96), x.T, x, rounded=True).double() - exact).abs()
    assert float((error / size[:, None] / size).max()) < 512 * 2.0**-24


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(0, 10_000))
def test_permuting_is_indexing(n, seed):
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(n, n, generator=generator)
    order = torch.randperm(n, generator=generator)
    if seed % 3 == 0:  # many short cycles
        order = torch.arange(n)
        order[: n // 2 * 2] = order[: n // 2 * 2].view(-1, 2).flip(1).reshape(-1)
    expected = square[order][:, order]
    threads = torch.get_num_threads()
    torch.set_num_threads(1 + seed % 3)
    try:
        products.permute(square, order)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(square, expected)


def test_an_invalid_permutation_is_refused():
    if products.name(CPU) != "torch":
        with pytest.raises(ValueError, match="permutation"):
            products.permute(torch.zeros(3, 3), torch.tensor([0, 0, 2]))


@pytest.mark.parametrize("n", [1, 63, 130, 1100])
def test_mirroring_fills_the_lower_triangle(n):
    square = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    upper = square.triu()
    products.mirror(square, 0.5)
    torch.testing.assert_close(square, 0.5 * (upper + upper.triu(1).T))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises((ValueError, RuntimeError)):
        add_product(torch.zeros(3, 3), torch.zeros(3, 2), torch.zeros(4, 3))


def test_float64_is_never_rounded():
    a, b = torch.rand(5, 7, dtype=torch.float64), torch.rand(7, 4, dtype=torch.float64)
    found = add_product(torch.zeros(5, 4, dtype=torch.float64), a, b, rounded=True)
    torch.testing.assert_close(found, a @ b, atol=1e-14, rtol=1e-14)
