"""What measuring sensitivities costs beside the conversion, at StarChat Alpha's dimensions.

    python -m lowmem.benchmarks.experiments.full_size.fitting --work DIR    writes results/fitting.json
    python -m lowmem.benchmarks.experiments.full_size.fitting --show        the committed record

A few decoder layers with made-up weights (`starchat/plausible.py`) and StarChat's vocabulary are converted by
`lowmem convert --bpw 4.2 --rows 16` in one process with an empty cache, so that it measures first. Its log
gives both times; the process's peak of memory covers both.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, made_with, origin_here, table
from lowmem.benchmarks.experiments.processes import run_process
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions

NAME = "full_size.fitting"
LAYERS, ROWS = 2, 16
STARCHAT_LAYERS = 40
OPTIONS = ("--bpw", "4.2", "--rows", str(ROWS), "--row-length", "512", "--memory", "5GiB", "--device", "cpu")


@dataclass(frozen=True)
class Fitting:
    """One measured run."""

    origin: Origin
    layers: int
    rows: int
    """Calibration rows of 512 tokens of the conversion; the measurement takes a quarter of them."""
    sensitivity_seconds: float
    """Measuring, the forward pass and the head included."""
    conversion_seconds: float
    peak_bytes: int
    """Of the process."""

    @property
    def share(self) -> float:
        """Of the measurement in the conversion's time."""
        return self.sensitivity_seconds / self.conversion_seconds


def measure(work: Path, argv: Sequence[str]) -> Fitting:
    """Convert in `work`, whose contents are kept for the next run. Raises OSError if the command fails."""
    origin = origin_here(NAME, argv, "StarChat's dimensions, made-up weights")
    source, cache, log = work / "source", work / "cache", work / "log"
    if not source.exists():
        from lowmem.benchmarks.experiments.starchat.plausible import write_plausible

        write_plausible(source, Dimensions(LAYERS, n_positions=1024))
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["LOWMEM_CACHE"] = str(cache)
    command = [sys.executable, "-m", "lowmem", "convert", str(source), str(work / "out"), "--force", "--json"]
    usage = run_process([*command, *OPTIONS], log)
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"event"')]
    finished = next(event for event in events if event["event"] == "finished")
    kept = json.loads(next((cache / "sensitivities").glob("*.json")).read_text())
    return Fitting(origin, LAYERS, ROWS, kept["seconds"], finished["total_seconds"], usage.peak_bytes)


def render(record: Fitting) -> str:
    """The record as Markdown, with times of all of StarChat's layers."""
    hours = STARCHAT_LAYERS / record.layers / 3600
    cells = [
        (
            "sensitivities",
            f"{record.sensitivity_seconds:.0f} s",
            f"{record.sensitivity_seconds * hours:.2f} h",
        ),
        ("conversion", f"{record.conversion_seconds:.0f} s", f"{record.conversion_seconds * hours:.2f} h"),
    ]
    return "\n\n".join(
        (
            table(("", f"{record.layers} layers", f"{STARCHAT_LAYERS} layers, extrapolated"), cells),
            f"Measuring takes {record.share:.0%} of the conversion's time, which has {record.rows} rows of "
            f"512 tokens. Peak memory {record.peak_bytes / 2**30:.2f} GiB.",
            made_with(record.origin),
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    words = list(sys.argv[1:] if argv is None else argv)
    experiment = Experiment(NAME, Fitting, RESULTS / "fitting.json", render)
    parser = experiment.parser(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for the model and its conversion")
    args = parser.parse_args(words)
    if not args.show and args.work is None:
        parser.error("--work is needed to measure")
    return experiment.run(args, lambda: measure(args.work.absolute(), words))


if __name__ == "__main__":
    sys.exit(main())
