"""Quality against size: mixed widths beside uniform ones, llama.cpp's types and AutoRound's AutoScheme.

    python -m lowmem.benchmarks.experiments.curve           the embedded model; writes results/curve.json
    python -m lowmem.benchmarks.experiments.curve --show    the committed measurement as tables
    python -m lowmem.benchmarks.experiments.curve --draw    docs/images/curve.svg from that measurement
    python -m lowmem.benchmarks.experiments.curve --only mixed,uniform --keep   ours again, not the peers

Every converter gets the same rows of calibration tokens. Every version is evaluated alike: its dequantized
linears in the unquantized model, in float32, so that only rounding shows and no kernel's arithmetic. Peers
may be installed in environments of their own; a missing one is left out. Finished steps are kept in --work,
so an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, origin_here, say
from lowmem.benchmarks.experiments.curve.evaluate import Evaluator
from lowmem.benchmarks.experiments.curve.plot import draw
from lowmem.benchmarks.experiments.curve.record import AUTOSCHEME, CurveRecord, Version, all_versions
from lowmem.benchmarks.experiments.curve.run import Curve, measure_all
from lowmem.benchmarks.experiments.curve.table import render
from lowmem.benchmarks.experiments.peers.__main__ import shown
from lowmem.benchmarks.experiments.peers.run import Run
from lowmem.benchmarks.experiments.workers.interpreters import find_peers

from lowmem.errors import SourceError

CURVE = Experiment("curve", CurveRecord, RESULTS / "curve.json", render)
IMAGE = ROOT / "docs" / "images" / "curve.svg"
WORK = Path(tempfile.gettempdir()) / "lowmem-curve"


def compare(args: argparse.Namespace, words: Sequence[str]) -> CurveRecord:
    """Measure what the options name. Raises LowmemError for what the user can correct."""
    found = find_peers(args.llama_python, args.autoround_python)
    # Processes run in the work folder.
    source = str(embedded_model() if args.model is None else Path(args.model).expanduser().resolve())
    run = Run(source, args.work.resolve(), found, args.iterations, args.only, 1)
    run.begin(args.again)
    curve = Curve(run, Evaluator(source))
    prepared = curve.prepare()
    origin = origin_here("curve", words, shown(source), prepared["fingerprint"])
    wanted = [v for v in all_versions(found.names) if args.only is None or v.key.startswith(args.only)]
    earlier = earlier_of(args.out, origin, prepared["calibration"]) if args.keep else None
    if earlier is not None:
        check_iterations(wanted, args.iterations, earlier)
    points = measure_all(curve, wanted)
    left_out = tuple(line for line in found.left_out if line.startswith(("llama.cpp", "AutoRound")))
    record = CurveRecord(
        origin, prepared["calibration"], args.iterations, run.peer_versions(), left_out, points
    )
    return record if earlier is None else joined(record, earlier)


def earlier_of(file: Path, origin: Origin, calibration: str) -> CurveRecord:
    """The record in a file, of the same weights and rows. Raises SourceError for another one."""
    found: CurveRecord = CURVE.read(file)
    if (found.origin.source_digest, found.calibration) != (origin.source_digest, calibration):
        raise SourceError(f"{file} is of other weights or other calibration rows", "Measure without --keep")
    return found


def check_iterations(wanted: Sequence[Version], iterations: int, earlier: CurveRecord) -> None:
    """Raise SourceError where AutoRound would tune kept versions longer or shorter than measured ones."""
    theirs = earlier.autoround_iterations
    if iterations != theirs and any(version.family == AUTOSCHEME for version in wanted):
        raise SourceError(
            f"the kept versions are of {theirs} iterations of AutoRound, not of {iterations}",
            f"Give --iterations {theirs}, or measure without --keep",
        )


def joined(record: CurveRecord, earlier: CurveRecord) -> CurveRecord:
    """A record with the points of the versions that only the earlier one has."""
    found = {point.label for point in record.points}
    others = tuple(point for point in earlier.points if point.label not in found)
    versions = tuple((dict(earlier.peer_versions) | dict(record.peer_versions)).items())
    return replace(
        record,
        autoround_iterations=earlier.autoround_iterations,
        peer_versions=versions,
        left_out=earlier.left_out,
        points=(*record.points, *others),
        kept=earlier.kept or earlier.origin,
    )


def redraw(file: Path) -> CurveRecord:
    """Draw the record in a file. Raises SourceError where it cannot be read."""
    record: CurveRecord = CURVE.read(file)
    IMAGE.write_text(draw(record), encoding="utf-8")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = CURVE.parser(__doc__)
    add = parser.add_argument

    def words_of(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    add("model", nargs="?", help="an unquantized model (the embedded one)")
    add("--draw", action="store_true", help=f"draw the record in --out as {IMAGE.name}, measure nothing")
    add("--work", type=Path, default=WORK, metavar="DIR", help="where steps are kept (%(default)s)")
    add("--again", action="append", default=[], metavar="NAME",
        help="repeat the finished steps whose names begin with NAME: mixed, llama-Q4 …")  # fmt: skip
    add("--only", type=words_of, metavar="LIST", help="versions whose names begin so: uniform,llama-Q4")
    add("--keep", action="store_true", help="keep the other versions of the record in --out")
    add("--llama-python", metavar="PYTHON", help="the interpreter that has llama-cpp-python")
    add("--autoround-python", metavar="PYTHON", help="the interpreter that has auto-round")
    add("--iterations", type=int, default=200, metavar="N", help="of AutoRound (%(default)s, its default)")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if args.draw:
        return CURVE.run(args, lambda: redraw(args.out), keep=False)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peers must not look for a folder on the hub
    try:
        return CURVE.run(args, lambda: compare(args, words))
    except KeyboardInterrupt:
        say(f"interrupted; finished steps are kept in {args.work}")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
