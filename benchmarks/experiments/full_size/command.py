"""The whole project at StarChat Alpha's real size, on this machine: 15.5 billion made-up weights.

    python -m lowmem.benchmarks.experiments.full_size.command --work DIR          every step that DIR has no figures of yet
    python -m lowmem.benchmarks.experiments.full_size.command --work DIR --only convert-4
    python -m lowmem.benchmarks.experiments.full_size.command --show              the committed measurement as a report

The checkpoint is made (lowmem.benchmarks.experiments.full_size.make_starchat_shaped), converted to 4 bits over all of its layers and to 8
bits over the first three, verified, planned, run, timed and measured against the unquantized model. Each step
is a command of its own whose memory and disk are watched; DIR keeps its output, so an interrupted series goes
on where it was when the same is typed again, and so does an interrupted conversion. DIR needs 42 GB.

What this cannot show is in the report (full_size_report.py): the weights are nobody's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowmem.benchmarks.common.processes import ROOT, Usage, attempt
from lowmem.benchmarks.common.record_file import read, write
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

from lowmem.errors import LowmemError

DISK_SECONDS = 1.0
"""Between two looks at how much of the disk a step takes."""
PROMPT = "How do I sort a list in Python?"


@dataclass(frozen=True)
class Step:
    """A command; arguments that name a folder of --work are its names alone."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Folders of --work that have to be there."""


def _lowmem(words: str, *more: str) -> tuple[str, ...]:
    return ("-m", "lowmem", *words.split(), *more)


# 16 rows of calibration text: 8192 tokens.
STEPS = (
    Step("make", ("-m", "lowmem.benchmarks.experiments.full_size.make_starchat_shaped", SOURCE)),
    Step("convert-4", _lowmem(f"convert {SOURCE} {FOUR} --bits 4 --rows 16 --json"), (SOURCE,)),
    Step(
        "make-few",
        (
            "-m",
            "lowmem.benchmarks.experiments.full_size.make_starchat_shaped",
            FEW,
            "--layers",
            str(FEW_LAYERS),
        ),
    ),
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


def run_step(step: Step, work: Path, say: Callable[[str], None]) -> int:
    """Run one step to its end or its interruption, and note what it took; its exit code.

    A step that was interrupted has a number of runs: logs/NAME.1, .2 and so on, each with its figures beside
    its output.
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
    disk = _Disk(work)
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    say(f"{step.name}: python {shlex.join(step.command)}")
    usage, code = attempt(
        command,
        log,
        errors=log.with_suffix(".err"),
        environment={"LOWMEM_CACHE": str(work / "cache")},
        sample=disk.look,
    )
    disk.look(at_once=True)  # a step may be shorter than the time between two looks
    note(log.with_suffix(".json"), step, usage, code, disk.most, date)
    say(f"    exit code {code}, {usage.wall_seconds:.0f} s, {usage.peak_bytes / 2**30:.2f} GiB")
    return code


def note(file: Path, step: Step, usage: Usage, code: int, disk: int, date: str) -> None:
    """Write the figures of a run beside its output."""
    run = Run(step.name, "python " + shlex.join(step.command), date, code, disk_bytes=disk, **asdict(usage))
    write(run, file)


class _Disk:
    """The most that a folder has grown by since the start: blocks on the disk, not lengths of files."""

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
                    continue  # renamed or gone meanwhile
        return total


def done(step: Step, work: Path) -> bool:
    """Whether a run of the step has ended well."""
    runs = sorted((work / "logs").glob(f"{step.name}.*.json"))
    return any(json.loads(file.read_bytes())["exit_code"] == 0 for file in runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left, write the record and the report; the exit code."""
    names = ", ".join(step.name for step in STEPS)
    parser = argparse.ArgumentParser(
        prog="python -m lowmem.benchmarks.experiments.full_size.command", description=__doc__
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="42 GB of checkpoints, and the figures")
    parser.add_argument("--only", metavar="LIST", help=f"steps, parted by commas: {names}")
    parser.add_argument("--show", action="store_true", help="print the committed report")
    args = parser.parse_args(argv)
    try:
        if args.show:
            print(
                markdown(
                    read(FullSize, RESULTS, "lowmem.benchmarks.experiments.full_size.command --work DIR")
                ),
                end="",
            )
            return 0
        if args.work is None:
            parser.error("--work DIR is wanted")
        wanted = args.only.split(",") if args.only else [step.name for step in STEPS]
        if unknown := set(wanted) - {step.name for step in STEPS}:
            parser.error(f"--only {sorted(unknown)[0]} is no step; they are {names}")
        work = args.work.expanduser().absolute()
        for step in STEPS:
            if step.name in wanted and not done(step, work):
                code = run_step(step, work, lambda line: print(line, flush=True))
                if code:
                    tail = sorted((work / "logs").glob(f"{step.name}.*.err"))[-1].read_text().splitlines()
                    print(*tail[-3:], sep="\n", file=sys.stderr)
                    return 2
        if all(done(step, work) for step in STEPS):
            record = collect(work)
            write(record, RESULTS)
            REPORT.write_text(markdown(record), encoding="utf-8")
            print(f"wrote {RESULTS.relative_to(ROOT)} and {REPORT.relative_to(ROOT)}")
    except LowmemError as error:
        print(f"full_size: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
