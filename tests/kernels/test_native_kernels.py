"""The CPU kernels compute the rule of linear.h to the last bit, and float64 within a derived bound."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.checkpoint.dequantize import PackedWeight
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.kernels import reference
from lowmem.kernels.native import library as native
from lowmem.kernels.native import linear as native_linear
from lowmem.kernels.native.header import PAIRED, WIDTHS
from lowmem.platform import system
from tests.kernels.native_oracle import (
    ISAS,
    LIMITS,
    Weight,
    dense,
    fma32,
    kernel_group,
    multiply,
    random_weight,
    rule,
    same,
    using,
)
from tests.rtn_helpers import rtn

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

KINDS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param) as can:
        if not can:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


def activations(rows: int, inputs: int, kind: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal, with a few far larger inputs, like hidden states."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=rng)
    x[torch.rand(rows, inputs, generator=rng) < 0.01] *= 30
    return x.to(kind)


# ---- the rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("product", "sum_"), [(1 + 2**-12, 2.0**-25), (1 + 2**-12, -(2.0**-60)), (3e38, 1.0)]
)
def test_fma32_rounds_once(product: float, sum_: float) -> None:
    """Ties and their neighbours, where rounding twice goes wrong: against exact fractions."""
    a = np.float32(product)
    for c in (sum_, -sum_, 2.0**-24, -(2.0**-24)):
        exact = Fraction(float(a)) ** 2 + Fraction(c)
        got = fma32(np.array([a]), np.array([a]), np.array([np.float32(c)]))[0]
        if exact > Fraction(float(np.finfo(np.float32).max)):
            assert np.isinf(got)
            continue
        near = (np.nextafter(got, np.float32(-np.inf)), np.nextafter(got, np.float32(np.inf)))
        assert all(abs(exact - Fraction(float(got))) <= abs(exact - Fraction(float(n))) for n in near)


@pytest.mark.parametrize("planes", LIMITS)
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512, -1])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_instruction_set_computes_the_rule(bits: int, group: int, planes: int) -> None:
    """200 outputs end in a half-filled vector; group -1 is 416 inputs, quantized 32 at a time."""
    inputs, seed = {-1: 416}.get(group, 512), bits * 100 + group + planes
    for zeros in (False, True):
        kinds = KINDS[seed % 3 :] + KINDS[: seed % 3]
        weight = random_weight(
            bits, group, inputs, 200, zeros=zeros, bias=kinds[0], scales=kinds[1], seed=seed
        )
        x = activations(37, inputs, kinds[2], seed)
        expected, packed = rule(x, weight, planes), weight.packed()
        for isa in ISAS:
            with using(isa) as can:
                for rows in (1, 2, 7, 32, 37) if can else ():  # decode kernels up to 32, prefill above
                    assert same(multiply(packed, x[:rows], planes), expected[:rows]), (isa, rows, zeros)
        seed += 1


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    planes=st.sampled_from(list(LIMITS)),
    group=st.integers(1, 12),
    groups=st.integers(1, 4),
    outputs=st.integers(1, 150),
    rows=st.integers(1, 40),
    zeros=st.booleans(),
    kinds=st.tuples(*[st.sampled_from(KINDS)] * 3),
    seed=st.integers(0, 1 << 30),
)
def test_any_size(
    bits: int,
    planes: int,
    group: int,
    groups: int,
    outputs: int,
    rows: int,
    zeros: bool,
    kinds: tuple[torch.dtype, torch.dtype, torch.dtype],
    seed: int,
) -> None:
    """Groups of 32 to 384 inputs, any number of outputs, tensors aligned to 4 bytes only."""
    group *= 32
    weight = random_weight(
        bits, group, group * groups, outputs, zeros=zeros, bias=kinds[0], scales=kinds[1], seed=seed
    )
    x = activations(rows, group * groups, kinds[2], seed)
    expected = rule(x, weight, planes)
    words = pack_rows(weight.q, bits)
    moved = torch.empty(words.numel() + 1, dtype=torch.int32)[1:].view(words.shape).copy_(words)
    scales = torch.empty(weight.scales.numel() + 1, dtype=kinds[1])[1:].view(weight.scales.shape)
    packed = native_linear.Packed(moved, scales.copy_(weight.scales), weight.zeros, weight.bias, bits, group)
    for isa in ISAS:
        with using(isa) as can:
            assert not can or same(multiply(packed, x, planes), expected), isa


def test_the_largest_sums_fit(isa: str) -> None:
    """256 inputs of 8 bits times the largest digits, with zero-points at both ends."""
    for zero in (0, 255):
        for q in (0, 255):
            weight = Weight(
                8,
                256,
                torch.full((256, 16), q, dtype=torch.uint8),
                torch.ones(1, 16),
                torch.full((1, 16), zero, dtype=torch.uint8),
            )
            for planes in LIMITS:
                for x in (torch.ones(1, 256), -torch.ones(1, 256), torch.full((20, 256), -0.501)):
                    x[:, 0] = 1  # so that -0.501 is not the largest: digits of all kinds
                    assert same(multiply(weight.packed(), x, planes), rule(x, weight, planes))


def test_low_digits_at_their_least(isa: str) -> None:
    """Two digits of -128 are -32896: with three planes, the lower two do not fit in 16 bits."""
    weight = random_weight(8, 256, 256, 32, zeros=True)
    q = 65536 * 100 - 32896
    x = torch.full((3, 256), q / LIMITS[3])
    x[:, 0] = 1
    digits = torch.from_numpy(np.rint(x.numpy() * np.float32(LIMITS[3]))).long()
    assert (digits[:, 1:] == q).all()
    assert same(multiply(weight.packed(), x, 3), rule(x, weight, 3))


# ---- rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", LIMITS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_does_not_depend_on_the_rows_beside_it(isa: str, bits: int, planes: int) -> None:
    """The same bits alone and among up to 40 rows. Another piece of work begins after 512 rows."""
    packed = random_weight(bits, 64, 128, 72, zeros=bits == 3, bias=torch.float16).packed()
    x = activations(40, 128, torch.bfloat16)
    all_rows = multiply(packed, x, planes)
    for rows in range(1, 40):
        assert same(multiply(packed, x[40 - rows :], planes), all_rows[40 - rows :]), rows
    many = multiply(packed, x.repeat(26, 1)[:1030], planes)
    assert same(many, all_rows.repeat(26, 1)[:1030])


def test_threads_change_nothing() -> None:
    packed = random_weight(4, 128, 512, 1000, bias=torch.float32).packed()
    x = activations(33, 512, torch.float16)
    threads, alone = torch.get_num_threads(), [multiply(packed, x[:rows], 2) for rows in (1, 5, 33)]
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            for rows, expected in zip((1, 5, 33), alone, strict=True):
                assert same(multiply(packed, x[:rows], 2), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_that_is_not_finite_changes_no_other_row(isa: str, kind: torch.dtype) -> None:
    """A row with an infinity or NaN in any group has no finite output, with any instruction set."""
    weight = random_weight(4, 32, 96, 40, bias=torch.float32)
    for rows in (6, 24):
        x = activations(rows, 96, kind)
        expected = rule(x, weight, 2)
        bad = {1: float("inf"), 3: float("nan"), 4: float("-inf"), rows - 1: float("nan")}
        for row, value in bad.items():
            x[row, (row * 37) % 96] = value
        x[rows - 1, 95] = float("inf")
        y = multiply(weight.packed(), x, 2)
        good = [r for r in range(rows) if r not in bad]
        assert same(y[good], expected[good])
        assert not y[list(bad)].isfinite().any()


def test_a_row_of_zeros(isa: str) -> None:
    """The result is the bias, or +0 without one. A group of zeros beside others is correct too."""
    weight = random_weight(3, 64, 128, 24, zeros=True)
    for rows in (3, 20):
        x = activations(rows, 128)
        x[1] = 0
        x[2, :64] = 0
        for planes in LIMITS:
            y = multiply(weight.packed(), x, planes)
            assert same(y, rule(x, weight, planes))
            assert (y[1].view(torch.int32) == 0).all()
    biased = random_weight(3, 64, 128, 24, zeros=True, bias=torch.bfloat16)
    assert biased.bias is not None
    assert same(multiply(biased.packed(), torch.zeros(1, 128), 2)[0], biased.bias.float())


@pytest.mark.parametrize("planes", LIMITS)
def test_numbers_at_the_edges_of_float32(isa: str, planes: int) -> None:
    """The largest of a group is denormal, tiny or huge. A group that cannot be scaled up counts as zeros."""
    weight = random_weight(4, 32, 64, 16, scales=torch.float32)
    size = torch.tensor([1e-45, 1e-40, 1.1e-38, 3e-37, 1e-33, 2e-32, 3e-32, 1e-30, 1e30, 3.4e38])
    x = torch.linspace(-1, 1, 64) * size[:, None]
    assert same(multiply(weight.packed(), x, planes), rule(x, weight, planes))


def test_nothing_past_the_end_is_read() -> None:
    """Every tensor ends at a page without access. In a process of its own, since a read past it crashes."""
    code = "from tests.kernels.native_oracle import run_fenced; run_fenced()"
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert "portable C stayed inside" in done.stdout


# ---- accuracy --------------------------------------------------------------------------------------------


def worst(x: torch.Tensor, weight: Weight, planes: int) -> torch.Tensor:
    """The largest possible error of y in float32, as float64 [rows, out].

    An activation's integer is off by scale / 2, with LM_PAIRED by 8 scales more, and by 2^-23 of the
    activation for two earlier roundings (L / a, and its product with x). The sum of a group's lower planes,
    below 2^31, is rounded to 2^-24 of itself: less than scale / 100 for each input. At most four roundings
    (c, scale, scale * weight_scale, the bias) cost 2^-24 of all |x w| each, and y is rounded once for each
    group.
    """
    size, exact = x.double().abs(), weight.exact().abs()
    width = kernel_group(weight.group)
    parts = size.view(x.shape[0], -1, width)
    scale = (parts.amax(2, keepdim=True) / LIMITS[planes]).expand_as(parts).reshape(size.shape)
    groups = parts.shape[1]
    bias = 0 if weight.bias is None else weight.bias.double().abs()
    total = (size + scale) @ exact + bias
    off = 8.51 if planes == PAIRED and weight.bits <= 4 else 0.51
    return (scale * off + size * 2.0**-23) @ exact + total * (4 + groups) * 2.0**-24 + 1e-40


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_within_the_derived_bound_of_float64(bits: int, kind: torch.dtype) -> None:
    """Outputs in x's dtype with its number of planes: the bound plus half a step of the dtype."""
    half_step = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[kind]
    for inputs, group in ((96, 96), (2048, 128)):
        weight = random_weight(bits, group, inputs, 200, zeros=True, bias=kind)
        x = activations(34, inputs, kind)
        assert weight.bias is not None
        exact = x.double() @ weight.exact() + weight.bias.double()
        packed = weight.packed()
        for planes, rows in itertools.product((3,) if kind is torch.float32 else (2, PAIRED), (2, 34)):
            bound = worst(x, weight, planes)
            y = multiply(packed, x[:rows], planes, kind).double()
            allowed = bound + (exact.abs() + bound) * half_step + (2.0**-25 if kind is torch.float16 else 0)
            assert ((y - exact[:rows]).abs() <= allowed[:rows]).all()
            packed.planes = planes
            assert same(native_linear.linear(packed, x[:rows]), y.to(kind))


@pytest.mark.parametrize(
    ("kind", "planes", "share"),
    [(torch.bfloat16, 2, 0.1), (torch.bfloat16, PAIRED, 0.8), (torch.float16, 2, 0.5), (torch.float32, 3, 2)],
    ids=str,
)
def test_quantizing_activations_costs_less_than_their_dtype(
    kind: torch.dtype, planes: int, share: float
) -> None:
    """Compare the error of quantizing x with that of rounding it; for float32, with torch's product.

    Normal activations in groups of 128; root mean square over 24 rows of 200 outputs.
    """
    weight = random_weight(4, 128, 1024, 200)
    ideal = torch.randn(24, 1024, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = ideal.to(kind)
    exact = x.double() @ weight.exact()
    own = (multiply(weight.packed(), x, planes).double() - exact).square().mean().sqrt()
    if kind is torch.float32:
        given_ = ((x @ weight.exact().float()).double() - exact).square().mean().sqrt()
    else:
        given_ = ((ideal - x.double()) @ weight.exact()).square().mean().sqrt()
    assert own <= share * given_


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_agrees_with_the_reference_on_stored_tensors(bits: int, kind: torch.dtype) -> None:
    """A weight rounded to nearest and packed as on disk. The reference rounds it to x's dtype first."""
    r = rtn(torch.randn(160, 256, generator=torch.Generator().manual_seed(bits)), bits, 64)
    weight = Weight(bits, 64, r.q.to(torch.uint8), r.scales, r.zeros.to(torch.uint8))
    x = activations(20, 256, kind)
    words, zeros = pack_rows(r.q, bits), pack_zeros(r.zeros, bits)
    stored = PackedWeight(LinearFormat(bits, 64), words, zeros, r.scales, r.g_idx)
    expected = reference.linear(x, stored).double()
    got = native_linear.linear(weight.packed(), x).double()
    # Plus the reference's errors: its weight and both outputs are rounded, its sum of 256 is float32.
    half_step = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[kind]
    size = x.double().abs() @ weight.exact().abs()
    allowed = (
        worst(x, weight, native_linear.PLANES[kind])
        + size * (half_step + 2.0**-16)
        + 2 * half_step * expected.abs()
    )
    assert ((got - expected).abs() <= allowed * 1.001).all()
    assert (got - expected).abs().mean() <= expected.abs().mean() * (half_step + 2.0**-18)


# ---- numbers in and out ----------------------------------------------------------------------------------


def patterns(kind: torch.dtype) -> torch.Tensor:
    """All 65536 numbers of a 16-bit dtype, ordered by size."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    order = torch.argsort(numbers.int() & 0x7FFF, stable=True)
    return numbers[order].view(kind)


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_every_16_bit_number_as_activation_scale_and_bias(isa: str, kind: torch.dtype) -> None:
    """Each number has the same result as its float32, including denormals, infinities and NaN."""
    numbers = patterns(kind)
    x, one = numbers.view(-1, 32), random_weight(8, 32, 32, 32, scales=torch.float32)
    assert same(multiply(one.packed(), x, 3), multiply(one.packed(), x.float(), 3))
    q = torch.randint(0, 256, (32, 65536), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    words = pack_rows(q, 8)
    for scales, bias in ((numbers.view(1, -1), None), (torch.zeros(1, 65536), numbers)):
        wide = None if bias is None else bias.float()
        half, whole = (
            multiply(native_linear.Packed(words, s, None, b, 8, 32), torch.eye(32)[:2], 2)
            for s, b in ((scales, bias), (scales.float(), wide))
        )
        assert same(half, whole)
    assert same(half[0], 0.0 + numbers.float())  # 0 + -0 is +0


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_outputs_round_to_nearest_even(isa: str, kind: torch.dtype) -> None:
    """Any float32 as bias of a zero product: ties and their neighbours, denormals, overflow, NaN."""
    near = patterns(kind).float().view(torch.int32)
    step = 1 << 16 if kind is torch.bfloat16 else 1 << 13
    ties = torch.cat([near + offset for offset in (step // 2 - 1, step // 2, step // 2 + 1)])
    anything = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=torch.Generator().manual_seed(2))
    halves = 2.0**-25 * torch.arange(4096)  # float16's denormals, and the midpoints between them
    bias = torch.cat([ties.view(torch.float32), anything.int().view(torch.float32), halves, -halves])
    words = torch.zeros(32 * 8 // 32, len(bias), dtype=torch.int32)
    packed = native_linear.Packed(words, torch.ones(1, len(bias)), None, bias, 8, 32)
    assert same(multiply(packed, torch.zeros(1, 32), 2, kind)[0], (0.0 + bias).to(kind))  # 0 + -0 is +0


# ---- dense -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, *KINDS], ids=str)
def test_dense_against_float64(isa: str, bias: torch.dtype | None) -> None:
    """Within in * 2^-24 of the sum of all |x w|, the largest error of a float32 sum in any order."""
    for inputs, outputs in ((1, 1), (7, 3), (31, 24), (64, 50), (100, 9), (515, 33)):
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs)).bfloat16()
        b = None if bias is None else torch.randn(outputs).to(bias)
        x = activations(11, inputs)
        exact = x.double() @ weight.double().T + (0 if b is None else b.double())
        size = x.double().abs() @ weight.double().abs().T + (0 if b is None else b.double().abs())
        y = dense(weight, x, b)
        assert ((y.double() - exact).abs() <= size * (inputs + 1) * 2.0**-24).all()


def test_dense_rows_do_not_depend_on_each_other(isa: str) -> None:
    weight = torch.randn(77, 203, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = activations(19, 203)
    all_rows = dense(weight, x)
    for rows in range(1, 19):
        assert same(dense(weight, x[19 - rows :]), all_rows[19 - rows :]), rows


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_dense_takes_and_returns_16_bits(isa: str, kind: torch.dtype) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    x = activations(3, 64, kind)
    assert same(dense(weight, x), dense(weight, x.float()).to(kind))


@pytest.mark.skipif(not system.processor_flags(), reason="the system lists no flags")
@pytest.mark.skipif("x86_64" not in platform.machine(), reason="not an x86-64 processor")
def test_the_set_is_the_best_that_linux_lists() -> None:
    """Our reading of cpuid agrees with the kernel's."""
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    vnni = avx512 | {"avx512_vnni", "avx512vbmi", "avx512_vbmi2", "gfni"}
    wanted = (
        ("AVX-512 BF16", vnni | {"avx512_bf16"}),
        ("AVX-512 VNNI", vnni),
        ("AVX-512", avx512),
        ("AVX2", avx2),
        ("portable C", set()),
    )
    flags = system.processor_flags()
    assert native.isa_name() == next(name for name, needed in wanted if needed <= flags)
