"""lowmem beside GPTQModel, AutoRound, bitsandbytes and llama.cpp: quality on the same texts, one run.

    python -m lowmem.benchmarks.experiments.peers           the embedded model; writes results/peers.json
    python -m lowmem.benchmarks.experiments.peers --show    the committed measurement as a table

Every converter gets the same rows of calibration tokens, every version the same rows of text. The table shows
the KL divergence of float32 logits from the source's, beside all stored bits of the linears. A peer may be
installed in an environment of its own; a missing peer is left out, and a failure is shown with its reason.
Finished steps are kept in --work, so an interrupted run resumes. `pace` compares speed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, origin_here, say
from lowmem.benchmarks.experiments.peers.record import PeersRecord, all_versions
from lowmem.benchmarks.experiments.peers.run import Run, measure_versions
from lowmem.benchmarks.experiments.peers.table import render
from lowmem.benchmarks.experiments.workers.interpreters import find_peers

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
    versions = measure_versions(run, all_versions(found.names, prepared.dtype))
    return PeersRecord(
        origin, prepared.calibration, args.iterations, run.peer_versions(), found.left_out, versions
    )


def shown(source: str) -> str:
    """A source without the folders of one machine."""
    path = Path(source).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = PEERS.parser(__doc__)
    add = parser.add_argument

    def words_of(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    add("model", nargs="?", help="an unquantized model (the embedded one)")
    add("--work", type=Path, default=WORK, metavar="DIR", help="where steps are kept (%(default)s)")
    add("--again", action="append", default=[], metavar="NAME",
        help="repeat the finished steps whose names begin with NAME: lowmem, gptqmodel-4 …")  # fmt: skip
    add("--only", type=words_of, metavar="LIST", help="versions whose names begin so: lowmem,llama-Q4")
    add("--llama-python", metavar="PYTHON", help="the interpreter that has llama-cpp-python")
    add("--autoround-python", metavar="PYTHON", help="the interpreter that has auto-round")
    add("--iterations", type=int, default=200, metavar="N", help="of AutoRound (%(default)s, its default)")
    add("--threads", type=int, default=2, metavar="N", help="of llama.cpp's logits (%(default)s)")
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
