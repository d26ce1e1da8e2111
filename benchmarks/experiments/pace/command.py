"""How close to the memory's pace: StarChat Alpha's dimensions, four layers, ours and llama.cpp's in turns.

    python -m lowmem.benchmarks.experiments.pace.command --llama-python PYTHON        all of it; writes results/pace.json
    python -m lowmem.benchmarks.experiments.pace.command --only decode,share          some of it
    python -m lowmem.benchmarks.experiments.pace.command --linears                    single linears, without any model
    python -m lowmem.benchmarks.experiments.pace.command --show                       the committed measurement as tables

Each runtime is a process; all of a group are open at once and asked one after another, in another order each
round, so that a ratio is one of the same second: what the memory allows changes with the neighbours. What a
step of decoding reads is counted from the model, and the bandwidth beside it is read by a tuned loop in the
same process. Models are made up (see pace_models) and kept in --work: 24 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.record_file import from_json, read, write
from lowmem.benchmarks.experiments.pace.load import Load
from lowmem.benchmarks.experiments.pace.models import (
    PaceModel,
    llama_models,
    make_llama,
    make_ours,
    our_models,
)
from lowmem.benchmarks.experiments.pace.record import BESIDE, ModelFacts, PaceRecord, Share, Timing, repeated
from lowmem.benchmarks.experiments.peers.command import typed_command
from lowmem.benchmarks.experiments.peers.run import Peers, find_peers, say
from lowmem.benchmarks.experiments.peers.worker import Worker, WorkerError

from lowmem.errors import LowmemError

Wanted = Callable[[PaceModel], bool]
RESULTS = ROOT / "benchmarks" / "results" / "pace.json"
WORK = Path(tempfile.gettempdir()) / "lowmem-pace"
PARTS = ("decode", "prefill", "rows", "share", "long", "load", "linears")
SHORT, LONG, STEPS = 512, 8128, 8
ROOM = 64  # StarChat has 8192 positions
"""Tokens beside the long context that a cache has room for."""
DECODE_TURNS = 4
"""Rounds of decoding to one of the others: they are short."""
SETTLE_SECONDS = 0.15
"""Between two runtimes: threads of the last one still spin for a moment."""
LONG_KINDS = ("4-bit g128", "Q4_0")
LOADED = ("4-bit g128", "16-bit")
"""Kind and head of the model whose load is timed."""
ROWS_KINDS = ("8-bit g128", "4-bit g128", "3-bit g64", "2-bit g32", "Q4_0", "Q8_0")


class Group:
    """Models whose workers are open at once."""

    def __init__(self, models: Sequence[PaceModel], args: argparse.Namespace, peers: Peers) -> None:
        self._models, self._args, self._peers = models, args, peers
        self._stack = ExitStack()
        self._workers: dict[str, Worker] = {}
        self.facts: dict[str, ModelFacts] = {}

    def __enter__(self) -> Group:
        """Open all; each prefills once, so that nothing is made in a round that is timed."""
        for model in self._models:
            say(f"{model.label} …")
            try:
                log = self._args.work / f"{model.path.name}.log"
                worker = Worker(self._command(model), log, self._threads())
                self._stack.callback(worker.close)
                worker.ask(json.dumps({"what": "prefill", "tokens": SHORT}))
                worker.ask(json.dumps({"what": "decode", "context": SHORT, "tokens": 4}))
            except WorkerError as error:
                self.facts[model.label] = ModelFacts(model.label, "", 0.0, (), str(error))
                say(f"    failed: {error}")
                continue
            self._workers[model.label] = worker
            nbytes = self._bytes(model, worker)
            started = worker.started
            self.facts[model.label] = ModelFacts(
                model.label, started.kernel, round(started.load_seconds, 3), tuple(nbytes.items())
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def turns(
        self, what: str, rounds: int, request: dict[str, Any], wanted: Wanted | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        """Ask every wanted model once a round, another one first each time: the answers by label."""
        labels = [m.label for m in self._models if m.label in self._workers and (wanted is None or wanted(m))]
        found: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
        for number in range(rounds):
            say(f"{what}: round {number + 1} of {rounds} …")
            turn = number % max(1, len(labels))
            for label in labels[turn:] + labels[:turn]:
                if label not in self._workers:
                    continue
                time.sleep(SETTLE_SECONDS)
                try:
                    found[label].append(self._workers[label].ask(json.dumps(request)))
                except WorkerError as error:
                    del self._workers[label]
                    self.facts[label] = dataclasses.replace(self.facts[label], failure=str(error))
                    say(f"    {label} failed: {error}")
        return {label: answers for label, answers in found.items() if answers}

    def bytes_of(self, label: str, context: int) -> int:
        """What a step of this model reads at a context."""
        nbytes = dict(self.facts[label].bytes)
        return sum(n for name, n in nbytes.items() if name != "kv") + nbytes["kv"] * context // SHORT

    def _command(self, model: PaceModel) -> list[str]:
        ours = model.runtime == "lowmem"
        python, module = (sys.executable, "pace_worker") if ours else (self._peers.llama, "pace_llama")
        context = LONG + ROOM if "long" in self._args.only else SHORT + ROOM
        return [
            python, "-m", f"lowmem.benchmarks.experiments.pace.{module}", str(model.path.resolve()), str(context),
            str(self._args.threads),
        ]  # fmt: skip

    def _threads(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self._args.threads)}

    def _bytes(self, model: PaceModel, worker: Worker) -> dict[str, int]:
        if model.runtime == "lowmem":
            found = worker.ask(json.dumps({"what": "bytes", "context": SHORT}))
            return {name: nbytes for name, nbytes in found.items() if name != "total"}
        return gguf_bytes(model.path, SHORT)


def gguf_bytes(file: Path, context: int) -> dict[str, int]:
    """Bytes that a step reads of a GGUF of gpt_bigcode with one KV head, its cache in float16."""
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


# --- the parts ---------------------------------------------------------------------------------------------


def measure_group(
    models: Sequence[PaceModel], args: argparse.Namespace, peers: Peers
) -> tuple[list[ModelFacts], list[Timing], list[Share]]:
    """Everything that is wanted of models with small heads, which are open at once."""
    only, rounds = args.only, args.rounds
    timings: list[Timing] = []
    shares: list[Share] = []
    with Group(models, args, peers) as group:
        if "decode" in only:
            timings += decode(group, SHORT, rounds * DECODE_TURNS)
        if "prefill" in only:
            request = {"what": "prefill", "tokens": SHORT}
            for label, found in group.turns("prefill", rounds, request).items():
                seconds = repeated([one["seconds"] for one in found])
                timings.append(Timing(label, f"prefill {SHORT}", SHORT, seconds))
        if "rows" in only:
            request = {"what": "rows", "context": SHORT, "rows": 4, "steps": STEPS}
            for label, found in group.turns("rows", rounds, request, lambda m: m.kind in ROWS_KINDS).items():
                for what, key in (("1 row", "one"), ("4 rows", "many")):
                    seconds = repeated([median(one[key]) for one in found])
                    timings.append(Timing(label, what, 1 if key == "one" else 4, seconds))
        if "share" in only:
            shares += share(group, rounds, lambda m: m.runtime == "lowmem")
        if "long" in only:
            timings += decode(group, LONG, rounds, lambda m: m.kind in LONG_KINDS)
        return list(group.facts.values()), timings, shares


def measure_heads(
    models: Sequence[PaceModel], args: argparse.Namespace, peers: Peers
) -> tuple[list[ModelFacts], list[Timing], list[Share]]:
    """Decoding with the whole vocabulary, beside the same models with small heads."""
    whole = [model for model in models if model.head != "small"]
    kinds = {(model.runtime, model.kind) for model in whole}
    small = [model for model in models if model.head == "small" and (model.runtime, model.kind) in kinds]
    if not whole or not {"decode", "share"} & set(args.only):
        return [], [], []
    timings: list[Timing] = []
    shares: list[Share] = []
    with Group([*small, *whole], args, peers) as group:
        if "decode" in args.only:
            labels = {model.label for model in small}
            for timing in decode(group, SHORT, args.rounds * DECODE_TURNS):
                what = BESIDE if timing.model in labels else timing.what
                timings.append(dataclasses.replace(timing, what=what))
        if "share" in args.only:
            shares += share(group, args.rounds, lambda m: m.runtime == "lowmem" and m in whole)
        return [group.facts[model.label] for model in whole], timings, shares


def decode(group: Group, context: int, rounds: int, wanted: Wanted | None = None) -> list[Timing]:
    """Seconds a token after a context."""
    request = {"what": "decode", "context": context, "tokens": STEPS}
    timings = []
    for label, found in group.turns(f"decode at {context}", rounds, request, wanted).items():
        seconds = repeated([median(one["seconds"]) for one in found])
        nbytes = group.bytes_of(label, context + STEPS // 2)
        timings.append(Timing(label, f"decode {context}", 1, seconds, nbytes))
    return timings


def share(group: Group, rounds: int, wanted: Wanted) -> list[Share]:
    """Decoding between reads."""
    request = {"what": "share", "context": SHORT, "steps": 4, "batches": 4}
    shares = []
    for label, found in group.turns("share", rounds, request, wanted).items():
        batches = [batch for one in found for batch in one["batches"]]
        data = {"model": label, "context": SHORT, "bytes": found[0]["bytes"], "batches": batches}
        shares.append(from_json(Share, data))
    return shares


def measure_loads(folder: Path, args: argparse.Namespace) -> list[Load]:
    """Loads in processes of their own, after one that warms the page cache."""
    found = []
    for number in range(args.rounds + 1):
        say(f"load: {number} of {args.rounds} …")
        command = [
            sys.executable,
            "-m",
            "lowmem.benchmarks.experiments.pace.load",
            str(folder),
            str(args.threads),
        ]
        began = [str(time.time())]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
        with (args.work / "load.log").open("wb") as log:
            answer = subprocess.run(
                [*command, *began], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, check=True
            ).stdout  # fmt: skip
        found.append(from_json(Load, json.loads(answer.splitlines()[-1])))
    return found[1:]


def measure(args: argparse.Namespace, argv: Sequence[str]) -> PaceRecord:
    """Measure what is asked for. Raises LowmemError for what the user can mend."""
    from lowmem.benchmarks.common.origin import origin_of
    from lowmem.benchmarks.experiments.pace.linears import measure_all

    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    peers = find_peers(args.llama_python, None)
    origin = dataclasses.replace(
        origin_of((), f"StarChat Alpha's dimensions, {args.layers} layers, made-up weights", ""),
        command=typed_command("lowmem.benchmarks.experiments.pace.command", argv),
    )
    linears = measure_all(args) if "linears" in args.only else ()
    models: list[PaceModel] = []
    if set(args.only) - {"linears"}:
        folder = args.work / f"{args.layers}-layers"
        folder.mkdir(exist_ok=True)
        models = our_models(folder)
        if "llama.cpp" in peers.names:
            models += llama_models(folder)
        else:
            say("llama.cpp is left out: pip install llama-cpp-python, and --llama-python PYTHON")
    wanted = [m for m in models if args.models is None or any(word in m.label for word in args.models)]
    if not set(args.only) - {"linears", "load"}:
        wanted = []
    if models:
        make_ours(wanted, folder, args.layers, say)
        make_llama(wanted, folder, args.layers, peers.llama, os.cpu_count() or 1, say)
    facts: list[ModelFacts] = []
    timings: list[Timing] = []
    shares: list[Share] = []
    small = [model for model in wanted if model.head == "small"]
    for part in partial(measure_group, small), partial(measure_heads, wanted):
        found = part(args, peers) if wanted else ([], [], [])
        facts, timings, shares = facts + found[0], timings + found[1], shares + found[2]
    loads: list[Load] = []
    for layers in sorted({args.layers, args.load_layers}) if "load" in args.only else ():
        folder = args.work / f"{layers}-layers"
        folder.mkdir(exist_ok=True)
        loaded = [model for model in our_models(folder) if (model.kind, model.head) == LOADED]
        make_ours(loaded, folder, layers, say)
        loads += measure_loads(loaded[0].path, args)
    return PaceRecord(
        origin, args.layers, args.threads, args.rounds, _llama_version(peers), tuple(facts), tuple(timings),
        tuple(shares), tuple(loads), tuple(linears),
    )  # fmt: skip


def _llama_version(peers: Peers) -> str:
    if "llama.cpp" not in peers.names:
        return ""
    ask = "from importlib.metadata import version; print(version('llama-cpp-python'))"
    return subprocess.run([peers.llama, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


# --- the command -------------------------------------------------------------------------------------------


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(PARTS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowmem.benchmarks.experiments.pace.command",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--show", action="store_true", help="print the measurement in --out, measure nothing")
    add("--out", type=Path, default=RESULTS, metavar="FILE", help="where the raw figures go")
    add("--work", type=Path, default=WORK, metavar="DIR", help="models are kept there (%(default)s)")
    add("--only", type=_parts, default=PARTS, metavar="LIST", help=f"of {','.join(PARTS)}")
    add("--linears", action="store_true", help="the same as --only linears, on the screen alone")
    add("--models", type=lambda text: text.split(","), metavar="LIST",
        help="those whose names contain one of these, as 4-bit,Q4_0")  # fmt: skip
    add("--widths", type=lambda text: text.split(","), metavar="LIST", help="of linears, as 4,8")
    add("--rows", type=lambda text: [int(word) for word in text.split(",")], metavar="LIST",
        help="of linears, as 1,4")  # fmt: skip
    add("--llama-python", metavar="PYTHON", help="interpreter that has llama-cpp-python")
    add("--layers", type=int, default=4, metavar="N", help="of the models (%(default)s)")
    add("--load-layers", type=int, default=40, metavar="N",
        help="also load a model of so many, 8.6 GB with StarChat's 40 (%(default)s)")  # fmt: skip
    add("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    add("--threads", type=int, default=2, metavar="N", help="(%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write, or show; the exit code."""
    from lowmem.benchmarks.experiments.pace.table import render

    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    if args.linears:
        args.only = ("linears",)
    try:
        record = (
            read(PaceRecord, args.out, "lowmem.benchmarks.experiments.pace.command")
            if args.show
            else measure(args, words)
        )
        if not args.show and not args.linears:
            write(record, args.out)
    except LowmemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
