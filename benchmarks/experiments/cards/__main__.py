"""Our kernels for cards, proved without one: compiled, disassembled, counted.

    python -m lowmem.benchmarks.experiments.cards           everything, 20 minutes; results/cards.json
    python -m lowmem.benchmarks.experiments.cards --targets sm_86 --launches 'decode, 1 row'    some of it
    python -m lowmem.benchmarks.experiments.cards --show    the committed record as tables

Every launch of every kernel, as TritonLinear makes it, is compiled for families of NVIDIA's and AMD's cards,
and the machine code is read: registers, spills, instructions per weight, the width of loads, whether
subnormal numbers are kept. With public figures of cards this gives an expected decode speed: computed, not
measured. Exits with 1 if a kernel spills, misses a limit on instructions, or is not built.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lowmem.benchmarks.experiments.cards.arithmetic import flights, paces
from lowmem.benchmarks.experiments.cards.launches import CASES, FORMATS
from lowmem.benchmarks.experiments.cards.record import CardsRecord, missed
from lowmem.benchmarks.experiments.cards.run import do_all, jobs, versions
from lowmem.benchmarks.experiments.cards.specs import FAMILIES
from lowmem.benchmarks.experiments.cards.table import render
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, origin_here, say

from lowmem.errors import LowmemError

WORK = Path(tempfile.gettempdir()) / "lowmem-cards"
CARDS = Experiment("cards", CardsRecord, RESULTS / "cards.json", render)


def measure(args: argparse.Namespace, words: Sequence[str]) -> CardsRecord:
    """Compile and count what the options name. Raises LowmemError where Triton cannot compile."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise LowmemError("TRITON_INTERPRET is set, so Triton does not compile", "Unset it")
    try:
        import triton
    except ImportError as error:
        raise LowmemError("Triton is not installed", "pip install triton") from error
    origin = origin_here("cards", words, "lowmem/kernels/triton")
    formats = [name for name in FORMATS if args.formats is None or name.startswith(args.formats)]
    built, loops = do_all(jobs(args.targets, args.launches, formats), args.jobs, args.work)
    return CardsRecord(
        origin,
        triton.__version__,
        tuple(built),
        tuple(loops),
        tuple(flights(loops)),
        tuple(paces(loops, versions(formats))),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = CARDS.parser(__doc__)

    def some_of(names: Sequence[str], mark: str) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            words = [word.strip() for word in text.split(mark)]
            if unknown := [word for word in words if word not in names]:
                raise argparse.ArgumentTypeError(f"unknown: {unknown[0]}; known: {'; '.join(names)}")
            return words

        return parse

    add = parser.add_argument
    add("--targets", type=some_of(list(FAMILIES), ","), default=list(FAMILIES), metavar="LIST",
        help="families of cards, as sm_86,gfx1100 (all)")  # fmt: skip
    add("--launches", type=some_of(list(CASES), ";"), default=list(CASES), metavar="LIST",
        help="launches, as 'decode, 1 row; add_parts' (all)")  # fmt: skip
    add("--formats", type=lambda text: tuple(text.split(",")), metavar="LIST",
        help="formats whose names begin so: 4-bit,3-bit gptq_p (all)")  # fmt: skip
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (%(default)s)")
    add("--work", type=Path, default=WORK, metavar="DIR", help="where finished steps are kept (%(default)s)")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    found: list[CardsRecord] = []

    def measured() -> CardsRecord:
        found.append(measure(args, words))
        return found[0]

    code = CARDS.run(args, measured)
    faults = [fault for record in found for fault in missed(record)]
    for fault in faults:
        say(f"missed: {fault}")
    return code or bool(faults)


if __name__ == "__main__":
    sys.exit(main())
