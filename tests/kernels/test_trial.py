"""The trial of a kernel against the reference: GPTQModel's kernels on the CPU, and fakes for those on a card.

Importing GPTQModel patches transformers, so the tests that need it run in a process of their own (this file,
as a script), whose findings are read back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.checkpoint.dequantize import PackedWeight
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros, unpack_rows, unpack_zeros
from lowmem.config import BITS
from lowmem.kernels import dispatch, gptqmodel, reference
from lowmem.kernels.contract import LinearSpec
from lowmem.kernels.dispatch import REFERENCE, Installed, best_kernel, linear_specs, replace_linears
from lowmem.kernels.gptqmodel import Backend, Scratch
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.registry import GPTQModelKernel, gptqmodel_kernels
from lowmem.kernels.trial import by_speed, sample_linear, sample_spec, trial
from lowmem.loading.loader import LoadOptions, load
from tests.helpers import REPO, tiny_model
from tests.kernels.test_native_linear import quant_linear
from tests.rtn_helpers import write_rtn_checkpoint

CPU = torch.device("cpu")
MISSING = [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]
needs_gptqmodel = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


class RightKernel(nn.Module):
    """Computes what the reference does, from tensors that post_init repacks in place, as ExLlamaV2 does."""

    REQUIRES_FORMAT_V2 = True
    made = 0

    def __init__(self, *, bits: int, in_features: int, bias: bool, out_features: int, **rest: Any) -> None:
        super().__init__()
        type(self).made += 1
        self.bits = bits
        self.layout = rest.get("format", "gptq_v2")
        self.register_buffer(
            "qweight", torch.empty(in_features * bits // 32, out_features, dtype=torch.int32)
        )
        self.register_buffer("qzeros", torch.empty(1, dtype=torch.int32))
        self.register_buffer("scales", torch.empty(1, dtype=torch.float16))
        self.register_buffer("g_idx", torch.empty(in_features, dtype=torch.int32))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    def post_init(self) -> None:
        self.qweight.bitwise_not_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.linear(x, self.weight())

    def weight(self) -> PackedWeight:
        format = LinearFormat(self.bits, 32, layout=self.layout)
        return PackedWeight(format, ~self.qweight, self.qzeros, self.scales, self.g_idx, self.bias)


class OffByOne(RightKernel):
    """Adds one to the zero-points, as if they were stored less one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bits = self.weight(), self.bits
        zeros = unpack_zeros(self.qzeros, bits, self.layout).int() + 1
        zeros = zeros.clamp(max=(1 << bits) - 1)
        return reference.linear(x, replace(weight, qzeros=pack_zeros(zeros, bits, self.layout)))


class PositiveScales(RightKernel):
    """Drops the sign of a scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.linear(x, replace(self.weight(), scales=self.scales.abs()))


class NanForManyRows(RightKernel):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (float("nan") if len(x) > 8 else 1.0)


class RaisesAtInit(RightKernel):
    def __init__(self, **arguments: Any) -> None:
        raise ImportError("needs nvcc\nand more lines")


class RaisesWhenRepacking(RightKernel):
    def post_init(self) -> None:
        super().post_init()
        raise RuntimeError("no kernel image is available for execution on the device")


class OutOfMemory(RightKernel):
    def post_init(self) -> None:
        super().post_init()
        raise torch.OutOfMemoryError("CUDA out of memory")


class OnlyWide(RightKernel):
    """Takes no linear of fewer than 100 outputs."""

    def __init__(self, *, out_features: int, **rest: Any) -> None:
        if out_features < 100:
            raise NotImplementedError("out_features must be at least 100")
        super().__init__(out_features=out_features, **rest)


class NeedsScratch(RightKernel):
    """post_init as ExLlamaV2's, with what it says about the scratch that it needs."""

    def post_init(self, scratch_space: Any) -> None:  # type: ignore[override]
        self.got = scratch_space.get_slice(2 * self.qweight.shape[1] * self.g_idx.numel() + 128)
        super().post_init()


class FakeBackend(Backend):
    """A class of this file as if it were GPTQModel's."""

    def __init__(self, cls: type[nn.Module], scratch: Scratch | None = None) -> None:
        super().__init__(cls.__name__, scratch=scratch)
        self.cls = cls

    def select(self, format: LinearFormat, device: str, dtype: torch.dtype) -> type[nn.Module]:
        return self.cls


def fakes(*classes: type[nn.Module], scratch: Scratch | None = None) -> tuple[GPTQModelKernel, ...]:
    return tuple(GPTQModelKernel(FakeBackend(cls, scratch)) for cls in classes)


def tensors_of(linear: Any) -> dict[str, torch.Tensor]:
    return {part: getattr(linear, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx", "bias")}


FORMATS = [
    LinearFormat(bits, size, sym, desc_act, version)
    for bits in (8, 4, 3, 2)
    for size, sym, desc_act, version in (
        (32, True, False, "gptq"),
        (64, False, True, "gptq"),
        (-1, False, False, "gptq_v2"),
    )
] + [LinearFormat(bits, 32, sym=False, layout="gptq_p") for bits in BITS]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_right_kernel_is_trusted_and_wrong_ones_are_not(format: LinearFormat, dtype: torch.dtype) -> None:
    """At every width: a zero-point off by one, a lost sign and a NaN are all seen, in every dtype."""
    kernels = fakes(OffByOne, PositiveScales, NanForManyRows, RightKernel, RaisesAtInit)
    choice = best_kernel(kernels, CPU, format, dtype)
    assert choice.name == "RightKernel"
    assert [over.kernel for over in choice.passed_over] == ["OffByOne", "PositiveScales", "NanForManyRows"]
    assert all("differs from the reference" in over.reason for over in choice.passed_over)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_sample_is_of_its_format(format: LinearFormat) -> None:
    sample = sample_linear(sample_spec(format), CPU)
    zeros = unpack_zeros(sample.qzeros, format.bits, format.layout)
    assert bool((zeros == 1 << (format.bits - 1)).all()) == format.sym
    assert 0.2 < float((sample.scales < 0).float().mean()) < 0.8
    assert bool((sample.g_idx.diff() >= 0).all()) != format.desc_act


@pytest.mark.parametrize("kernel", [RaisesAtInit, RaisesWhenRepacking, OffByOne])
def test_after_a_failure_the_linear_is_what_it_was(kernel: type[nn.Module]) -> None:
    """A kernel that repacked in place and then failed must not leave its words behind."""
    sample = sample_linear(sample_spec(FORMATS[3]), CPU)
    before = tensors_of(sample)
    found, problem = trial(fakes(kernel)[0], sample, torch.float32)
    assert found is None and problem and "\n" not in problem
    assert all(torch.equal(tensor, getattr(sample, part)) for part, tensor in before.items())


def test_out_of_memory_is_no_verdict_on_a_kernel() -> None:
    """The error reaches the caller, and the linear is unchanged."""
    sample = sample_linear(sample_spec(FORMATS[3]), CPU)
    before = tensors_of(sample)
    with pytest.raises(torch.OutOfMemoryError):
        best_kernel(fakes(OutOfMemory, RightKernel), CPU, FORMATS[3], torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        trial(fakes(OutOfMemory)[0], sample, torch.float32)
    assert all(torch.equal(tensor, getattr(sample, part)) for part, tensor in before.items())


def test_without_a_kernel_the_reference_stays() -> None:
    choice = best_kernel(fakes(RaisesAtInit, RaisesWhenRepacking), CPU, FORMATS[0], torch.float32)
    assert choice.name == REFERENCE
    assert [str(over) for over in choice.passed_over] == [
        "RaisesAtInit: needs nvcc",
        "RaisesWhenRepacking: no kernel image is available for execution on the device",
    ]
    assert best_kernel((), CPU, FORMATS[0], torch.float32).name == REFERENCE


class _Pair(nn.Module):
    """Two linears of one shape, one of another, and a dense head."""

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        self.first, self.second = self._linear(64, bits, 0), self._linear(64, bits, 1)
        self.wide = self._linear(128, bits, 2)
        self.head = nn.Linear(128, 8)

    @staticmethod
    def _linear(outputs: int, bits: int, seed: int) -> QuantLinear:
        made = QuantLinear(64, outputs, LinearFormat(bits, 32), bias=True)
        sample = sample_linear(LinearSpec(64, outputs, True, made.format), CPU, seed=seed)
        for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            setattr(made, part, getattr(sample, part))
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(self.second(self.first(x)).tanh()).tanh())


FOUR_BITS = LinearFormat(4, 32)
ROWS = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))


def put(model: nn.Module, *classes: type[nn.Module], **options: Any) -> Installed:
    return replace_linears(model, linear_specs(model, "cpu"), fakes(*classes), torch.float32, **options)


def test_every_linear_gets_the_kernel_and_the_model_computes_the_same() -> None:
    model = _Pair()
    buffers = {name: getattr(model, name).qweight.data_ptr() for name in ("first", "second", "wide")}
    before = model(ROWS)
    found = put(model, RightKernel)
    assert found.name == "RightKernel"
    assert [type(module).__name__ for module in model.children()] == ["RightKernel"] * 3 + ["Linear"]
    assert torch.allclose(model(ROWS), before, atol=1e-5)
    # Handed over, not copied: the kernel holds the memory that the linear held.
    assert buffers == {name: getattr(model, name).qweight.data_ptr() for name in buffers}


def test_a_shape_that_the_best_kernel_refuses_gets_the_next() -> None:
    model = _Pair()
    before = model(ROWS)
    found = put(model, OnlyWide, OffByOne, RightKernel)
    assert found.name == "RightKernel 2, OnlyWide 1"
    assert torch.allclose(model(ROWS), before, atol=1e-5)
    assert list(found.passed_over) == ["OnlyWide", "OffByOne"]
    assert "(first)" in found.passed_over["OnlyWide"]


def test_what_no_kernel_can_compute_keeps_the_reference() -> None:
    model = _Pair()
    before = model(ROWS)
    found = put(model, OnlyWide)
    assert found.name == "reference 2, OnlyWide 1" and isinstance(model.first, QuantLinear)
    assert torch.allclose(model(ROWS), before, atol=1e-5)
    assert put(_Pair(), OffByOne).name == REFERENCE


def test_a_shape_is_tried_once_and_its_zero_points_each_time() -> None:
    """The second linear of a shape is not multiplied again; but one that is not symmetric is another kind."""
    tried: list[int] = []

    class Counted(RightKernel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tried.append(len(x))
            return super().forward(x)

    put(_Pair(), Counted)
    assert tried == [1, 64] * 2
    tried.clear()
    model = _Pair()
    zeros = unpack_zeros(model.second.qzeros, 4).int()
    zeros[0, 0] = 3
    model.second.qzeros = pack_rows((zeros - 1).T, 4).T.contiguous()
    put(model, Counted)
    assert tried == [1, 64] * 3


class _TakesTheMiddle(RightKernel):
    """As Marlin: symmetric only, the zero-points never looked at."""

    def __init__(self, *, sym: bool, **rest: Any) -> None:
        if not sym:
            raise NotImplementedError("only symmetric")
        super().__init__(**rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = unpack_rows(~self.qweight, self.bits).float() - (1 << (self.bits - 1))
        weight = values * self.scales.float()[self.g_idx.long()]
        return (x.float() @ weight + self.bias).to(x.dtype)


def test_a_config_that_calls_other_zero_points_symmetric_is_not_believed() -> None:
    """The second linear's shape is trusted by then, so only its own zero-points can tell."""
    model = _Pair()
    zeros = unpack_zeros(model.second.qzeros, 4).int()
    zeros[1, 7] = 3
    model.second.qzeros = pack_rows((zeros - 1).T, 4).T.contiguous()
    before = model(ROWS)
    found = put(model, _TakesTheMiddle)
    assert found.name == "_TakesTheMiddle 2, reference 1" and isinstance(model.second, QuantLinear)
    assert torch.allclose(model(ROWS), before, atol=1e-5)


def test_one_zero_point_beside_the_middle_is_enough() -> None:
    """At 8 bits one that is off by one is below what a comparison of outputs can see."""
    model = _Pair(bits=8)
    zeros = unpack_zeros(model.first.qzeros, 8).int()
    zeros[1, 7] = 127
    model.first.qzeros = pack_rows((zeros - 1).T, 8).T.contiguous()
    found = replace_linears(model, linear_specs(model, "cpu"), fakes(_TakesTheMiddle), torch.bfloat16)
    assert isinstance(model.first, QuantLinear) and found.name == "_TakesTheMiddle 2, reference 1"
    assert "only symmetric" in found.passed_over["_TakesTheMiddle"]


def test_zero_points_of_zero_are_converted_field_by_field() -> None:
    """v1 stores 15 for a zero-point of 0; adding ones to whole words would change the next zero-point."""
    model = _Pair()
    zeros = torch.full((2, 64), 8)
    zeros[0, 0] = 0
    model.first.qzeros = pack_rows(zeros.T, 4).T.contiguous()
    model.first.format = LinearFormat(4, 32, layout="gptq_v2")
    before = model(ROWS)
    put(model, RightKernel)
    assert isinstance(model.first, RightKernel)
    assert torch.allclose(model(ROWS), before, atol=1e-5)


def test_linears_elsewhere_are_left_alone() -> None:
    """Layers that a plan keeps on the CPU are not among the card's linears."""
    assert set(linear_specs(_Pair(), "cpu")) == {"first", "second", "wide"}
    assert linear_specs(_Pair(), "cuda") == {}


def test_the_user_hears_of_a_kernel_before_it_is_tried() -> None:
    heard: list[str] = []
    put(_Pair(), RaisesAtInit, RightKernel, notify=heard.append)
    assert [line.split()[1] for line in heard] == ["RaisesAtInit", "RightKernel"]


def test_a_gptqmodel_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's packages may have wrong versions: the model still runs, and the user is notified."""

    def broken() -> Any:
        raise AttributeError("module 'transformers' has no attribute 'no_init_weights'")

    monkeypatch.setattr(gptqmodel, "_import_gptqmodel", broken)
    kernels = gptqmodel_kernels([sample_spec(FOUR_BITS)], CPU)
    choice = best_kernel(kernels, CPU, FOUR_BITS, torch.float32)
    assert choice.name == REFERENCE
    assert "GPTQModel: cannot be imported: module 'transformers'" in str(choice.passed_over[0])


# GPTQModel's own kernels, in a process of their own.

TWINS = [
    ("gpt_bigcode_mqa", 8, 32, "bfloat16"),
    ("gpt_bigcode_mqa", 4, 32, "bfloat16"),
    ("llama", 3, 64, "float16"),
    ("llama", 2, -1, "bfloat16"),
    ("llama", 4, 64, "float32"),
]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("twins")
    for kind, bits, size, dtype in TWINS:
        out = folder / f"{kind}-{bits}-{dtype}"
        write_rtn_checkpoint(tiny_model(kind, layers=1), out, bits=bits, group_size=size, tokenizer=True)
    environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_trial", str(folder)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "", "GPTQModel's banner and log must not mix with an answer"
    return dict(json.loads((folder / "found.json").read_text()))


@needs_gptqmodel
@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_a_model_with_gptqmodels_kernels_gives_the_same_logits(
    twin: tuple[str, int, int, str], twins: dict[str, Any]
) -> None:
    """The same functions as on a card, with GPTQModel's kernels for the CPU in all the linears."""
    kind, bits, _, dtype = twin
    found = twins[f"{kind}-{bits}-{dtype}"]
    if dtype == "float32":
        assert found["kernel"] == REFERENCE, "none of GPTQModel's computes in float32"
        assert any("dtype" in line for line in found["passed_over"])
        return
    for name in ("TorchLinear", "best"):
        assert found[name]["left"] == 0, found[name]
        assert found[name]["error"] < 0.03, found[name]
    assert found["TorchLinear"]["kernel"] == "TorchLinear"
    if bits == 4:
        assert found["best"]["kernel"] == "TorchAtenLinear"
    else:
        assert any("bits" in line for line in found["best"]["passed_over"])


@needs_gptqmodel
def test_the_environment_is_as_before(twins: dict[str, Any]) -> None:
    """An import of GPTQModel moves HF_HOME to /tmp and sets the CUDA device order."""
    assert twins["environment"] == []


@needs_gptqmodel
def test_a_card_is_offered_gptqmodels_gpu_kernels_in_its_order(twins: dict[str, Any]) -> None:
    """Without a card only the names are checked; kernels for CPUs are not among them."""
    for bits in ("8", "4"):
        order = [name for name in twins["cuda"][bits] if name in ("MarlinLinear", "ExllamaV2Linear")]
        assert order == ["MarlinLinear", "ExllamaV2Linear"]
        assert twins["cuda"][bits][-1] == "TorchLinear"
        assert "TorchAtenLinear" not in twins["cuda"][bits]


@needs_gptqmodel
def test_exllamas_scratch_is_one_weight_and_kept(twins: dict[str, Any]) -> None:
    """GPTQModel would add 8 x 2048 rows of outputs; and without the reference its memory would be freed."""
    assert twins["scratch"] == {"halves": 64 * 128 + 128, "shared": True, "kept": True}


def _with_kernels(folder: Path, dtype: torch.dtype, names: tuple[str, ...] | None) -> dict[str, Any]:
    loaded = load(folder, LoadOptions(dtype=dtype))
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        before = loaded.model(ids).logits.float()
    specs = linear_specs(loaded.model, "cpu")
    # The AVX-512 kernel is left out: a compiler builds it for a minute on first use.
    kernels = [
        kernel
        for kernel in gptqmodel_kernels(list(specs.values()), CPU)
        if kernel.name != "TorchCpuAvx512Linear" and (names is None or kernel.name in names)
    ]
    found = replace_linears(loaded.model, specs, kernels, dtype)
    with torch.inference_mode():
        after = loaded.model(ids).logits.float()
    return {
        "kernel": found.name,
        "passed_over": [": ".join(over) for over in found.passed_over.items()],
        "left": sum(isinstance(module, QuantLinear) for module in loaded.model.modules()),
        "error": float((after - before).norm() / before.norm()),
    }


def _main(folder: Path) -> None:
    environment = dict(os.environ)
    found: dict[str, Any] = {}
    for kind, bits, _, name in TWINS:
        key, dtype = f"{kind}-{bits}-{name}", getattr(torch, name)
        found[key] = {
            "TorchLinear": _with_kernels(folder / key, dtype, ("TorchLinear",)),
            "best": _with_kernels(folder / key, dtype, None),
        }
        found[key] |= {k: found[key]["best"][k] for k in ("kernel", "passed_over")}
    changed = {k for k in os.environ if os.environ[k] != environment.get(k)} | (
        set(environment) - set(os.environ)
    )
    # torch itself sets its folder for compiled code; the other variable is lowmem's, without a compiler.
    found["environment"] = sorted(changed - {"TORCHINDUCTOR_CACHE_DIR", "GPTQ_TORCH_TRITON_DEQUANT"})
    card = torch.device("cuda", 0)
    found["cuda"] = {
        str(bits): [b.name for b in gptqmodel.backends([sample_spec(LinearFormat(bits, 128))], card)]
        for bits in (8, 4, 3, 2)
    }
    model = _Pair()
    specs = linear_specs(model, "cpu")
    scratch = Scratch(max(spec.weights for spec in specs.values()))
    replace_linears(model, specs, fakes(NeedsScratch, scratch=scratch), torch.float32)
    spaces: list[Any] = [model.first.scratch_space, model.wide.scratch_space]
    found["scratch"] = {
        "halves": spaces[0].scratch.numel(),
        "shared": spaces[0] is spaces[1],
        "kept": model.second.got.data_ptr() == spaces[0].scratch.data_ptr(),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))


def test_the_fastest_right_kernel_comes_first() -> None:
    """Wrong and failing ones are left out, the tensors are as before, and each reason is a line."""
    linear = sample_linear(sample_spec(LinearFormat(4, 32)), CPU, torch.float32)
    before = tensors_of(linear)

    class Slower(RightKernel):
        pass

    class NotInAGraph(RightKernel):
        pass

    def seconds(module: nn.Module, x: torch.Tensor) -> float:
        assert x.shape == (1, linear.in_features)
        if isinstance(module, NotInAGraph):
            raise RuntimeError("operation not permitted when stream is capturing")
        return 2e-4 if isinstance(module, Slower) else 1e-4

    kernels = fakes(Slower, OffByOne, NotInAGraph, RightKernel)
    order, reasons = by_speed(kernels, linear, torch.float32, seconds)
    assert [kernel.name for kernel in order] == ["RightKernel", "Slower"]
    assert reasons["Slower"] == "slower than RightKernel (200 and 100 µs)"
    assert "differs" in reasons["OffByOne"] and "capturing" in reasons["NotInAGraph"]
    assert all(torch.equal(tensor, before[part]) for part, tensor in tensors_of(linear).items())


def test_a_model_gets_the_fastest_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: each shape is timed once."""

    class Slow(RightKernel):
        pass

    shapes = []

    def fake(kernels: Any, linear: Any, dtype: torch.dtype) -> Any:
        shapes.append(linear.qweight.shape)
        return [*kernels][::-1], {"Slow": "slower than RightKernel (2 and 1 µs)"}

    monkeypatch.setattr(dispatch, "is_timed", lambda linear: True)
    monkeypatch.setattr(dispatch, "by_speed", fake)
    model = nn.ModuleDict({str(n): quant_linear(64, size, 4, 32) for n, size in enumerate((64, 64, 96))})
    found = dispatch.replace_linears(model, list("012"), fakes(Slow, RightKernel), torch.float32)
    assert found.used == {"RightKernel": 3} and len(shapes) == 2
    assert found.passed_over["Slow"].startswith("slower than RightKernel")
