"""The rounds of a latency measurement: every version once a round, interleaved, each in its own process.

Versions take turns so that a change of the machine affects all of them. Results are kept in a work file until
the measurement is complete, so the same command resumes an interrupted one.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowmem.benchmarks.common.processes import converse
from lowmem.benchmarks.common.progress import Progress
from lowmem.benchmarks.common.record_file import from_json, to_json
from lowmem.benchmarks.common.work_file import WorkFile
from lowmem.benchmarks.latency.planning import PlannedVersion
from lowmem.benchmarks.latency.tasks import Timings, TimingTask
from lowmem.benchmarks.report.numbers import duration

from lowmem.platform import system

PROCESS = "lowmem.benchmarks.latency.timing"
WORK_FILE = "latency.rounds.jsonl"
KEPT_SECONDS = 24 * 3600
"""Older results are measured again: the machine may have changed since."""
Tell = Callable[[str], None]


@dataclass
class Rounds:
    """All rounds, and their results so far."""

    planned: Sequence[PlannedVersion]
    count: int
    work: WorkFile[Timings]
    measure: Callable[[PlannedVersion, Tell], Timings | str]
    """Times one version, or says why that failed."""
    progress: Progress = field(default_factory=Progress)
    timings: dict[str, list[Timings]] = field(default_factory=dict)
    """By label, one a round."""
    failures: dict[str, str] = field(default_factory=dict)
    """By label, the reason."""

    def run(self) -> None:
        """Run every round; results in the work file are not measured again.

        After an exception, KeyboardInterrupt included, the results so far are here and in the work file. A
        version that fails is not tried again, and its earlier results are discarded.
        """
        kept = self.work.read()
        fitting = [one for one in self.planned if not one.reason]
        turns = [(number, fitting[i]) for number in range(self.count) for i in order(len(fitting), number)]
        self.timings.update({one.label: [] for one in fitting})
        if found := sum((number, one.label) in kept for number, one in turns):
            self.progress.note(f"resuming: {found} of {len(turns)} are measured (--fresh starts over)")
        seconds: dict[str, float] = {}
        for done, (number, one) in enumerate(turns):
            if one.label in self.failures:
                continue
            if known := kept.get((number, one.label)):
                self.timings[one.label].append(known[0])
                continue
            title = f"round {number + 1}/{self.count}  {one.label}"
            left = self._seconds_left(turns[done:], seconds)
            started = time.monotonic()
            found_now = self.measure(one, _Step(self.progress, title, done, len(turns), started + left))
            seconds[one.label] = time.monotonic() - started
            if isinstance(found_now, str):
                self.progress.note(f"{title}: {found_now}")
                self.failures[one.label] = found_now
                del self.timings[one.label]
            else:
                self.progress.note(f"{title}: {found_now.describe()}")
                self.timings[one.label].append(found_now)
                self.work.add((number, one.label), found_now, seconds[one.label])

    def _seconds_left(self, turns: Sequence[tuple[int, PlannedVersion]], seconds: dict[str, float]) -> float:
        """Each turn takes as long as this version's last, or as the mean; 0 before the first result."""
        if not seconds:
            return 0.0
        mean = sum(seconds.values()) / len(seconds)
        return sum(seconds.get(one.label, mean) for _, one in turns if one.label not in self.failures)

    def whole(self) -> int:
        """The number of complete rounds."""
        return min((len(found) for found in self.timings.values()), default=0)

    def results(self) -> dict[str, list[Timings]]:
        """The timings of the complete rounds, by label."""
        count = self.whole()
        return {label: found[:count] for label, found in self.timings.items() if count}


@dataclass(frozen=True)
class _Step:
    """Shows the current step of a process and the time left."""

    progress: Progress
    title: str
    done: int
    total: int
    end: float

    def __call__(self, text: str) -> None:
        left = self.end - time.monotonic()
        about = f"  about {duration(left)} left" if left >= 1 else ""
        self.progress.update(self.done, self.total, f"{self.title}: {text}{about}")


def order(count: int, round_number: int) -> list[int]:
    """Return the order of `count` versions in a round; each round starts with the next version."""
    first = round_number % max(1, count)
    return [*range(first, count), *range(first)]


def run_task(task: TimingTask, tell: Tell) -> Timings | str:
    """Run the task in its own process. Returns its timings, or a message that says why it failed."""
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if task.threads:
        environment["OMP_NUM_THREADS"] = str(task.threads)
    if task.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    answers: list[Timings | str] = []

    def hear(line: str) -> None:
        answer = json.loads(line)
        if "step" in answer:
            tell(str(answer["step"]))
        elif "failure" in answer:
            answers.append(str(answer["failure"]))
        else:
            answers.append(from_json(Timings, answer["timings"]))

    with tempfile.TemporaryDirectory(prefix="lowmem-latency-") as folder:
        log = Path(folder) / "log"
        code = converse(PROCESS, json.dumps(to_json(task)), hear, log, environment)
        if answers and (code == 0 or isinstance(answers[-1], str)):
            return answers[-1]
        return _failure(code, log)


def _failure(code: int, log: Path) -> str:
    """Describe why the process failed.

    That is its exit code and the last line of its log or, after SIGKILL, that memory probably ran out.
    A negative `code` is a signal number.
    """
    if system.was_killed(code):
        return f"killed by the system, probably because memory ran out (exit code {128 - code})"
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = "".join(c if c.isprintable() else "?" for c in said[-1][:300]) if said else "no message"
    return f"failed with exit code {code if code >= 0 else 128 - code}: {last}"
