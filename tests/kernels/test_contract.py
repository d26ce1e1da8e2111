"""What every Kernel promises: it computes what the reference does, refuses in words, states its workspace.

An entry in KERNELS holds a new kernel to all of this.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.checkpoint.formats import LinearFormat
from lowmem.config import BITS
from lowmem.kernels import reference
from lowmem.kernels.contract import Kernel, LinearSpec
from lowmem.kernels.native import library
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.registry import BitsAndBytes, GPTQModelKernel, Native, Reference, TorchOperators, Triton
from lowmem.kernels.trial import sample_linear, trial
from lowmem.plan.device import packs_nf4
from tests.helpers import REPO
from tests.kernels.test_trial import FakeBackend, RightKernel

CPU = torch.device("cpu")
KERNELS: dict[str, Callable[[], Kernel]] = {
    "native": Native,
    "torch": TorchOperators,
    "triton": Triton,
    "reference": Reference,
    "int8": lambda: BitsAndBytes("int8"),
    "nf4": lambda: BitsAndBytes("nf4", packs_nf4()),
    "gptqmodel": lambda: GPTQModelKernel(FakeBackend(RightKernel)),
}
"""gptqmodel: its adapter with a fake kernel; test_trial.py has its own kernels, in another process."""
SPECS = [
    *(
        LinearSpec(256, 160, bias, LinearFormat(bits, size, sym, desc_act, layout))
        for bits in (8, 4, 3, 2)
        for size, sym, desc_act, layout, bias in (
            (128, True, False, "gptq", True),
            (64, False, False, "gptq_v2", False),
            (32, False, True, "gptq", True),
            (-1, True, False, "gptq", False),
        )
    ),
    *(
        LinearSpec(256, 160, True, LinearFormat(bits, 64, sym, desc_act, "gptq_p"))
        for bits in BITS
        for sym, desc_act in ((True, False), (False, True))
    ),
    LinearSpec(1024, 64, True, LinearFormat(4, 512)),
    LinearSpec(96, 64, True, LinearFormat(4, 48)),
    LinearSpec(64, 40, True, LinearFormat(4, 32)),
    LinearSpec(256, 160, True),
    LinearSpec(128, 96, False),
]
DTYPES = ("float32", "float16", "bfloat16")
KINDS = pytest.mark.parametrize("kind", KERNELS)


def kernel_of(kind: str) -> Kernel:
    if kind == "native" and not library.available():
        pytest.skip(library.why_not())
    if kind in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    if kind == "triton":
        pytest.importorskip("triton")
    return KERNELS[kind]()


def linear_of(spec: LinearSpec, dtype: torch.dtype) -> Any:
    """A random linear of the spec: a QuantLinear, or an nn.Linear."""
    if spec.format is None:
        torch.manual_seed(0)
        return nn.Linear(spec.in_features, spec.out_features, spec.bias, dtype=dtype).requires_grad_(False)
    linear = QuantLinear(spec.in_features, spec.out_features, spec.format, bias=spec.bias, dtype=dtype)
    sample = sample_linear(spec, CPU, dtype)
    for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        setattr(linear, part, getattr(sample, part))
    return linear


def exact(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """In float32."""
    if isinstance(linear, nn.Linear):
        bias = None if linear.bias is None else linear.bias.float()
        return nn.functional.linear(x.float(), linear.weight.float(), bias)
    return reference.linear(x.float(), linear)


@KINDS
@pytest.mark.parametrize("name", DTYPES)
@torch.inference_mode()
def test_what_a_kernel_takes_it_computes_and_what_not_it_says(kind: str, name: str) -> None:
    kernel, dtype, taken = kernel_of(kind), getattr(torch, name), []
    # An interpreter is slow; tests/kernels/triton tries more.
    for spec in SPECS[DTYPES.index(name) :: 4] if kind == "triton" else SPECS:
        if problem := kernel.why_not(spec, "cpu", name):
            assert "\n" not in problem and " " in problem, problem
            continue
        taken.append(spec)
        linear = linear_of(spec, dtype)
        x = torch.randn(2, 20, spec.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        right = exact(linear, x)
        module = kernel.prepare(linear, dtype)
        whole = module(x)
        assert whole.shape == right.shape and whole.dtype is dtype
        error = (whole.float() - right).norm() / right.norm()
        assert error <= kernel.tolerance(name), (spec, error)
        for count in (1, 3, 17):
            rows = module(x[0, :count])
            error = (rows.float() - right[0, :count]).norm() / right[0, :count].norm()
            assert error <= kernel.tolerance(name), (spec, count, error)
            assert not kernel.row_invariant or torch.equal(rows, whole[0, :count])
    assert len(taken) < len(SPECS)
    assert bool(taken) == (kind != "torch" or name == "bfloat16")


@KINDS
def test_a_kernel_says_where_and_for_what_it_is_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of weight each: packed, or in 16 bits."""
    kernel = kernel_of(kind)
    packed, dense = (kernel.why_not(spec, "cpu", "bfloat16") for spec in (SPECS[4], SPECS[-1]))
    assert "packed" in (packed if kind in ("int8", "nf4") else dense)
    if kind == "triton":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert kernel.why_not(SPECS[4], "cpu", "bfloat16") == "for a card only"
    if kind in ("native", "torch"):
        assert kernel.why_not(SPECS[4], "cuda:0", "bfloat16") == "for the CPU only"


def peak_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """(the most bytes that torch has allocated on the CPU at one moment of `run`, its result)."""
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as found:
        result = run()
    changes = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak, result


@pytest.mark.parametrize("kind", ["native", "torch", "triton", "reference"])
@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize(
    "spec",
    [LinearSpec(1024, 2048, True, LinearFormat(4, 128)), LinearSpec(2048, 1024, False, LinearFormat(8, -1))],
    ids=["4 bits", "8 bits"],
)
@torch.inference_mode()
def test_the_workspace_is_what_a_kernel_takes(kind: str, rows: int, spec: LinearSpec) -> None:
    """Of `prepare`, beside the weight that it leaves; of the product, beside its result. Our own kernels."""
    kernel, dtype = kernel_of(kind), torch.bfloat16
    linear, x = linear_of(spec, dtype), torch.randn(rows, spec.in_features).to(dtype)
    allowed = kernel.workspace(spec, rows, dtype.itemsize) + (64 << 10)
    if kind == "native":
        library.loaded().space = torch.empty(0, dtype=torch.uint8)
        allowed += library.library().lm_threads() * (320 << 10)  # each thread's own
    if kind == "triton":
        allowed += 1 << 20  # not ours: the CPU's dense product repacks, 0.25 MiB with AVX-512, 0.94 with AMX
    peak, module = peak_bytes(lambda: kernel.prepare(linear, dtype))
    held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert peak <= held + allowed
    for _ in range(2):
        peak, result = peak_bytes(lambda: module(x))
        assert peak <= result.nbytes + allowed


@KINDS
def test_a_trial_passes(kind: str) -> None:
    kernel, spec = kernel_of(kind), SPECS[7] if kind != "torch" else SPECS[4]
    if kind in ("int8", "nf4"):
        pytest.skip("not of a packed linear")
    module, problem = trial(kernel, linear_of(spec, torch.bfloat16), torch.bfloat16)
    assert problem == "" and module is not None


def test_workspaces_need_no_torch() -> None:
    """The planner asks before torch is imported."""
    script = """
import sys
from lowmem.checkpoint.formats import LinearFormat
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.registry import planned
for method in ("dense", "gptq", "int8", "nf4"):
    for cuda in (True, False):
        spec = LinearSpec(256, 256, format=LinearFormat(4, 128) if method == "gptq" else None)
        assert all(kernel.workspace(spec, 512, 2) > 0 for kernel in planned(method, cuda=cuda))
assert not {"torch", "bitsandbytes", "gptqmodel"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
