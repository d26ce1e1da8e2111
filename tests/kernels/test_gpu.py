"""On a real card: what `lowmem doctor` runs there, one test a check. Run with -m gpu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.checkpoint.dequantize import dequantize
from lowmem.checkpoint.formats import LAYOUTS, LinearFormat
from lowmem.config import BITS
from lowmem.doctor import gpu, kernels
from lowmem.doctor.report import Check
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.registry import REFERENCE
from lowmem.kernels.trial import sample_linear
from lowmem.kernels.triton.choice import FEW_ROWS
from lowmem.kernels.triton.presence import why_not_triton
from lowmem.plan.bandwidth import card_bandwidth

pytest.importorskip("triton")

from lowmem.kernels.triton.linear import TritonLinear

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def card() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card")
    yield torch.device("cuda", 0)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def dtype(card: torch.device) -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def test_the_reference_kernel(card: torch.device) -> None:
    assert "equal to float64" in kernels.reference_works(card)


@pytest.mark.parametrize("bits", BITS)
def test_a_kernel_is_chosen(bits: int, card: torch.device, dtype: torch.dtype) -> None:
    """Which one depends on the machine's compilers."""
    check = kernels.chosen("kernels", bits, card, dtype)
    assert not check.detail.startswith(REFERENCE), check.detail


@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_in_a_whole_model(bits: int, card: torch.device, dtype: torch.dtype) -> None:
    assert "logits within" in gpu.kernel_in_model(bits, card, dtype)


def test_greedy_tokens_are_those_of_the_cpu(card: torch.device) -> None:
    assert "the same as on the CPU" in gpu.same_tokens_as_cpu(card)


def test_memory_is_accounted(card: torch.device) -> None:
    assert "weights" in gpu.memory_is_accounted(card)


def test_compiled_decode(card: torch.device, dtype: torch.dtype) -> None:
    found = gpu.decode_works("a model", card, dtype)
    assert not isinstance(found, Check), found


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_bitsandbytes(method: str, card: torch.device, dtype: torch.dtype) -> None:
    assert "dense linear" in kernels.bnb_works(method, card, dtype)  # type: ignore[arg-type]
    assert "likeliest" in gpu.bnb_in_model(method, card, dtype)  # type: ignore[arg-type]


def test_bandwidth(card: torch.device) -> None:
    assert 1e10 < card_bandwidth(card) < 1e14


FORMATS = [(layout.name, bits) for layout in LAYOUTS.values() for bits in layout.bits]


def ours(card: torch.device, dtype: torch.dtype, format: LinearFormat) -> tuple[TritonLinear, Any]:
    """(our kernels' linear, the weight in float64)."""
    if problem := why_not_triton(str(card)):
        pytest.skip(problem)
    linear = sample_linear(LinearSpec(1024, 768, True, format), card, dtype)
    return TritonLinear(linear), (dequantize(linear, torch.float64), linear.bias.double())  # type: ignore[union-attr]


@pytest.mark.parametrize(("layout", "bits"), FORMATS)
@pytest.mark.parametrize("size", [32, 128])
def test_our_kernels_at_every_number_of_rows(
    layout: str, bits: int, size: int, card: torch.device, dtype: torch.dtype
) -> None:
    """Decode, tiles, prefill and dense products, with zero-points and negative scales."""
    module, (weight, bias) = ours(card, dtype, LinearFormat(bits, size, sym=False, layout=layout))
    for rows in (1, 2, 3, 4, 5, 16, 17, 100, 200):
        x = (torch.randn(rows, 1024, device=card) + 1).to(dtype)
        right = x.double() @ weight.T + bias
        error = float((module(x).double() - right).norm() / right.norm())
        assert error < 8e-3, (rows, error)


@pytest.mark.parametrize("parts", [1, 8])
def test_a_few_rows_have_the_bits_of_one(parts: int, card: torch.device, dtype: torch.dtype) -> None:
    module, _ = ours(card, dtype, LinearFormat(4, 128))
    module.choice = replace(module.choice, decode=replace(module.choice.decode, parts=parts))
    x = torch.randn(FEW_ROWS, 1024, device=card).to(dtype)
    whole = module(x)
    for count in range(1, FEW_ROWS):
        assert torch.equal(module(x[:count]), whole[:count])
    for _ in range(20):
        assert torch.equal(module(x), whole), "programs that finish in another order changed a sum"


def test_our_kernels_are_timed_in_a_graph(
    card: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the choice that is remembered computes what the usual one does."""
    from lowmem.kernels.triton.timing import choose, stopwatch

    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path))
    module, _ = ours(card, dtype, LinearFormat(4, 128))
    assert 1e-7 < stopwatch(module, dtype)(module.choice, 1) < 1e-2
    x = torch.randn(40, 1024, device=card).to(dtype)
    before = module(x).float()
    module.choice = choose(module, dtype)
    assert (tmp_path / "kernels.json").is_file()
    assert float((module(x).float() - before).norm() / before.norm()) < 8e-3


@pytest.mark.parametrize("bits", BITS)
def test_the_pace_of_a_width(bits: int, card: torch.device, dtype: torch.dtype) -> None:
    assert "GB/s" in kernels.pace(bits, card, dtype, card_bandwidth(card))
