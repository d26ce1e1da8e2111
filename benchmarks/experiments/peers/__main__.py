"""lowmem beside GPTQModel, AutoRound, bitsandbytes and llama.cpp: same weights, same texts, one run.

    python -m lowmem.benchmarks.experiments.peers               the embedded model; writes results/peers.json
    python -m lowmem.benchmarks.experiments.peers --shaped 4    also speed at StarChat Alpha's dimensions
    python -m lowmem.benchmarks.experiments.peers --show        the committed measurement as tables

Every converter gets the same rows of calibration tokens, every version the same rows of text. Quality: KL
divergence of float32 logits from the source's, beside all stored bits of the linears. Speed: prefill and
decode in each version's own runtime, in turns, so that all see the same machine. A peer may be installed in
an environment of its own; a missing peer is left out, and a failure is shown with its reason. Finished steps
are kept in --work, so an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median

import psutil
from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, origin_here, repeated, say
from lowmem.benchmarks.experiments.peers.record import (
    PeersRecord,
    RuntimeSpeed,
    SpeedTable,
    Version,
    all_versions,
    timed_versions,
)
from lowmem.benchmarks.experiments.peers.run import STEPS, Run, StepError, convert, measure_versions
from lowmem.benchmarks.experiments.peers.table import render
from lowmem.benchmarks.experiments.starchat.dimensions import WIDTHS
from lowmem.benchmarks.experiments.workers.interpreters import find_peers
from lowmem.benchmarks.experiments.workers.turns import (
    RuntimeFacts,
    Turns,
    Worker,
    llama_command,
    lowmem_command,
)

from lowmem.errors import OutputError

PEERS = Experiment("peers", PeersRecord, RESULTS / "peers.json", render)
WORK = Path(tempfile.gettempdir()) / "lowmem-peers"


def compare(args: argparse.Namespace, words: Sequence[str]) -> PeersRecord:
    """Measure what the options name. Raises LowmemError for what the user can correct."""
    found = find_peers(args.llama_python, args.autoround_python)
    for line in found.left_out:
        say(line)
    # Processes run in the work folder.
    source = str(embedded_model() if args.model is None else Path(args.model).expanduser().resolve())
    run = Run(source, args.work.resolve(), found, args.iterations, args.only, args.threads)
    run.begin(args.again)
    prepared = run.prepare()
    origin = origin_here("peers", words, shown(source), prepared.fingerprint)
    versions = measure_versions(run, all_versions(found.names, prepared.dtype)) if args.quality else ()
    tables: list[SpeedTable] = []
    if args.speed:
        timing = SpeedTable(
            Path(source).name, args.prompt_tokens, args.new_tokens, args.threads, args.rounds,
            args.most_seconds, (),
        )  # fmt: skip
        tables.append(measure_speed(run, timing))
        for layers in args.shaped:
            name = f"StarChat Alpha's dimensions, {layers} layer{'s' if layers > 1 else ''}"
            tables.append(measure_speed(shaped_run(run, layers), replace(timing, model=name)))
    return PeersRecord(
        origin, prepared.calibration, args.iterations, run.peer_versions(), found.left_out, versions,
        tuple(tables),
    )  # fmt: skip


def shown(source: str) -> str:
    """A source without the folders of one machine."""
    path = Path(source).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def shaped_run(run: Run, layers: int) -> Run:
    """The same with StarChat Alpha's dimensions and made-up weights; only llama.cpp converts any."""
    work = run.work / f"shaped-{layers}"
    work.mkdir(exist_ok=True)
    if not (work / "prepared.json").is_file():
        say(f"StarChat Alpha's dimensions with {layers} layers, and made-up weights …")
        try:
            run.process([*STEPS, "shape", str(layers), "--work", str(work)], f"shaped-{layers}")
        except StepError as error:
            raise OutputError(f"the model cannot be made: {error}", f"See {work}") from error
    packed = tuple((bits, work / f"packed-{bits}") for bits, _ in WIDTHS)
    return replace(run, source=str(work / "source"), work=work, packed=packed)


def measure_speed(run: Run, timing: SpeedTable) -> SpeedTable:
    """Time all wanted versions in turns, or return the kept result. timing: a table without runtimes."""
    wanted = timed_versions(run.peers.names, run.prepare().dtype)
    versions = [version for version in wanted if run.wants(version)]
    settings = {"timing": asdict(timing), "versions": [version.key for version in versions]}
    kept = run.kept("speed")
    if kept is not None and kept["settings"] == settings:
        table: SpeedTable = from_json(SpeedTable, kept["table"])
        return table
    failures: dict[str, str] = {}
    for version in versions:
        try:
            convert(run, version)
        except StepError as error:
            failures[version.label] = str(error)
    openers: dict[str, Callable[[], Worker]] = {
        version.label: partial(_worker, run, version, timing)
        for version in versions
        if version.label not in failures
    }
    requests = (
        {"what": "prefill", "tokens": timing.prompt_tokens},
        {"what": "decode", "context": timing.prompt_tokens, "tokens": timing.new_tokens,
         "most_seconds": timing.most_seconds},
    )  # fmt: skip
    with Turns(openers, requests, keep_open=_fit_together(run, len(openers))) as turns:
        answers = turns.ask("speed", timing.rounds, *requests)
    runtimes = []
    for label in (version.label for version in versions):
        facts = turns.facts.get(label, RuntimeFacts(label, failure=failures.get(label, "")))
        found = answers.get(label, [])
        rates = [timing.prompt_tokens / answer["prefill"]["seconds"] for answer in found]
        steps = [median(answer["decode"]["seconds"]) for answer in found]
        runtimes.append(
            RuntimeSpeed(facts, repeated(rates) if rates else None, repeated(steps) if steps else None)
        )
    table = replace(timing, runtimes=tuple(runtimes))
    run.keep("speed", {"settings": settings, "table": asdict(table)})
    return table


def _worker(run: Run, version: Version, timing: SpeedTable) -> Worker:
    """A process that holds the version in its own runtime."""
    path, context = run.path_of(version), timing.prompt_tokens + timing.new_tokens + 1
    if version.peer == "llama.cpp":
        command = llama_command(run.peers.llama, path, context, run.threads)
    else:
        method = "gptqmodel" if version.peer == "GPTQModel" else version.method
        command = lowmem_command(method, path, context, run.threads)
    return Worker(command, run.work / f"{version.key}.speed.log", run.threads)


def _fit_together(run: Run, count: int) -> bool:
    """Whether all runtimes fit in memory at once, at two copies of the weights and 1 GiB each."""
    weights = sum(file.stat().st_size for file in Path(run.source).glob("*.safetensors"))
    return bool(count * (2 * weights + (1 << 30)) < psutil.virtual_memory().available)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = PEERS.parser(__doc__)
    add = parser.add_argument

    def words_of(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    add("model", nargs="?", help="an unquantized model (the embedded one)")
    add("--work", type=Path, default=WORK, metavar="DIR", help="where steps are kept (%(default)s)")
    add("--again", action="append", default=[], metavar="NAME",
        help="repeat the finished steps whose names begin with NAME: lowmem, gptqmodel-4, speed")  # fmt: skip
    add("--only", type=words_of, metavar="LIST", help="versions whose names begin so: lowmem,llama-Q4")
    add("--llama-python", metavar="PYTHON", help="the interpreter that has llama-cpp-python")
    add("--autoround-python", metavar="PYTHON", help="the interpreter that has auto-round")
    add("--iterations", type=int, default=200, metavar="N", help="of AutoRound (%(default)s, its default)")
    add("--no-quality", dest="quality", action="store_false", help="measure only speed")
    add("--no-speed", dest="speed", action="store_false", help="measure only quality")
    add("--shaped", type=int, action="append", default=[], metavar="LAYERS",
        help="also time StarChat Alpha's dimensions with this many layers")  # fmt: skip
    add("--rounds", type=int, default=5, metavar="N", help="of timing (%(default)s)")
    add("--threads", type=int, default=2, metavar="N", help="of timed runtimes (%(default)s)")
    add("--prompt-tokens", type=int, default=512, metavar="N", help="of a prefill (%(default)s)")
    add("--new-tokens", type=int, default=64, metavar="N", help="of a decode (%(default)s)")
    add("--most-seconds", type=float, default=20, metavar="S",
        help="a round's decoding stops after this time (%(default)s)")  # fmt: skip
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peers must not look for a folder on the hub
    try:
        return PEERS.run(args, lambda: compare(args, words))
    except KeyboardInterrupt:
        say(f"interrupted; finished steps are kept in {args.work}")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
