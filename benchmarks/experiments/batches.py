"""Several sequences in a step, beside llama.cpp's: tokens/s of all together, and how long a request waits.

    python -m lowmem.benchmarks.experiments.batches --llama-python PYTHON    writes results/batches.json
    python -m lowmem.benchmarks.experiments.batches --show                   the committed record

The models have StarChat Alpha's dimensions, four layers of made-up weights and a small head: ours at 4 bits,
llama.cpp's as Q4_0, its sequences in one batch of its C interface. Both are open at once, and all numbers of
sequences are measured in turns, so that a ratio compares the same minute. Models are kept in --work: 4 GB.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from lowmem.benchmarks.common.records import Origin, Repeated
from lowmem.benchmarks.experiments.common import (
    RESULTS,
    Experiment,
    add_timing_options,
    made_with,
    origin_here,
    repeated,
    spread,
    table,
)
from lowmem.benchmarks.experiments.pace.models import (
    PaceModel,
    llama_models,
    make_llama,
    make_ours,
    our_models,
)
from lowmem.benchmarks.experiments.workers.interpreters import find_peers
from lowmem.benchmarks.experiments.workers.turns import (
    RuntimeFacts,
    Turns,
    Worker,
    llama_command,
    lowmem_command,
)

WORK = Path(tempfile.gettempdir()) / "lowmem-pace"
KINDS = {"lowmem": "4-bit g128", "llama.cpp": "Q4_0"}
TOGETHER = (1, 2, 4, 8)
PROMPT, STEPS, SHORT, LONG = 256, 16, 32, 4000
ROOM = 64
GOALS = ((4, "lowmem", 1, 3.0), (4, "llama.cpp", 4, 1.35))
"""(our sequences, a runtime, its sequences, the least ratio of our tokens/s to its)"""


@dataclass(frozen=True)
class Timing:
    """Tokens/s of all sequences together: one value a round, of the median step."""

    runtime: str
    sequences: int
    rate: Repeated


@dataclass(frozen=True)
class BatchesRecord:
    """`batches.json`."""

    origin: Origin
    threads: int
    rounds: int
    llama: str
    """The version of llama-cpp-python; "" without it."""
    models: tuple[RuntimeFacts, ...]
    timings: tuple[Timing, ...]
    alone: Repeated
    """Seconds to the first token of SHORT tokens."""
    beside: Repeated
    """The same while a prompt of LONG tokens is read."""

    def rates(self, runtime: str, sequences: int) -> tuple[float, ...]:
        """Of each round; () if not measured."""
        found = (t for t in self.timings if (t.runtime, t.sequences) == (runtime, sequences))
        return next((t.rate.values for t in found), ())

    def ratios(self, one: tuple[str, int], other: tuple[str, int]) -> list[float]:
        """Tokens/s of one (runtime, sequences) over those of another, a round each."""
        return [a / b for a, b in zip(self.rates(*one), self.rates(*other), strict=False)]


def render(record: BatchesRecord) -> str:
    """The table, and what it was measured with."""
    rows = []
    for count in TOGETHER:
        cells = [str(count)]
        for runtime in KINDS:
            rates = record.rates(runtime, count)
            gains = record.ratios((runtime, count), (runtime, 1))
            cells += [spread(rates, "{:.1f}"), f"{median(gains):.2f} ×"] if rates else ["", ""]
        ratios = record.ratios(("lowmem", count), ("llama.cpp", count))
        rows.append((*cells, spread(ratios, "{:.2f} ×") if ratios else ""))
    goals = [f"{mine} sequences: {word}." for mine, word in _met(record)]
    heads = ("sequences", "lowmem 4-bit, tokens/s", "of one", "llama.cpp Q4_0", "of one", "times as fast")
    waits = (
        f"First token of a prompt of {SHORT} tokens: {spread(record.alone.values)} s alone, "
        f"{spread(record.beside.values)} s while one of {LONG} tokens is read."
    )
    failed = [f"{facts.label}: {facts.failure}" for facts in record.models if facts.failure]
    made = made_with(record.origin, [("llama-cpp-python", record.llama)] if record.llama else [])
    return "\n\n".join([table(heads, rows), *goals, waits, *failed, f"{made} {record.threads} threads."])


def _met(record: BatchesRecord) -> list[tuple[int, str]]:
    """For each goal that was measured, whether it is met."""
    found = []
    for mine, runtime, count, goal in GOALS:
        if ratios := record.ratios(("lowmem", mine), (runtime, count)):
            word = "met" if median(ratios) >= goal else "missed"
            text = f"{median(ratios):.2f} × of {runtime} with {count}, goal ≥ {goal} ×: {word}"
            found.append((mine, text))
    return found


BATCHES = Experiment("batches", BatchesRecord, RESULTS / "batches.json", render)


def measure(args: Any, words: Sequence[str]) -> BatchesRecord:
    """Write missing models and time all of them. Raises LowmemError for what the user can correct."""
    peers = find_peers(args.llama_python)
    with_llama = "llama.cpp" in peers.names
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    models = [
        model
        for model in [*our_models(args.work), *(llama_models(args.work) if with_llama else [])]
        if model.kind == KINDS[model.runtime] and model.head == "small"
    ]
    make_ours(models, args.work, args.layers)
    make_llama(models, args.work, args.layers, peers.llama)
    origin = origin_here("batches", words, f"made-up weights, {args.layers} layers of StarChat Alpha's")
    openers: dict[str, Callable[[], Worker]] = {
        model.runtime: partial(_open, model, peers.llama, args) for model in models
    }
    requests = [{"what": "together", "sequences": n, "context": PROMPT, "steps": STEPS} for n in TOGETHER]
    found: dict[tuple[str, int], list[float]] = {}
    waits: dict[int, list[float]] = {0: [], LONG: []}
    with Turns(openers, requests[:1]) as turns:
        for _ in range(args.rounds):
            for request in requests:
                count = int(str(request["sequences"]))
                for name, (answer,) in turns.ask(f"{count} together", 1, request).items():
                    step = median(answer["together"]["seconds"])
                    found.setdefault((name, count), []).append(count / step)
            for beside, seconds in waits.items():
                asked = {"what": "first_token", "prompt": SHORT, "beside": beside}
                answers = turns.ask(f"first token beside {beside}", 1, asked, labels=["lowmem"])
                seconds.append(answers["lowmem"][0]["first_token"]["seconds"])
    timings = tuple(Timing(name, count, repeated(rates)) for (name, count), rates in found.items())
    facts = tuple(turns.facts.values())
    rest = (facts, timings, repeated(waits[0]), repeated(waits[LONG]))
    return BatchesRecord(origin, args.threads, args.rounds, peers.llama_version(), *rest)


def _open(model: PaceModel, python: str, args: Any) -> Worker:
    most = max(TOGETHER)
    if model.runtime == "llama.cpp":
        command = llama_command(python, model.path, PROMPT + ROOM, args.threads, most)
    else:
        command = lowmem_command(model.method, model.path, LONG + ROOM, args.threads, most)
    return Worker(command, args.work / f"{model.path.name}.log", args.threads)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = BATCHES.parser(__doc__)
    add_timing_options(parser, WORK, rounds=8)
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="(%(default)s)")
    args = parser.parse_args(words)
    return BATCHES.run(args, lambda: measure(args, words))


if __name__ == "__main__":
    raise SystemExit(main())
