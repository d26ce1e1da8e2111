"""Faults at random moments: is anything lost, visible when incomplete, or different afterwards?

    python -m lowmem.benchmarks.experiments.endurance.crashes            all; writes crash_trials.json
    python -m lowmem.benchmarks.experiments.endurance.crashes --only convert:kill      only prints
    python -m lowmem.benchmarks.experiments.endurance.crashes --show     the committed record

Real commands on a model of two layers, each in a process that is forked with the libraries loaded: `lowmem
convert` into a folder, over an older result, and into lowmem's cache; `lowmem bench quality`; and `lowmem
bench latency` with a stand-in for the timing processes. Each trial draws a moment: a file operation of the
command (before it opens, renames or removes something), or a CPU time. The faults are

    kill      SIGKILL
    full      another program fills the disk (a tmpfs of its own) up to a few KiB
    broken    every access to the disk fails (EIO)
    gone      the disk is unmounted
    memory    the process may allocate only a little more (RLIMIT_AS)

The scenario's `check` judges what is visible then. A command that survives must end with 0, or with 2 and
one line. Then the fault is lifted and the same command repeated until it succeeds: every file must be the
same, to the byte, as in a run without faults, and there must be no other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, made_with, origin_here, say
from lowmem.benchmarks.experiments.endurance.faults import Child, Disk, Fault, Outcome, can_mount, marks_of
from lowmem.benchmarks.experiments.endurance.scenarios import (
    SCENARIOS,
    Material,
    Scenario,
    TrialError,
    make_material,
    tree,
)

from lowmem.errors import LowmemError

DISK_BYTES = 24 << 20
LEAVES_BYTES = 48 << 10
"""The most room that a full disk still has."""
SPARE_BYTES = 6 << 20
"""The most that a process may still allocate when memory is short."""
PLAN = {
    "convert": {"kill": 60, "full": 8, "broken": 8, "gone": 4, "memory": 8},
    "replace": {"kill": 35, "full": 3, "broken": 3},
    "cache": {"kill": 35, "full": 3, "broken": 3},
    "quality": {"kill": 45, "full": 5, "broken": 5, "memory": 4},
    "latency": {"kill": 25, "full": 4, "broken": 4},
}
"""How many commands must meet a fault, by scenario and kind."""
Plan = dict[tuple[str, str], int]


@dataclass(frozen=True)
class Tally:
    """Trials of one fault in one scenario."""

    scenario: str
    fault: str
    trials: int
    hit: int
    """Commands that met the fault."""
    by: tuple[tuple[str, int], ...]
    """How many of them ended with which exit code; -9 is SIGKILL."""
    said: tuple[str, ...]
    """The messages that a command ended with, each kind once."""


@dataclass(frozen=True)
class CrashRecord:
    """`crash_trials.json`. It exists only if no trial did harm."""

    origin: Origin
    seed: int
    tallies: tuple[Tally, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials, write and print their record; the exit code."""
    experiment = Experiment("endurance.crashes", CrashRecord, RESULTS / "crash_trials.json", render)
    parser = experiment.parser(__doc__)
    parser.add_argument("--only", action="append", metavar="SCENARIO[:FAULT]", help="may be repeated")
    parser.add_argument("--trials", type=int, metavar="N", help="of each kind, instead of the plan's")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="scenarios at a time (1)")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)

    def measure() -> CrashRecord:
        origin = origin_here("endurance.crashes", words, "a made-up model of two layers")
        plan = {
            (scenario, fault): args.trials or count
            for scenario, faults in PLAN.items()
            for fault, count in faults.items()
            if not args.only or scenario in args.only or f"{scenario}:{fault}" in args.only
        }
        _warm_up()
        return CrashRecord(origin, args.seed, tuple(_side_by_side(plan, args.seed, args.jobs)))

    return experiment.run(args, measure, keep=not args.only and not args.trials)


def _warm_up() -> None:
    """Run the commands once, so that every fork has the libraries loaded and their caches filled."""
    from lowmem.cli import main as lowmem

    with (
        tempfile.TemporaryDirectory(prefix="lowmem-crash-", dir=_scratch()) as name,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        os.environ["LOWMEM_CACHE"] = str(Path(name) / "cache")
        material = make_material(Path(name) / "material", None)
        for scenario in SCENARIOS:
            if scenario.name in ("convert", "quality"):
                root = Path(name) / scenario.name
                root.mkdir()
                scenario.prepare(root, material)
                lowmem(scenario.words(root, material))


def _side_by_side(plan: Plan, seed: int, jobs: int) -> list[Tally]:
    """Each scenario in a process of its own, `jobs` of them at a time."""
    names = list(dict.fromkeys(scenario for scenario, _ in plan))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        parts = [{key: count for key, count in plan.items() if key[0] == name} for name in names]
        futures = [pool.submit(run, part, seed, say=say) for part in parts]
        return [tally for future in futures for tally in future.result()]


def run(
    plan: Plan,
    seed: int,
    *,
    context: Any = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Tally]:
    """All trials of a plan ((scenario, fault) → how many). Raises TrialError where one did harm.

    context: of multiprocessing, its processes with the libraries loaded; None forks this one.
    """
    context = context or multiprocessing.get_context("fork")
    tallies = []
    with tempfile.TemporaryDirectory(prefix="lowmem-crash-", dir=_scratch()) as name:
        material = make_material(Path(name) / "material", context)
        for scenario in SCENARIOS:
            wanted = {fault: count for (of, fault), count in plan.items() if of == scenario.name}
            if not wanted:
                continue
            trials = Trials(scenario, material, Path(name) / scenario.name, context)
            for fault, count in wanted.items():
                if fault in ("full", "gone") and not can_mount():
                    say(f"{scenario.name}: no disk can be mounted here, {fault} is left out")
                    continue
                tallies.append(trials.run(fault, count, random.Random(f"{seed} {scenario.name} {fault}")))
                say(_line(tallies[-1]))
    return tallies


class Trials:
    """A scenario, and what it leaves without a fault."""

    def __init__(self, scenario: Scenario, material: Material, folder: Path, context: Any) -> None:
        self.scenario, self.material, self.folder, self.context = scenario, material, folder, context
        folder.mkdir()
        root = folder / "trial"
        self._begin(root)
        undisturbed = self._command(root, None)
        if undisturbed.code != 0:
            raise TrialError(f"{scenario.name} fails by itself: {undisturbed.said}")
        self.steps, self.seconds = undisturbed.steps, undisturbed.cpu_seconds
        self.expected = tree(root)
        scenario.check(root, material)
        shutil.rmtree(root)

    def run(self, fault: str, count: int, chance: random.Random) -> Tally:
        """Repeat until `count` commands have met the fault, or four times as many have run."""
        codes: Counter[str] = Counter()
        said: dict[str, None] = {}
        trials = hit = 0
        while hit < count and trials < 4 * count:
            root = self.folder / "trial"
            with Disk(root, DISK_BYTES if fault in ("full", "gone") else 0) as disk:
                self._begin(root)
                while True:
                    drawn = self._draw(fault, chance)
                    outcome = self._command(root, drawn)
                    disk.mend()
                    trials += 1
                    hit += outcome.hit
                    codes[str(outcome.code)] += outcome.hit
                    self._judge(root, drawn, outcome)
                    if outcome.code == 2:
                        said.setdefault(_kind_of(outcome.said, self.folder))
                    if outcome.code == 0 or hit == count or self._is_done(root) or chance.random() < 0.5:
                        break
                self._finish(root, drawn, outcome.code == 0)
        return Tally(self.scenario.name, fault, trials, hit, tuple((+codes).items()), tuple(sorted(said)))

    def _begin(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        marks_of(root).write_text("")
        self.scenario.prepare(root, self.material)

    def _draw(self, fault: str, chance: random.Random) -> Fault:
        """Draw a moment: a file operation, or, for half of the kills, a CPU time."""
        if fault == "kill" and chance.random() < 0.5:
            return Fault(fault, 0, chance.uniform(0, 1.1 * self.seconds), 0)
        most = {"full": chance.choice((0, LEAVES_BYTES)), "memory": SPARE_BYTES}.get(fault, 0)
        return Fault(fault, chance.randint(1, self.steps), 0.0, chance.randint(0, most))

    def _command(self, root: Path, fault: Fault | None) -> Outcome:
        outcome = Child(self.context, root, fault).run(self.scenario.words(root, self.material))
        if outcome.hit:
            with marks_of(root).open("a") as marks:
                marks.write("fault\n")
        return outcome

    def _judge(self, root: Path, fault: Fault, outcome: Outcome) -> None:
        """Check what is visible after a fault, and how the command ended."""
        where = f"{self.scenario.name}, {fault}: "
        allowed = (0, -9) if fault.kind == "kill" else (0, 2)
        if outcome.code not in allowed and not self._is_done(root):
            raise TrialError(f"{where}exit code {outcome.code}, {outcome.said}")
        if outcome.code == 2 and (outcome.said.count("\n") != 1 or not outcome.said.startswith("lowmem ")):
            raise TrialError(f"{where}not one line: {outcome.said!r}")
        try:
            self.scenario.check(root, self.material)
        except (TrialError, LowmemError) as error:
            raise TrialError(f"{where}{error}") from error

    def _finish(self, root: Path, fault: Fault, done: bool) -> None:
        """Repeat the command without a fault, and compare all files."""
        if not done:
            outcome = self._command(root, None)
            if outcome.code != 0 and not self._is_done(root):
                raise TrialError(f"{self.scenario.name} after {fault}: {outcome.said}")
        found = tree(root)
        if found != self.expected:
            odd = sorted(k for k in {*found, *self.expected} if found.get(k) != self.expected.get(k))
            raise TrialError(f"{self.scenario.name} after {fault}: other bytes, files or names: {odd}")

    def _is_done(self, root: Path) -> bool:
        """Whether everything is finished, so that the command refuses to do it again (exit code 2)."""
        return self.scenario.name in ("convert", "cache") and tree(root) == self.expected


def _kind_of(said: str, folder: Path) -> str:
    """A message without the parts that differ between trials."""
    text = said.strip().replace(str(folder.parent), "DIR")
    text = re.sub(r"[0-9a-f]{24,}", "DIGEST", text)
    text = re.sub(r"[a-z]+-\d{5}|layer-\d+|target-\S+|replay-\S+", "FILE", text)
    return re.sub(r"\d[\d.,]*", "N", text)[:400]


def _line(tally: Tally) -> str:
    codes = ", ".join(f"{count} × {code}" for code, count in sorted(tally.by))
    return f"{tally.scenario:<8} {tally.fault:<7} {tally.trials:>4} trials, {tally.hit:>4} hit ({codes})"


def render(record: CrashRecord) -> str:
    """A line for each fault of each scenario, and the messages."""
    lines = []
    for tally in record.tallies:
        lines += [_line(tally), *(f"    {line}" for line in tally.said)]
    hits = sum(tally.hit for tally in record.tallies)
    kills = sum(tally.hit for tally in record.tallies if tally.fault == "kill")
    lines.append(f"{hits} faults met, {kills} of them SIGKILL; seed {record.seed}")
    return "\n".join([*lines, made_with(record.origin)])


def _scratch() -> str | None:
    """A folder in memory where possible: thousands of flushes to a disk take long and prove nothing."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
