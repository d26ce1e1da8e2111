"""Decoding of Llama's layers at 4 bits beside llama.cpp's Q4_0: SmolLM2-135M's dimensions, and Llama 7B's.

    python -m lowmem.benchmarks.experiments.pace.llama --llama-python PYTHON    writes pace_llama.json
    python -m lowmem.benchmarks.experiments.pace.llama --show                   the committed record

All runtimes are open at once and measured in turns, as in `pace`; a ratio is of one round. Weights are made
up, since times do not depend on them. Heads are compared alike: 16 bits with F16, 8 bits with llama.cpp's own
recipe, which holds SmolLM2's in Q8_0. Llama 7B has four layers and a vocabulary of 4096, so that the layers
dominate. Models are kept in --work: 5 GB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lowmem.benchmarks.common.records import Origin, Repeated
from lowmem.benchmarks.experiments.common import (
    RESULTS,
    Experiment,
    add_timing_options,
    made_with,
    origin_here,
    repeated,
    say,
    spread,
    table,
)
from lowmem.benchmarks.experiments.pace.models import SMALL_VOCAB
from lowmem.benchmarks.experiments.peers.run import quantize_command
from lowmem.benchmarks.experiments.starchat.random_weights import (
    Tensors,
    Weight,
    dense_weight,
    packed_weights,
    write_plain,
)
from lowmem.benchmarks.experiments.workers.interpreters import find_peers
from lowmem.benchmarks.experiments.workers.turns import (
    RuntimeFacts,
    Turns,
    Worker,
    llama_command,
    lowmem_command,
)

from lowmem.errors import OutputError

WORK = Path(tempfile.gettempdir()) / "lowmem-pace-llama"
CONTEXT, STEPS, ROOM = 512, 16, 64
BITS = 4


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama model with a tied head, and the group size of its 4-bit version."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    group: int
    goal: float
    """How many times as fast as llama.cpp it should decode."""

    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a decoder layer's linears."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.inner),
            "mlp.up_proj": (self.hidden, self.inner),
            "mlp.down_proj": (self.inner, self.hidden),
        }

    def write(self, folder: Path, weight: Weight, more: dict[str, Any]) -> Path:
        """A checkpoint with random weights, unless it exists; returns `folder`. more: of its config."""
        if (folder / "config.json").is_file():
            return folder
        from transformers import LlamaConfig

        say(f"{folder.name} …")
        torch.manual_seed(0)
        tensors: Tensors = {"model.norm.weight": torch.ones(self.hidden).half()}
        tensors["model.embed_tokens.weight"] = (torch.randn(self.vocab, self.hidden) * 0.05).half()
        for layer in range(self.layers):
            start = f"model.layers.{layer}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{start}.{name}.weight"] = torch.ones(self.hidden).half()
            for name, (inputs, outputs) in self.linears().items():
                tensors |= weight(f"{start}.{name}", inputs, outputs)
        config = LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.inner,
            vocab_size=self.vocab,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"],
            dtype="float16",
        )
        return write_plain(folder, tensors, config.to_dict() | more)


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 9, 3, 1536, 49152, 64, 1.2),
    Shape("Llama 7B, 4 layers", 4, 4096, 32, 32, 11008, SMALL_VOCAB, 128, 1.35),
)


@dataclass(frozen=True)
class Version:
    """A shape in one runtime."""

    shape: str
    runtime: str
    """ "lowmem" or "llama.cpp"."""
    head: str
    """ "16-bit head" or "8-bit head"; llama.cpp's own recipe counts as the latter."""

    @property
    def label(self) -> str:
        """Unique in a record."""
        return f"{self.shape}, {self.runtime}, {self.head}"


HEADS = {"16-bit head": ("gptq", "F16"), "8-bit head": ("gptq-head8", None)}
"""By head: lowmem_worker's method, and llama.cpp's type of embedding and head (None: its recipe's)."""


@dataclass(frozen=True)
class Timing:
    """Seconds a token at CONTEXT tokens: one value a round, the median of its steps."""

    version: Version
    seconds: Repeated


@dataclass(frozen=True)
class LlamaRecord:
    """`pace_llama.json`."""

    origin: Origin
    threads: int
    rounds: int
    llama: str
    """The version of llama-cpp-python."""
    models: tuple[RuntimeFacts, ...]
    timings: tuple[Timing, ...]

    def timing(self, shape: str, runtime: str, head: str) -> Timing | None:
        """The timing of a version, or None."""
        return next((t for t in self.timings if t.version == Version(shape, runtime, head)), None)


def render(record: LlamaRecord) -> str:
    """The table, and what it was measured with."""
    rows = []
    for shape in SHAPES:
        for head in HEADS:
            ours, theirs = (record.timing(shape.name, runtime, head) for runtime in ("lowmem", "llama.cpp"))
            if ours is None or theirs is None:
                continue
            pairs = zip(theirs.seconds.values, ours.seconds.values, strict=False)
            ratios = repeated([a / b for a, b in pairs])
            word = "met" if ratios.median >= shape.goal else "missed"
            times = [spread([1e3 * value for value in t.seconds.values]) for t in (ours, theirs)]
            rows.append(
                (
                    f"{shape.name}, {head}",
                    *times,
                    spread(ratios.values, "{:.2f} ×"),
                    f"≥ {shape.goal} ×: {word}",
                )
            )
    heads = (f"decode at {CONTEXT}, ms a token", "lowmem 4-bit", "llama.cpp Q4_0", "times as fast", "goal")
    failed = [f"{facts.label}: {facts.failure}" for facts in record.models if facts.failure]
    made = made_with(record.origin, [("llama-cpp-python", record.llama)])
    return "\n\n".join([table(heads, rows), *failed, f"{made} {record.threads} threads."])


LLAMA = Experiment("pace.llama", LlamaRecord, RESULTS / "pace_llama.json", render)


def measure(args: Any, words: Sequence[str]) -> LlamaRecord:
    """Write missing models and time all of them. Raises LowmemError for what the user can correct."""
    peers = find_peers(args.llama_python)
    if "llama.cpp" not in peers.names:
        raise OutputError("llama.cpp is not installed", "pip install llama-cpp-python, and --llama-python")
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    origin = origin_here("pace.llama", words, "Llama models of made-up weights")
    facts: list[RuntimeFacts] = []
    timings: list[Timing] = []
    for shape in SHAPES:
        heads = [head for head in HEADS if head == "16-bit head" or shape.vocab > SMALL_VOCAB]
        openers: dict[Version, Callable[[], Worker]] = {}
        for head in heads:
            openers[Version(shape.name, "lowmem", head)] = _ours(shape, head, args)
            openers[Version(shape.name, "llama.cpp", head)] = _theirs(shape, head, args, peers.llama)
        request = {"what": "decode", "context": CONTEXT, "tokens": STEPS}
        by_label = {version.label: version for version in openers}
        with Turns({version.label: opener for version, opener in openers.items()}, [request]) as turns:
            for label, found in turns.ask(shape.name, args.rounds, request).items():
                seconds = repeated([median(one["decode"]["seconds"]) for one in found])
                timings.append(Timing(by_label[label], seconds))
            facts += turns.facts.values()
    return LlamaRecord(origin, args.threads, args.rounds, peers.llama_version(), tuple(facts), tuple(timings))


def _centred(weight: Weight) -> Weight:
    """The same linears with a mean of 0: the integer 0 becomes 8, which is the zero-point.

    Otherwise all weights share an offset, which in thin models outweighs the rest: 30 layers then amplify
    rounding until the first native step differs from the eager one and is refused.
    """

    def centred(name: str, inputs: int, outputs: int) -> Tensors:
        tensors = weight(name, inputs, outputs)
        words = tensors[f"{name}.qweight"]
        filled = (words | words >> 1 | words >> 2 | words >> 3) & 0x11111111  # lowest bit of each integer
        tensors[f"{name}.qweight"] = words | ((filled ^ 0x11111111) << 3)
        return tensors

    return centred


def _stem(shape: Shape) -> str:
    return shape.name.split(",")[0].replace(" ", "-").lower()


def _ours(shape: Shape, head: str, args: Any) -> Callable[[], Worker]:
    weight, config = packed_weights(BITS, shape.group)
    folder = shape.write(args.work / f"{_stem(shape)}-packed", _centred(weight), config)
    command = lowmem_command(HEADS[head][0], folder, CONTEXT + ROOM, args.threads)
    return partial(Worker, command, args.work / f"{folder.name}-{HEADS[head][0]}.log", args.threads)


def _theirs(shape: Shape, head: str, args: Any, python: str) -> Callable[[], Worker]:
    """Raises OutputError where llama.cpp refuses."""
    embedding = HEADS[head][1]
    file: Path = args.work / f"{_stem(shape)}-{embedding or 'own'}.gguf"
    if not file.is_file():
        from lowmem.export.export import export

        dense = args.work / f"{_stem(shape)}-source.gguf"
        if not dense.is_file():
            export(str(shape.write(args.work / f"{_stem(shape)}-source", dense_weight, {})), dense)
        say(f"{file.name} …")
        report, log = file.with_suffix(".json"), file.with_suffix(".log")
        command = [*quantize_command(python, dense, file, "Q4_0", embedding), "--report", str(report)]
        with log.open("wb") as stream:
            if subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode:
                raise OutputError(f"llama.cpp cannot make {file.name}", f"See {log}")
    command = llama_command(python, file, CONTEXT + ROOM, args.threads)
    return partial(Worker, command, args.work / f"{file.name}.worker.log", args.threads)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = LLAMA.parser(__doc__)
    add_timing_options(parser, WORK, rounds=8)
    args = parser.parse_args(words)
    return LLAMA.run(args, lambda: measure(args, words))


if __name__ == "__main__":
    raise SystemExit(main())
