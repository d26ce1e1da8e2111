"""lowmem beside GPTQModel, AutoRound, bitsandbytes and llama.cpp: same weights, same texts, one run.

    python -m lowmem.benchmarks.experiments.peers.command                     the embedded model; writes results/peers.json
    python -m lowmem.benchmarks.experiments.peers.command --shaped 4          and speed at StarChat Alpha's dimensions, four layers
    python -m lowmem.benchmarks.experiments.peers.command --show              the committed measurement as tables

Every converter gets the same rows of calibration tokens, every form the same rows of text. Quality: float32
logits against the float32 logits of the source, KL divergence beside all stored bits of the linears. Speed:
a prefill and a decode in each form's own runtime, in turns, so that all see the same machine. What a peer
needs may lie in an environment of its own; a peer that is nowhere is left out, and one that fails is in the
table with its reason. Each finished step is kept in --work, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.record_file import read, write
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.peers.forms import PeersRecord, SpeedTable, quality_forms
from lowmem.benchmarks.experiments.peers.run import Run, find_peers, measure_forms, say
from lowmem.benchmarks.experiments.peers.speed import measure_speed, shaped_run
from lowmem.benchmarks.experiments.peers.table import render

from lowmem.errors import LowmemError

RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
WORK = Path(tempfile.gettempdir()) / "lowmem-peers"


def compare(args: argparse.Namespace, argv: Sequence[str]) -> PeersRecord:
    """Measure what is asked for. Raises LowmemError for what the user can mend."""
    from lowmem.benchmarks.common.origin import origin_of

    found = find_peers(args.llama_python, args.autoround_python)
    for line in found.left_out:
        say(line)
    # Processes run in the work folder.
    source = str(embedded_model() if args.model is None else Path(args.model).expanduser().resolve())
    run = Run(source, args.work.resolve(), found, args.iterations, args.only, args.threads)
    run.begin(args.again)
    prepared = run.prepare()
    origin = origin_of((), _shown(source), prepared.fingerprint)
    origin = dataclasses.replace(
        origin, command=typed_command("lowmem.benchmarks.experiments.peers.command", argv)
    )
    forms = measure_forms(run, quality_forms(found.names, prepared.dtype)) if args.quality else ()
    tables: list[SpeedTable] = []
    if args.speed:
        tables.append(measure_speed(run, Path(source).name, args))
        for layers in args.shaped:
            name = f"StarChat Alpha's dimensions, {layers} layer{'s' if layers > 1 else ''}"
            tables.append(measure_speed(shaped_run(run, layers), name, args))
    return PeersRecord(
        origin, prepared.calibration, args.iterations, run.versions(), found.left_out, forms, tuple(tables)
    )


def _shown(source: str) -> str:
    """A source without the folders of one machine."""
    path = Path(source).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def typed_command(module: str, argv: Sequence[str]) -> str:
    """The command that was typed, without paths that mean something on one machine alone."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word.split("=")[0] in ("--llama-python", "--autoround-python", "--work", "--out"):
            skip = "=" not in word
        else:
            kept.append(word)
    return shlex.join(["python", "-m", module, *kept])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowmem.benchmarks.experiments.peers.command",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="an unquantized model (the embedded one)")
    parser.add_argument("--show", action="store_true", help="print the measurement in --out, measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="where the raw figures go")
    parser.add_argument(
        "--work", type=Path, default=WORK, metavar="DIR", help="steps are kept there (%(default)s)"
    )
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        metavar="NAME",
        help="forget the finished steps whose names begin so, as lowmem, llama, gptqmodel-4 or speed",
    )
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), metavar="LIST",
                        help="forms whose names begin so, as lowmem,llama-Q4")  # fmt: skip
    parser.add_argument("--llama-python", metavar="PYTHON", help="interpreter that has llama-cpp-python")
    parser.add_argument("--autoround-python", metavar="PYTHON", help="interpreter that has auto-round")
    parser.add_argument("--iterations", type=int, default=200, metavar="N",
                        help="AutoRound's, its default (%(default)s)")  # fmt: skip
    parser.add_argument("--no-quality", dest="quality", action="store_false", help="speed alone")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="quality alone")
    parser.add_argument("--shaped", type=int, action="append", default=[], metavar="LAYERS",
                        help="also time StarChat Alpha's dimensions with so many layers")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of timing (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of timed runtimes (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="prefill (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="decode (%(default)s)")
    parser.add_argument("--most-seconds", type=float, default=20, metavar="S",
                        help="a round's decoding stops after so long (%(default)s)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write, or show; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    # A folder is a folder: no peer is to look for it on the hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        if not args.show:
            write(compare(args, words), args.out)
        print(render(read(PeersRecord, args.out, "lowmem.benchmarks.experiments.peers.command")))
    except LowmemError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"interrupted; what is finished is kept in {args.work}")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
