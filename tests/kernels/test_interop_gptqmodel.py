"""GPTQModel, optimum and transformers read what `lowmem convert` writes, and compute the same.

Importing GPTQModel patches transformers and replaces torch functions, so all of it runs in a process of
its own (this file, as a script), which loads every checkpoint and writes what it computed to a file. Here it
is compared with lowmem's own reader:

- GPTQModel's dequantized weights must equal ours to the last bit;
- its logits may differ from ours in float32 by what arithmetic in its dtype costs, and that is measured:
  the same checkpoint through lowmem in the same dtype is as far from float32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem.convert.recipe import ConvertOptions, LinearSettings, Recipe

import lowmem
from lowmem.checkpoint.packing import pack_rows, pack_zeros, unpack_zeros
from lowmem.config import QuantConfig, SamplingParams
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadOptions, load
from lowmem.session import Session
from tests.checkpoint.gptqmodel_packing import packing_cases, through_gptqmodel
from tests.convert.convert_helpers import quick_convert
from tests.helpers import REPO, save_source, tiny_model

NEEDED = ("gptqmodel", "optimum")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

HIDDEN = 128
PROMPT = "def main(argv):"
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Job:
    """One checkpoint, read one way. reader: GPTQModel, transformers or optimum; backend: its kernel."""

    kind: str
    bits: int
    group_size: int
    sym: bool
    backend: str = "gptq_torch"
    dtype: str = "float16"
    reader: str = "GPTQModel"
    mixed: str = ""
    """Linears differ: "stream" without 5, 6 and 7 bits, "planar" with them."""

    @property
    def checkpoint(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{self.bits}bit-g{self.group_size}-{'sym' if self.sym else 'asym'}{self.mixed}"

    @property
    def recipe(self) -> Recipe:
        """How the checkpoint is converted: every second linear of a mixed one otherwise."""
        config = QuantConfig(bits=self.bits, group_size=self.group_size, sym=self.sym)
        if not self.mixed:
            return Recipe(config)
        names = [f"model.layers.0.{name}" for name in MIXED[self.mixed]]
        return Recipe(config, dict(zip(names, MIXED[self.mixed].values(), strict=True)))

    def __str__(self) -> str:
        return f"{self.checkpoint}-{self.reader}-{self.backend}-{self.dtype}"


MIXED = {
    "stream": {
        "self_attn.q_proj": LinearSettings(3),
        "self_attn.k_proj": LinearSettings(8, 64, sym=False),
        "self_attn.o_proj": LinearSettings(16),
        "mlp.down_proj": LinearSettings(2, -1, sym=False),
    },
    "planar": {
        "self_attn.q_proj": LinearSettings(3),
        "self_attn.v_proj": LinearSettings(6, 64, sym=False),
        "mlp.gate_proj": LinearSettings(5),
        "mlp.up_proj": LinearSettings(16),
        "mlp.down_proj": LinearSettings(8, -1),
    },
}
"""The linears of a mixed llama that differ from the others. GPTQModel stores a planar checkpoint's 3 bits in
planes too."""


def _every_width(kind: str, first: int) -> list[Job]:
    """Every width, symmetric and not, the three group sizes in turn from number `first`."""
    sizes = (32, 64, -1)
    return [
        Job(kind, bits, sizes[(first + i + j) % 3], sym)
        for i, bits in enumerate((8, 4, 3, 2))
        for j, sym in enumerate((True, False))
    ]


def _jobs() -> list[Job]:
    """Both kinds at every width; then the other readers and kernels."""
    big, llama = "gpt_bigcode_mqa", "llama"
    return [
        *_every_width(big, 0),
        *(job for job in _every_width(llama, 1) if job.sym == (job.bits in (8, 3))),
        *(Job(big, bits, 32, bits != 6) for bits in (7, 6, 5)),
        *(Job(llama, 4, 32, True, mixed=mixed) for mixed in MIXED),
        Job(llama, 4, 32, False, dtype="bfloat16"),
        # ATen's int4 kernel: whole multiples of 32 columns a group.
        Job(big, 4, 64, True, "gptq_torch_aten", "bfloat16"),
        Job(llama, 4, 32, False, "gptq_torch_aten", "bfloat16"),
        # This one takes every zero-point for 8, so it reads symmetric checkpoints alone.
        Job(big, 4, 64, True, "gptq_torch_fused", "bfloat16"),
        Job(llama, 8, 64, True, reader="transformers"),
        Job(llama, 4, 32, False, reader="transformers"),
        Job(big, 4, 64, True, reader="transformers"),
        Job(big, 2, 32, False, reader="transformers"),
        Job(big, 4, 64, True, reader="pipeline"),
        Job(big, 4, 64, True, reader="optimum"),
        Job(big, 3, -1, True, reader="optimum"),
        Job(big, 2, 32, False, reader="optimum"),
    ]


JOBS = _jobs()
SLOW_JOBS = [job for first in (0, 1, 2) for job in _every_width("llama", first) if job not in JOBS]
AVX512_JOBS = [
    Job("gpt_bigcode_mqa", 4, 64, True, "gptq_torch_cpu_avx512", "bfloat16"),
    Job("llama", 4, 32, False, "gptq_torch_cpu_avx512", "bfloat16"),
]


class Results:
    """The checkpoints, and what the other process made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, dict[str, Any]] = {}

    def checkpoint(self, job: Job) -> Path:
        """The folder of the job's checkpoint, converted at the first use."""
        out = self.folder / job.checkpoint
        if not out.exists():
            source = self.folder / job.kind
            if not source.exists():
                save_source(tiny_model(job.kind, layers=1, hidden=HIDDEN, heads=4), source)
            options = ConvertOptions(device="cpu", compute_dtype="float32")
            quick_convert(source, out, job.recipe, rows=2, row_length=32, options=options)
        return out

    def run(self, jobs: list[Job]) -> None:
        """Read all the jobs' checkpoints in a fresh process."""
        for job in jobs:
            self.checkpoint(job)
        todo = self.folder / "jobs.json"
        todo.write_text(json.dumps([asdict(job) for job in jobs]))
        environment = {
            **os.environ,
            "GPTQMODEL_CPU_WORKERS": "2",  # with one worker a core, loading dies on two cores
            "TORCH_COMPILE_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(REPO),
        }
        command = [sys.executable, "-m", "tests.kernels.test_interop_gptqmodel", str(self.folder)]
        done = subprocess.run(
            command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        for job in jobs:
            self.found[str(job)] = torch.load(self.folder / f"{job}.pt", weights_only=True)

    def of(self, job: Job) -> dict[str, Any]:
        """The job's "logits", "kernels", "weights"; fails with the reader's own words when it refused."""
        found = self.found[str(job)]
        assert "error" not in found, f"{job.reader} refused: {found['error']}"
        return found

    def expected(self, job: Job, dtype: str) -> torch.Tensor:
        """lowmem's logits of the job's checkpoint, as float32."""
        return _logits(self.checkpoint(job), dtype)


@cache
def _logits(checkpoint: Path, dtype: str) -> torch.Tensor:
    with torch.inference_mode():
        return load(checkpoint, LoadOptions(dtype=getattr(torch, dtype))).model(IDS).logits.float()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    found = Results(tmp_path_factory.mktemp("interop"))
    found.run(JOBS)
    return found


def error_of(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative error, in the 2-norm."""
    return float((logits - exact).norm() / exact.norm())


def assert_agrees(results: Results, job: Job, allowance: float = 1.5) -> None:
    """No further from float32 than `allowance` times what lowmem itself is in the reader's dtype."""
    exact = results.expected(job, "float32")
    rounding = error_of(results.expected(job, job.dtype), exact)
    got = results.of(job)["logits"]
    assert 0 < rounding < 0.02 and exact.std() > 0.1
    assert error_of(got, exact) < allowance * rounding


CASES = [(case["bits"], case["layout"]) for case in packing_cases()]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "{}-bit-{}".format(*CASES[number]))
def test_same_words_as_gptqmodel(number: int, results: Results) -> None:
    """Its packer gives our words, and its unpacker our integers, at every width."""
    case = torch.load(results.folder / "packing.pt", weights_only=True)[number]
    bits, layout, q, zeros = case["bits"], case["layout"], case["q"], case["zeros"]
    assert (bits, layout) == CASES[number]
    assert torch.equal(case["qweight"], pack_rows(q, bits, layout))
    assert torch.equal(case["qzeros"], pack_zeros(zeros, bits, layout))
    expected = (q.long() - zeros[case["g_idx"]]) * case["scales"].float()[case["g_idx"]]
    torch.testing.assert_close(case["weight"].float(), expected, rtol=2e-3, atol=0)
    assert torch.equal(case["random_zeros"].long(), unpack_zeros(case["random_words"], bits, layout).long())


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_logits_agree(job: Job, results: Results) -> None:
    """Whatever reads it, and with whatever kernel, computes what our reader computes."""
    assert_agrees(results, job)


@pytest.mark.parametrize("job", [job for job in JOBS if job.backend == "gptq_torch"], ids=str)
def test_weights_are_equal_to_the_last_bit(job: Job, results: Results) -> None:
    """Integers, zero-points and scales mean the same to the reader, negative scales included."""
    loaded = load(results.checkpoint(job), LoadOptions(dtype=getattr(torch, job.dtype)))
    ours = {
        name: module.dequantize(getattr(torch, job.dtype))
        for name, module in loaded.model.named_modules()
        if isinstance(module, QuantLinear)
    }
    theirs = results.of(job)["weights"]
    assert set(theirs) == set(ours) and len(ours) >= 4
    for name, weight in ours.items():
        # In bfloat16 the reader rounds the scale before the product, so there only the ratio is bounded.
        if job.dtype == "float16":
            assert torch.equal(theirs[name], weight), name
        else:
            assert torch.allclose(theirs[name].float(), weight.float(), rtol=0.01, atol=0), name


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_negative_scales_are_among_them(bits: int, results: Results) -> None:
    """Symmetric grids turn round to reach further: without a negative scale the other tests prove less."""
    job = next(job for job in JOBS if job.bits == bits and job.sym)
    model = load(results.checkpoint(job), LoadOptions(dtype=torch.float32)).model
    scales = torch.cat([m.scales.flatten() for m in model.modules() if isinstance(m, QuantLinear)])
    assert 0.05 < float((scales < 0).float().mean()) < 0.95


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_the_named_kernel_was_used(job: Job, results: Results) -> None:
    """A reader that falls back to another kernel, or to dense linears, proves nothing about this one."""
    names = {
        "gptq_torch": "TorchLinear",
        "gptq_torch_aten": "TorchAtenLinear",
        "gptq_torch_fused": "TorchFusedLinear",
    }
    kernels = results.of(job)["kernels"]
    assert set(kernels) == {names[job.backend]} and sum(kernels.values()) >= 4


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_config_means_the_same_to_optimum_and_transformers(job: Job, results: Results) -> None:
    """`GPTQQuantizer.from_dict` and `GPTQConfig.from_dict` accept our quantization_config as it is meant.

    Both refuse 7, 6 and 5 bits, and optimum does not know the layout that has them.
    """
    config = results.of(job)["config"]
    if job.bits in (7, 6, 5):
        assert not config
        return
    wanted: dict[str, Any] = {"bits": job.bits, "group_size": job.group_size, "sym": job.sym}
    wanted |= {"desc_act": False, "format": job.recipe.layout}
    of_optimum = wanted | ({"format": "gptq"} if job.mixed == "planar" else {})
    assert config == {"optimum": of_optimum, "transformers": wanted}


def test_the_pipeline_of_the_model_card_answers_as_lowmem_does(results: Results) -> None:
    (job,) = [job for job in JOBS if job.reader == "pipeline"]
    results.of(job)
    session = Session(lowmem.open_model(str(results.checkpoint(job)), device="cpu", dtype="float32"))
    answer = session.complete(PROMPT, SamplingParams(temperature=0, max_new_tokens=8), raw=True)
    assert (results.checkpoint(job) / "answer.txt").read_text() == answer.text


@pytest.mark.slow
def test_every_width_and_group_size_of_llama(results: Results) -> None:
    """What is left out of the quick tests."""
    results.run(SLOW_JOBS)
    for job in SLOW_JOBS:
        assert_agrees(results, job)


@pytest.mark.slow
def test_avx512_kernel(results: Results) -> None:
    """GPTQModel's own CPU kernel, what it chooses for 4 bits here; built by a compiler on first use."""
    results.run(AVX512_JOBS)
    for job in AVX512_JOBS:
        found = results.found[str(job)]
        if "error" in found and "AVX" in found["error"]:
            pytest.skip(found["error"])
        assert set(results.of(job)["kernels"]) == {"TorchCpuAvx512Linear"}
        assert_agrees(results, job)


# What follows runs in the other process.


def _read_all(folder: Path) -> None:
    for fields in json.loads((folder / "jobs.json").read_text()):
        job = Job(**fields)
        try:
            found = _read(job, folder / job.checkpoint)
        except Exception as error:  # the test that asks for this job says what it was
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, folder / f"{job}.pt")
    torch.save([through_gptqmodel(case) for case in packing_cases()], folder / "packing.pt")


def _read(job: Job, checkpoint: Path) -> dict[str, Any]:
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    readers = {
        "GPTQModel": _with_gptqmodel,
        "transformers": _with_transformers,
        "pipeline": _with_pipeline,
        "optimum": _with_optimum,
    }
    model = readers[job.reader](job, checkpoint)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, BaseQuantLinear)}
    names = [type(module).__name__ for module in packed.values()]
    weights = {}
    if job.backend == "gptq_torch":  # the others repack on first use
        weights = {n: m.dequantize_weight().T.contiguous() for n, m in packed.items()}
    with torch.inference_mode():
        logits = model(IDS).logits.float()
    kernels = {name: names.count(name) for name in names}
    return {"logits": logits, "kernels": kernels, "weights": weights, "config": _config_seen(checkpoint)}


def _with_gptqmodel(job: Job, checkpoint: Path) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    dtype = getattr(torch, job.dtype)
    return GPTQModel.load(str(checkpoint), device="cpu", backend=BACKEND(job.backend), dtype=dtype).model


def _with_transformers(job: Job, checkpoint: Path) -> Any:
    """from_pretrained: of llama as it is, of gpt_bigcode once it is patched."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    if job.kind != "llama":
        lowmem.patch_transformers()
    # Of this, from_pretrained takes the backend alone, the rest is the checkpoint's own.
    choice = GPTQConfig(bits=job.bits, backend=job.backend)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, job.dtype), device_map="cpu", quantization_config=choice
    ).eval()


def _with_pipeline(job: Job, checkpoint: Path) -> Any:
    """The model of the pipeline on the model card, after it has answered."""
    from transformers import GPTQConfig, pipeline

    lowmem.patch_transformers()
    choice = GPTQConfig(bits=job.bits, backend=job.backend)
    pipe = pipeline(
        "text-generation",
        model=str(checkpoint),
        dtype=getattr(torch, job.dtype),
        model_kwargs={"quantization_config": choice},
    )
    (answer,) = pipe(PROMPT, max_new_tokens=8, do_sample=False, return_full_text=False)
    (checkpoint / "answer.txt").write_text(answer["generated_text"])
    return pipe.model


def _with_optimum(job: Job, checkpoint: Path) -> Any:
    """optimum's reader by hand, without from_pretrained."""
    from optimum.gptq import GPTQQuantizer
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from lowmem.models.architecture import build_model

    config = AutoConfig.from_pretrained(checkpoint)
    quantization = config.quantization_config
    del config.quantization_config
    dtype = getattr(torch, job.dtype)
    model = build_model(config, dtype, buffers=True)
    quantizer = GPTQQuantizer.from_dict({**quantization, "backend": job.backend})
    model = quantizer.convert_model(model, device_map={"": "cpu"})
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, left
    return quantizer.post_init_model(model).eval()


def _config_seen(checkpoint: Path) -> dict[str, dict[str, Any]]:
    from optimum.gptq import GPTQQuantizer
    from transformers import GPTQConfig

    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    if config["bits"] in (7, 6, 5):
        with pytest.raises(ValueError, match="2,3,4,8"):
            GPTQConfig.from_dict(dict(config))
        return {}
    seen = {"optimum": GPTQQuantizer.from_dict(config), "transformers": GPTQConfig.from_dict(config)}
    fields = ("bits", "group_size", "sym", "desc_act", "format")
    return {who: {field: _plain(getattr(what, field)) for field in fields} for who, what in seen.items()}


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value


if __name__ == "__main__":
    _read_all(Path(sys.argv[1]))
