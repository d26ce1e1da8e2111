"""How close decoding comes to the memory bandwidth, and to llama.cpp, at StarChat Alpha's dimensions.

    python -m lowmem.benchmarks.experiments.pace --llama-python PYTHON    all of it; writes results/pace.json
    python -m lowmem.benchmarks.experiments.pace --only decode,share      some of it
    python -m lowmem.benchmarks.experiments.pace --show                   the committed measurement as tables

Each runtime is a process; all processes of a group are open at once and measured in turns, so that a ratio
compares the same second: other users of the machine change its bandwidth. The bytes that a decode step reads
are counted from the model, and a tuned loop in the same process measures the bandwidth. Models are made up
(`models.py`) and kept in --work: 24 GB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.experiments.common import (
    RESULTS,
    Experiment,
    add_timing_options,
    origin_here,
    repeated,
    say,
)
from lowmem.benchmarks.experiments.pace.load import Load, measure_loads
from lowmem.benchmarks.experiments.pace.models import (
    PaceModel,
    llama_models,
    make_llama,
    make_ours,
    other_models,
    our_models,
)
from lowmem.benchmarks.experiments.pace.record import BESIDE, PaceRecord, Share, Timing
from lowmem.benchmarks.experiments.pace.table import render
from lowmem.benchmarks.experiments.workers.interpreters import Peers, find_peers
from lowmem.benchmarks.experiments.workers.turns import (
    RuntimeFacts,
    Turns,
    Worker,
    llama_command,
    lowmem_command,
)

PACE = Experiment("pace", PaceRecord, RESULTS / "pace.json", render)
WORK = Path(tempfile.gettempdir()) / "lowmem-pace"
PARTS = ("decode", "prefill", "rows", "share", "long", "load")
SHORT, LONG, STEPS = 512, 8128, 8
ROOM = 64
"""Tokens beside the context that a KV cache has room for; StarChat has 8192 positions."""
DECODE_TURNS = 4
"""Rounds of decoding for one round of anything else: they are short."""
LONG_KINDS = ("4-bit g128", "Q4_0")
ROWS_KINDS = ("8-bit g128", "4-bit g128", "3-bit g64", "2-bit g32", "Q4_0", "Q8_0")
LOADED = ("4-bit g128", "16-bit")
"""Kind and head of the model whose load is timed."""


class Group:
    """Models whose workers are open at once, and what was measured of them."""

    def __init__(self, models: Sequence[PaceModel], args: argparse.Namespace, peers: Peers) -> None:
        self._models, self._args, self._peers = models, args, peers
        self._stack = ExitStack()
        self._bytes: dict[str, dict[str, int]] = {}
        self.timings: list[Timing] = []
        self.shares: list[Share] = []

    def __enter__(self) -> Group:
        """Open all; each prefills and decodes once, so that nothing is allocated in a timed round."""
        warm_up = (
            {"what": "prefill", "tokens": SHORT},
            {"what": "decode", "context": SHORT, "tokens": 4},
        )
        openers: dict[str, Callable[[], Worker]] = {m.label: partial(self._open, m) for m in self._models}
        self._turns = self._stack.enter_context(Turns(openers, warm_up))
        for model in self._models:
            if (worker := self._turns.workers.get(model.label)) is not None:
                if model.runtime == "lowmem":
                    self._bytes[model.label] = worker.ask({"what": "bytes", "context": SHORT})
                elif model.runtime == "llama.cpp":
                    self._bytes[model.label] = gguf_bytes(model.path, SHORT)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def facts(self, models: Sequence[PaceModel]) -> list[RuntimeFacts]:
        """The facts of these models, with the bytes that a step reads."""
        return [
            replace(self._turns.facts[m.label], bytes=tuple(self._bytes.get(m.label, {}).items()))
            for m in models
        ]

    def labels(self, kinds: Collection[str] | None = None, runtime: str | None = None) -> list[str]:
        """The labels of the models of these kinds and of this runtime."""
        return [
            m.label
            for m in self._models
            if (kinds is None or m.kind in kinds) and runtime in (None, m.runtime)
        ]

    def decode(self, context: int, rounds: int, labels: Collection[str] | None = None) -> None:
        """Measure the decode time per token with `context` tokens in the KV cache."""
        request = {"what": "decode", "context": context, "tokens": STEPS}
        for label, found in self._turns.ask(f"decode at {context}", rounds, request, labels=labels).items():
            seconds = repeated([median(one["decode"]["seconds"]) for one in found])
            nbytes = self.bytes_of(label, context + STEPS // 2)
            self.timings.append(Timing(label, f"decode {context}", 1, seconds, nbytes))

    def prefill(self, rounds: int) -> None:
        """Time a prompt."""
        request = {"what": "prefill", "tokens": SHORT}
        for label, found in self._turns.ask("prefill", rounds, request).items():
            seconds = repeated([one["prefill"]["seconds"] for one in found])
            self.timings.append(Timing(label, f"prefill {SHORT}", SHORT, seconds, 0))

    def rows(self, rounds: int) -> None:
        """Time steps of one row and of four."""
        request = {"what": "rows", "context": SHORT, "rows": 4, "steps": STEPS}
        for label, found in self._turns.ask("rows", rounds, request, labels=self.labels(ROWS_KINDS)).items():
            for what, key, count in (("1 row", "one", 1), ("4 rows", "many", 4)):
                seconds = repeated([median(one["rows"][key]) for one in found])
                self.timings.append(Timing(label, what, count, seconds, 0))

    def share(self, rounds: int, labels: Collection[str]) -> None:
        """Decode between reads of the weights."""
        request = {"what": "share", "context": SHORT, "steps": 4, "batches": 4}
        for label, found in self._turns.ask("share", rounds, request, labels=labels).items():
            batches = [batch for one in found for batch in one["share"]["batches"]]
            data = {"model": label, "context": SHORT, "bytes": found[0]["share"]["bytes"], "batches": batches}
            self.shares.append(from_json(Share, data))

    def bytes_of(self, label: str, context: int) -> int:
        """What a step of this model reads at a context."""
        nbytes = self._bytes.get(label, {"kv": 0})  # other libraries' steps are not counted
        return sum(nbytes.values()) - nbytes["kv"] + nbytes["kv"] * context // SHORT

    def _open(self, model: PaceModel) -> Worker:
        context = (LONG if "long" in self._args.only else SHORT) + ROOM
        if model.runtime == "llama.cpp":
            command = llama_command(self._peers.llama, model.path, context, self._args.threads)
        else:
            command = lowmem_command(model.method, model.path, context, self._args.threads)
        return Worker(command, self._args.work / f"{model.path.name}.log", self._args.threads)


def gguf_bytes(file: Path, context: int) -> dict[str, int]:
    """Bytes that a step reads of a GGUF of gpt_bigcode with one KV head, its KV cache in float16."""
    from lowmem.checkpoint.headers.gguf import read_gguf_header

    tensors = read_gguf_header(file).tensors
    layers = {name: t for name, t in tensors.items() if name.startswith("blk.")}
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    matrices = [t for t in layers.values() if len(t.shape) == 2]
    inner = next(t for name, t in layers.items() if name.endswith("attn_qkv.weight"))
    kv_width = inner.shape[0] - inner.shape[1]  # keys and values together
    count = len({name.split(".")[1] for name in layers})
    return {
        "packed": sum(t.nbytes for t in matrices),
        "head": tensors[head].nbytes,
        "vectors": sum(t.nbytes for t in layers.values() if len(t.shape) == 1),
        "kv": count * kv_width * 2 * context,
    }


def measure_small(
    models: Sequence[PaceModel], args: argparse.Namespace, peers: Peers
) -> tuple[list[RuntimeFacts], Group]:
    """Everything that --only names of the models with small heads."""
    small, only = [model for model in models if model.head == "small"], args.only
    with Group(small, args, peers) as group:
        if "decode" in only:
            group.decode(SHORT, args.rounds * DECODE_TURNS)
        if "prefill" in only:
            group.prefill(args.rounds)
        if "rows" in only:
            group.rows(args.rounds)
        if "share" in only:
            group.share(args.rounds, group.labels(runtime="lowmem"))
        if "long" in only:
            group.decode(LONG, args.rounds, group.labels(LONG_KINDS))
        return group.facts(small), group


def measure_whole(
    models: Sequence[PaceModel], args: argparse.Namespace, peers: Peers
) -> tuple[list[RuntimeFacts], Group]:
    """Decoding with the whole vocabulary, beside the same models with small heads."""
    whole = [model for model in models if model.head != "small"]
    kinds = {(model.runtime, model.kind) for model in whole}
    small = [model for model in models if model.head == "small" and (model.runtime, model.kind) in kinds]
    if not {"decode", "share"} & set(args.only):
        whole, small = [], []
    with Group([*small, *whole], args, peers) as group:
        if "decode" in args.only and whole:
            group.decode(SHORT, args.rounds * DECODE_TURNS)
            beside = {model.label for model in small}
            group.timings = [replace(t, what=BESIDE) if t.model in beside else t for t in group.timings]
        if "share" in args.only and whole:
            group.share(args.rounds, [m.label for m in whole if m.runtime == "lowmem"])
        return group.facts(whole), group


def measure(args: argparse.Namespace, words: Sequence[str]) -> PaceRecord:
    """Measure what the options name. Raises LowmemError for what the user can correct."""
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    peers = find_peers(args.llama_python)
    name = f"StarChat Alpha's dimensions, {args.layers} layers, made-up weights"
    origin = origin_here("pace", words, name)
    facts: list[RuntimeFacts] = []
    timings: list[Timing] = []
    shares: list[Share] = []
    if set(args.only) - {"load"}:
        models = _made(args, peers)
        for part in (measure_small, measure_whole):
            found, group = part(models, args, peers)
            facts, timings, shares = facts + found, timings + group.timings, shares + group.shares
    loads: list[Load] = []
    for layers in sorted({args.layers, args.load_layers}) if "load" in args.only else ():
        folder = args.work / f"{layers}-layers"
        loaded = [model for model in our_models(folder) if (model.kind, model.head) == LOADED]
        make_ours(loaded, folder, layers)
        loads += measure_loads(loaded[0].path, args.rounds, args.threads, args.work / "load.log")
    return PaceRecord(
        origin, args.layers, args.threads, args.rounds, peers.llama_version(), tuple(facts), tuple(timings),
        tuple(shares), tuple(loads),
    )  # fmt: skip


def _made(args: argparse.Namespace, peers: Peers) -> list[PaceModel]:
    """The models that --models names, written where they are missing."""
    folder = args.work / f"{args.layers}-layers"
    models = [*our_models(folder), *other_models(folder, peers.names)]
    if "llama.cpp" in peers.names:
        models += llama_models(folder)
    else:
        say("llama.cpp is left out: pip install llama-cpp-python, and --llama-python PYTHON")
    wanted = [m for m in models if args.models is None or any(word in m.label for word in args.models)]
    make_ours(wanted, folder, args.layers)
    make_llama(wanted, folder, args.layers, peers.llama)
    return wanted


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(PARTS)}")
    return names


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = PACE.parser(__doc__)
    add = found.add_argument

    def words_of(text: str) -> list[str]:
        return text.split(",")

    add_timing_options(found, WORK, rounds=5)
    add("--only", type=_parts, default=PARTS, metavar="LIST", help=f"of {','.join(PARTS)} (all)")
    add("--models", type=words_of, metavar="LIST", help="those whose names contain one of these: 4-bit,Q4_0")
    add("--layers", type=int, default=4, metavar="N", help="of the models (%(default)s)")
    add("--load-layers", type=int, default=40, metavar="N",
        help="of a second model whose load is timed: 8.6 GB with StarChat's 40 (%(default)s)")  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    return PACE.run(args, lambda: measure(args, words))


if __name__ == "__main__":
    raise SystemExit(main())
