"""The whole project at StarChat Alpha's real size, on this machine: 15.5 billion made-up weights.

    python -m lowmem.benchmarks.experiments.full_size --work DIR    every step that DIR has no figures of
    python -m lowmem.benchmarks.experiments.full_size --work DIR --only convert-4
    python -m lowmem.benchmarks.experiments.full_size --show        the committed measurement as a report

The checkpoint is made (`starchat`), converted to 4 bits over all of its layers and to 8 bits over the first
three, verified, planned, run, timed and measured against the unquantized model. Each step is a command of its
own whose memory and disk are watched. DIR keeps its output, so the same command resumes an interrupted series
and an interrupted conversion. DIR needs 42 GB.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.experiments.common import Experiment, say, write
from lowmem.benchmarks.experiments.full_size.record import (
    EIGHT,
    FEW,
    FEW_LAYERS,
    FOUR,
    RESULTS,
    SOURCE,
    FullSize,
    Run,
    collect,
)
from lowmem.benchmarks.experiments.full_size.report import REPORT, markdown
from lowmem.benchmarks.experiments.processes import attempt

from lowmem.errors import LowmemError

DISK_SECONDS = 1.0
"""Between two looks at the disk."""
PROMPT = "How do I sort a list in Python?"
FULL_SIZE = Experiment("full_size", FullSize, RESULTS, markdown)


@dataclass(frozen=True)
class Step:
    """A command; its arguments name folders of --work without their path."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Folders of --work that must exist."""


def _lowmem(words: str, *more: str) -> tuple[str, ...]:
    return ("-m", "lowmem", *words.split(), *more)


MAKE = ("-m", "lowmem.benchmarks.experiments.starchat")
# 16 rows of calibration text are 8192 tokens.
STEPS = (
    Step("make", (*MAKE, SOURCE)),
    Step("convert-4", _lowmem(f"convert {SOURCE} {FOUR} --bits 4 --rows 16 --json"), (SOURCE,)),
    Step("make-few", (*MAKE, FEW, "--layers", str(FEW_LAYERS))),
    Step("convert-8", _lowmem(f"convert {FEW} {EIGHT} --bits 8 --rows 16 --json"), (FEW,)),
    Step("verify", _lowmem(f"verify {FOUR} --json"), (FOUR,)),
    Step("plan", _lowmem(f"plan {FOUR} --device cpu --json"), (FOUR,)),
    Step(
        "run",
        _lowmem(
            f"run {FOUR} --device cpu --max-new-tokens 32 --temperature 0 --no-speculation --json -p", PROMPT
        ),
        (FOUR,),
    ),
    Step(
        "latency",
        _lowmem(
            f"bench latency {FOUR} --device cpu --prompts 32,512 --contexts 512 --new-tokens 16 --rounds 3 "
            "--out latency --json"
        ),
        (FOUR,),
    ),
    Step(
        "quality",
        _lowmem(
            f"bench quality {FOUR} --reference {SOURCE} --reference-dtype bfloat16 --texts code --rows 4 "
            "--no-greedy --out quality --json"
        ),
        (SOURCE, FOUR),
    ),
)


def run_step(step: Step, work: Path) -> int:
    """Run one step to its end or its interruption, and record what it took; its exit code.

    The runs of a step are logs/NAME.1.log, .2.log and so on, each with its figures in a .json beside it.
    """
    for name in step.needs:
        if not (work / name).is_dir():
            raise LowmemError(f"{work / name} is not there", "Run the steps before this one first")
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(logs.glob(f"{step.name}.*.json")))
    log = logs / f"{step.name}.{number}.log"
    folders = {SOURCE, FOUR, FEW, EIGHT}
    command = [sys.executable, *(str(work / a) if a in folders else a for a in step.command)]
    shown = f"python {shlex.join(step.command)}"
    disk, date = _Disk(work), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    say(f"{step.name}: {shown}")
    usage, code = attempt(
        command,
        log,
        errors=log.with_suffix(".err"),
        environment={"LOWMEM_CACHE": str(work / "cache")},
        sample=disk.look,
    )
    disk.look(at_once=True)  # a step may be shorter than the time between two looks
    write(Run(step.name, shown, date, code, disk_bytes=disk.most, **asdict(usage)), log.with_suffix(".json"))
    say(f"    exit code {code}, {usage.wall_seconds:.0f} s, {usage.peak_bytes / 2**30:.2f} GiB")
    return code


class _Disk:
    """The most that a folder has grown by since the start, in blocks on the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._at, self.most = folder, 0.0, 0
        self._before = self._blocks()

    def look(self, at_once: bool = False) -> None:
        """Count again, if it is time."""
        if at_once or time.monotonic() - self._at >= DISK_SECONDS:
            self.most = max(self.most, self._blocks() - self._before)
            self._at = time.monotonic()

    def _blocks(self) -> int:
        total = 0
        for folder, _, files in os.walk(self._folder):
            for name in files:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
                except OSError:
                    continue  # renamed or removed meanwhile
        return total


def done(step: Step, work: Path) -> bool:
    """Whether a run of the step has succeeded."""
    runs = (work / "logs").glob(f"{step.name}.*.json")
    return any(json.loads(file.read_bytes())["exit_code"] == 0 for file in runs)


def run_steps(work: Path, wanted: Sequence[str]) -> int:
    """Run the wanted steps that are not done; after the last, write record and report. The exit code."""
    for step in STEPS:
        if step.name in wanted and not done(step, work) and run_step(step, work):
            tail = sorted((work / "logs").glob(f"{step.name}.*.err"))[-1].read_text().splitlines()
            say("\n".join(tail[-3:]))
            return 2
    if all(done(step, work) for step in STEPS):
        record = collect(work)
        write(record, RESULTS)
        REPORT.write_text(markdown(record) + "\n", encoding="utf-8")
        print(f"wrote {RESULTS.relative_to(ROOT)} and {REPORT.relative_to(ROOT)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    names = [step.name for step in STEPS]
    parser = FULL_SIZE.parser(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="42 GB of checkpoints, and the figures")
    parser.add_argument("--only", metavar="LIST", help=f"steps, with commas: {', '.join(names)} (all)")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--only {min(unknown)} is not a step; they are {', '.join(names)}")
    if args.show:
        return FULL_SIZE.run(args, lambda: None)
    if args.work is None:
        parser.error("--work DIR is required")
    try:
        return run_steps(args.work.expanduser().absolute(), wanted)
    except LowmemError as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
