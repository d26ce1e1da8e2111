"""Everything that has to be seen on a card, in ten minutes: tests, doctor, kernels, conversion, memory, pace.

    python -m lowmem.benchmarks.experiments.gpu_day              on the first card
    python -m lowmem.benchmarks.experiments.gpu_day --tiny       on the CPU, small, in Triton's interpreter
    python -m lowmem.benchmarks.experiments.gpu_day --show       the record as a page

It writes one JSON and one Markdown page into --work. A step that fails is recorded, and the next one runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lowmem.benchmarks.experiments.common import Experiment, say
from lowmem.benchmarks.experiments.gpu_day.page import render
from lowmem.benchmarks.experiments.gpu_day.record import GpuDay

WORK = Path(tempfile.gettempdir()) / "lowmem-gpu-day"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    day = Experiment("gpu_day", GpuDay, WORK / "gpu_day.json", render)
    parser = day.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU, without a card")
    parser.add_argument("--only", metavar="LIST", help="steps by their names: tests,doctor,kernels,…")
    parser.add_argument(
        "--work", type=Path, default=WORK, metavar="DIR", help="for made-up models (%(default)s)"
    )
    args = parser.parse_args(words)
    if args.tiny:  # before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["LOWMEM_CPU_KERNEL"] = "triton"

    def measure() -> GpuDay:
        from lowmem.benchmarks.experiments.gpu_day.steps import Day

        return Day(args, words).run()

    code = day.run(args, measure)
    if code == 0 and not args.show:
        page = args.out.with_suffix(".md")
        page.write_text(render(day.read(args.out)) + "\n", encoding="utf-8")
        say(f"wrote {args.out} and {page}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
