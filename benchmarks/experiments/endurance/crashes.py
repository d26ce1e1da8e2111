"""Faults at random moments: is anything lost, half visible, or different afterwards?

    python -m lowmem.benchmarks.experiments.endurance.crashes                       all trials; writes
    results/crash_trials.json python -m lowmem.benchmarks.experiments.endurance.crashes --only convert:kill
    some of them, printed and not written python -m lowmem.benchmarks.experiments.endurance.crashes --show
               the committed record as a table

Real commands on a model of two layers, each in a process that is forked with the libraries loaded: `lowmem
convert` into a folder, over an older result, and into lowmem's cache; `lowmem bench quality`, and `bench
latency` with a stand-in for the process that takes the times. Each trial draws a moment: one of the command's
own steps in its files (before it opens, renames or removes something), or a CPU time. Then

    kill      SIGKILL
    full      another program leaves the disk (a tmpfs of its own) with a few KiB
    broken    every access to the disk fails (EIO)
    gone      the disk is unmounted
    memory    the process may allocate only a little more memory (RLIMIT_AS)

The scenario's `check` inspects the remaining files. A command that survives must end with 0, or with 2 and
one line. Then the fault is removed and the same command is repeated until it succeeds: every file must equal
that of a run without faults, byte for byte, and no other file may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common import record_file
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

RESULTS = Path(__file__).resolve().parents[2] / "results" / "crash_trials.json"
DISK_BYTES = 24 << 20
LEAVES_BYTES = 48 << 10
"""The most that a full disk still has."""
SPARE_BYTES = 6 << 20
"""The most that a process may still take when its memory is short."""
PLAN = {
    "convert": {"kill": 60, "full": 8, "broken": 8, "gone": 4, "memory": 8},
    "replace": {"kill": 35, "full": 3, "broken": 3},
    "cache": {"kill": 35, "full": 3, "broken": 3},
    "quality": {"kill": 45, "full": 5, "broken": 5, "memory": 4},
    "latency": {"kill": 25, "full": 4, "broken": 4},
}
"""Faults to be met, by scenario and kind."""
Plan = dict[tuple[str, str], int]


@dataclass(frozen=True)
class Tally:
    """Trials of one fault in one scenario. hit: commands that the fault ended. by: their exit codes (-9 is
    SIGKILL). said: the line of each kind that a command ended with, once."""

    scenario: str
    fault: str
    trials: int
    hit: int
    by: dict[str, int]
    said: tuple[str, ...]


@dataclass(frozen=True)
class CrashRecord:
    """`crash_trials.json`: no trial did harm, or there would be no record."""

    command: str
    seed: int
    versions: tuple[tuple[str, str], ...]
    tallies: tuple[Tally, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials and write or print what came of them."""
    parser = argparse.ArgumentParser(
        prog="python -m lowmem.benchmarks.experiments.endurance.crashes", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", action="append", metavar="SCENARIO[:FAULT]", help="may be repeated")
    parser.add_argument("--trials", type=int, metavar="N", help="of each kind, instead of the plan's")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="scenarios at a time (1)")
    parser.add_argument("--show", action="store_true", help="the committed record, and run nothing")
    args = parser.parse_args(argv)
    if args.show:
        _print(record_file.read(CrashRecord, RESULTS, "lowmem.benchmarks.experiments.endurance.crashes"))
        return 0
    plan = {
        (scenario, fault): args.trials or count
        for scenario, faults in PLAN.items()
        for fault, count in faults.items()
        if not args.only or scenario in args.only or f"{scenario}:{fault}" in args.only
    }
    _warm_up()
    record = CrashRecord(
        " ".join(
            [
                "python -m lowmem.benchmarks.experiments.endurance.crashes",
                *(argv if argv is not None else sys.argv[1:]),
            ]
        ),
        args.seed,
        _versions(),
        tuple(_side_by_side(plan, args.seed, args.jobs)),
    )
    if not args.only and not args.trials:
        record_file.write(record, RESULTS)
    _print(record)
    return 0


def _warm_up() -> None:
    """Do once what the trials do, so that what libraries import and make at first is there in every fork."""
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
        futures = [pool.submit(run, part, seed, say=_say) for part in parts]
        return [tally for future in futures for tally in future.result()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(
    plan: Plan,
    seed: int,
    *,
    context: Any = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Tally]:
    """All trials of a plan ((scenario, fault) → how many); TrialError where one did harm.

    context: of multiprocessing, whose processes have the libraries loaded; None forks this one.
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
    """A scenario, and what it leaves when nothing happens."""

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
        """Until `count` commands have met the fault, or four times as many have been tried."""
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
        return Tally(
            self.scenario.name, fault, trials, hit, {k: n for k, n in codes.items() if n}, tuple(sorted(said))
        )

    def _begin(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        marks_of(root).write_text("")
        self.scenario.prepare(root, self.material)

    def _draw(self, fault: str, chance: random.Random) -> Fault:
        """A moment: of its own steps, or, for a kill, as often a CPU time."""
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
        """What stands there after a command that met the fault, and how it ended."""
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
        """The same command, undisturbed; what is there then."""
        if not done:
            outcome = self._command(root, None)
            if outcome.code != 0 and not self._is_done(root):
                raise TrialError(f"{self.scenario.name} after {fault}: {outcome.said}")
        found = tree(root)
        if found != self.expected:
            odd = sorted(k for k in {*found, *self.expected} if found.get(k) != self.expected.get(k))
            raise TrialError(f"{self.scenario.name} after {fault}: other bytes, files or names: {odd}")

    def _is_done(self, root: Path) -> bool:
        """Whether all was finished already, where doing it again is refused (with exit code 2)."""
        return self.scenario.name in ("convert", "cache") and tree(root) == self.expected


# --- what is shown -----------------------------------------------------------------------------------------


def _kind_of(said: str, folder: Path) -> str:
    """A message without what differs from trial to trial."""
    import re

    text = said.strip().replace(str(folder.parent), "DIR")
    text = re.sub(r"[0-9a-f]{24,}", "DIGEST", text)
    text = re.sub(r"[a-z]+-\d{5}|layer-\d+|target-\S+|replay-\S+", "FILE", text)
    return re.sub(r"\d[\d.,]*", "N", text)[:400]


def _line(tally: Tally) -> str:
    codes = ", ".join(f"{count} × {code}" for code, count in sorted(tally.by.items()))
    return f"{tally.scenario:<8} {tally.fault:<7} {tally.trials:>4} trials, {tally.hit:>4} hit ({codes})"


def _print(record: CrashRecord) -> None:
    for tally in record.tallies:
        print(_line(tally))
        for line in tally.said:
            print(f"    {line}")
    kills = sum(tally.hit for tally in record.tallies if tally.fault == "kill")
    print(f"{sum(t.hit for t in record.tallies)} faults met, {kills} of them SIGKILL; seed {record.seed}")


def _versions() -> tuple[tuple[str, str], ...]:
    import torch
    import transformers

    from lowmem import __version__

    return (("lowmem", __version__), ("torch", torch.__version__), ("transformers", transformers.__version__))


def _scratch() -> str | None:
    """In memory where that can be: thousands of flushes to a disk take long, and prove nothing here."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
