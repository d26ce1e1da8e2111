"""On a real card: what `lowmem doctor` runs there, one test a check. Run with -m gpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowmem.config import BITS
from lowmem.doctor import gpu, kernels
from lowmem.doctor.report import Check
from lowmem.kernels.registry import REFERENCE
from lowmem.plan.bandwidth import card_bandwidth

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
    """On a card one of GPTQModel's kernels is used; which one depends on the machine's compilers."""
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
