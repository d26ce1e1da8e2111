"""Which kernel a linear gets on a CPU, and why; on a card, see test_trial.py and test_gpu.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.checkpoint.formats import LinearFormat
from lowmem.errors import InvalidRequestError
from lowmem.kernels import dispatch, gptqmodel, registry
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.native import library as native
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.registry import VARIABLE, Native
from lowmem.kernels.trial import sample_spec
from lowmem.kernels.triton import presence
from lowmem.loading.loader import load
from tests.helpers import tiny_model
from tests.kernels.test_native_linear import CPU, error, exact, needs_native, quant_linear
from tests.rtn_helpers import write_rtn_checkpoint

FOUR_BITS = LinearFormat(4, 128)


class Several(nn.Module):
    """Two linears of different widths that every kernel takes, and one with groups of 48."""

    def __init__(self) -> None:
        super().__init__()
        self.four = quant_linear(96, 64, 4, 32)
        self.eight = quant_linear(96, 64, 8, -1)
        self.odd = quant_linear(96, 64, 4, 48)
        for linear in self.children():
            linear.bias = linear.bias.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self.children()], dim=-1)


@pytest.mark.parametrize("way", ["native", "torch", "reference"])
def test_each_way_gives_the_same_model(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may hold linears of several widths: each gets the best kernel that takes it."""
    if way == "native" and not native.available():
        pytest.skip(native.why_not())
    model = Several()
    x = torch.randn(7, 96).bfloat16()
    right = torch.cat([exact(linear, x) for linear in model.children()], dim=-1)
    monkeypatch.setenv(VARIABLE, way)
    name = dispatch.install(model, CPU, torch.bfloat16)
    assert error(model(x), right) < 5e-3
    if way == "native":
        assert name == f"lowmem {native.isa_name()} 2, reference 1"
        assert model.four.row_invariant and model.eight.row_invariant
    elif way == "torch":
        assert name == "torch's operators 2, reference 1"
        assert not isinstance(model.four, QuantLinear) and not isinstance(model.eight, QuantLinear)
    else:
        assert name == "reference"
    assert isinstance(model.odd, QuantLinear) and not model.odd.row_invariant


def test_without_a_library_torchs_operators_are_next_and_then_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(native, "_load", lambda: "not compiled: install a C compiler")
    four = dispatch.choose_kernel(CPU, FOUR_BITS, torch.bfloat16)
    assert four.name == "torch's operators" and "repacked weights" in four.reason
    assert str(four.passed_over[0]) == "lowmem's own: not compiled: install a C compiler"
    assert dispatch.choose_kernel(CPU, LinearFormat(8, -1), torch.bfloat16).name == four.name
    for format, dtype, words in (
        (LinearFormat(3, 64), torch.bfloat16, "for 4 bits"),
        (LinearFormat(8, 128), torch.bfloat16, "8 bits without groups"),
        (FOUR_BITS, torch.float32, "for bfloat16, not float32"),
    ):
        choice = dispatch.choose_kernel(CPU, format, dtype)
        assert choice.name == dispatch.REFERENCE and "slowly" in choice.reason
        assert any(words in str(over) for over in choice.passed_over)


def test_a_kernel_that_does_not_exist_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(InvalidRequestError, match=r"=fast is.*native, torch, triton or reference"):
        dispatch.choose_kernel(CPU, FOUR_BITS, torch.bfloat16)


@needs_native
def test_a_model_with_scattered_groups_gets_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in act-order checkpoints of other tools."""
    monkeypatch.delenv(VARIABLE, raising=False)
    shuffled = torch.arange(256)[torch.randperm(256, generator=torch.Generator().manual_seed(4))] // 64
    linear = quant_linear(256, 64, 4, 64, g_idx=shuffled)
    x = torch.randn(4, 256)
    right = exact(linear, x)
    model = nn.Sequential(linear)
    assert dispatch.install(model, CPU, torch.float32) == Native().name
    assert linear.order is not None and error(model(x), right) < 1e-5


def test_on_a_cpu_gptqmodel_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes seconds, and a CPU's kernels are ours."""

    def imported(*_: Any) -> Any:
        raise AssertionError("GPTQModel was imported")

    monkeypatch.setattr(gptqmodel, "_import_gptqmodel", imported)
    monkeypatch.setenv(VARIABLE, "reference")
    write_rtn_checkpoint(tiny_model("llama"), tmp_path / "q")
    loaded = load(tmp_path / "q")
    assert loaded.kernel == dispatch.REFERENCE
    assert any(isinstance(module, QuantLinear) for module in loaded.model.modules())
    choice = dispatch.choose_kernel(CPU, FOUR_BITS, torch.float32)
    assert choice.name == dispatch.REFERENCE and VARIABLE in choice.reason
    monkeypatch.delenv(VARIABLE)
    assert dispatch.install(loaded.model, CPU, loaded.dtype)
    assert dispatch.choose_kernel(CPU, FOUR_BITS, torch.float32).name


@pytest.mark.parametrize("device", ["cuda:0"])
def test_what_a_card_gets(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels, and GPTQModel's that need nvcc and no dequantized weight. Without ours, all of its."""
    names = ("MarlinLinear", "ExllamaV2Linear", "TorchLinear")
    asked: list[int] = []

    def theirs(specs: Any, device: torch.device) -> Any:
        asked.append(1)
        backends = [gptqmodel.Backend(name) for name in names]
        return tuple(registry.GPTQModelKernel(b, lean=b.name in registry.LEAN) for b in backends)

    def found() -> list[str]:
        kernels = registry.kernels_for([sample_spec(FOUR_BITS)], torch.device(device))
        support = registry.KernelSupport(triton=not why)
        most = max(
            k.workspace(STARCHATS, 512, 2) for k in registry.planned("gptq", cuda=True, support=support)
        )
        assert all(kernel.workspace(STARCHATS, 512, 2) <= most for kernel in kernels)
        return [kernel.name for kernel in kernels]

    why = ""
    monkeypatch.setattr(registry, "gptqmodel_kernels", theirs)
    monkeypatch.setattr(registry, "why_not_triton", lambda device: why)
    monkeypatch.setattr(registry, "nvcc", lambda: None)
    assert found() == ["lowmem Triton"] and not asked  # importing GPTQModel takes seconds
    monkeypatch.setattr(registry, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    assert found() == ["lowmem Triton", "MarlinLinear"]
    why = "Triton is not installed"
    assert found() == list(names)


STARCHATS = LinearSpec(6144, 24576, True, FOUR_BITS)
"""The largest linear of StarChat Alpha."""


def test_without_a_c_compiler_the_advice_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "compiler", lambda: None)
    presence.why_not_triton.cache_clear()
    try:
        assert "apt install gcc" in presence.why_not_triton("cuda:1")
        assert presence.why_not_triton("cpu") == ""  # the interpreter needs none
    finally:
        presence.why_not_triton.cache_clear()
