"""The rounds of a latency measurement: every form once a round, in turn, each in a process of its own.

What is done is kept in a work file beside the record until the record is whole, so that the same command goes
on where it was interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.processes import converse
from lowmem.benchmarks.common.record_file import from_json, to_json
from lowmem.benchmarks.latency.measure import Entry, order
from lowmem.benchmarks.latency.worker import Job, Visit

from lowmem.checkpoint.files.whole import as_output_error, write_whole
from lowmem.errors import OutputError

WORKER = "lowmem.benchmarks.latency.worker"
WORK_FILE = "latency.rounds.jsonl"
KEPT_SECONDS = 24 * 3600
"""What is older is measured again: it would be compared with another day's machine."""
_NO_MEMORY = "ended by the system, most likely because memory ran out"
Tell = Callable[[str], None]


class Watcher:
    """Hears what happens; this one says nothing."""

    def line(self, text: str) -> None:
        """Something that a person should know."""

    def began(self, title: str, done: int, total: int, left: float | None) -> None:
        """A process has been started. left: seconds until all is done, as far as that can be told."""

    def step(self, text: str) -> None:
        """What that process measures now."""

    def ended(self, title: str, visit: Visit | str) -> None:
        """What it found, or why it found nothing."""

    def close(self) -> None:
        """No more will come."""


@dataclass
class Found:
    """What has been measured. visits: by label, one a round; failures: by label, why."""

    visits: dict[str, list[Visit]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def whole_rounds(self) -> int:
        """Rounds in which every form has been measured that can be."""
        return min((len(found) for found in self.visits.values()), default=0)

    def whole(self) -> dict[str, list[Visit]]:
        """The visits of these rounds."""
        count = self.whole_rounds()
        return {label: found[:count] for label, found in self.visits.items() if count}


class WorkFile:
    """Visits on disk, for the next run of the same measurement on the same machine.

    key: all that has to agree. A line is a visit; the first is the key. A file that is damaged, or of another
    measurement, counts as none.
    """

    def __init__(self, file: Path, key: dict[str, Any], clock: Callable[[], float] = time.time) -> None:
        self.file, self.key, self._clock = file, json.loads(json.dumps(key)), clock
        self._times: dict[tuple[int, str], float] = {}

    def read(self) -> dict[tuple[int, str], Visit]:
        """(round, label) → visit, of those that are young enough."""
        found: dict[tuple[int, str], Visit] = {}
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
            if not lines or json.loads(lines[0]) != self.key:
                return {}
            for line in lines[1:]:
                data = json.loads(line)
                if 0 <= self._clock() - data["time"] <= KEPT_SECONDS:
                    place = int(data["round"]), str(data["label"])
                    found[place] = from_json(Visit, data["visit"])
                    self._times[place] = float(data["time"])
        except (OSError, ValueError, KeyError, TypeError):
            return found  # the last line may be half a line
        return found

    def begin(self, visits: dict[tuple[int, str], Visit]) -> None:
        """Write the key and what is kept, at once in place of whatever was there.

        A visit keeps its time: it does not become younger with every run. OutputError where that fails.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.file.parent} cannot be written: {error.strerror}", "Give another folder with --out"
            ) from error
        lines = [json.dumps(self.key)]
        lines += [self._line(*place, visit, self._times.get(place)) for place, visit in visits.items()]
        write_whole(self.file, ["".join(f"{line}\n" for line in lines).encode()])

    def add(self, round_number: int, label: str, visit: Visit) -> None:
        """One more visit, on disk when this returns. OutputError where that fails."""
        line = self._line(round_number, label, visit) + "\n"
        try:
            with self.file.open("ab") as stream:
                stream.write(line.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise as_output_error(error, self.file) from error

    def _line(self, round_number: int, label: str, visit: Visit, when: float | None = None) -> str:
        when = self._clock() if when is None else when
        return json.dumps({"round": round_number, "label": label, "time": when, "visit": to_json(visit)})

    def remove(self) -> None:
        """The measurement is whole."""
        self.file.unlink(missing_ok=True)


def job_of(entry: Entry, device: str, seconds: float) -> Job:
    """What one process does for a form."""
    candidate, lengths = entry.entrant.candidate, entry.lengths
    return Job(
        path=str(candidate.path.resolve()),
        method=candidate.form.method,
        dtype=candidate.form.dtype,
        device=device,
        context=lengths.context,
        prompts=lengths.prompts,
        contexts=lengths.contexts,
        new_tokens=lengths.new_tokens,
        own_bytes=entry.own_bytes,
        seconds=seconds,
    )


def run_job(job: Job, threads: int, step: Tell) -> Visit | str:
    """Have a process do the job: what it found, or why it failed. threads: 0 leaves it to torch."""
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # GPTQModel's own default, but never the one worker with which it cannot load.
    workers = str(max(2, ((os.cpu_count() or 1) + 1) // 2))
    environment["GPTQMODEL_CPU_WORKERS"] = os.environ.get("GPTQMODEL_CPU_WORKERS", workers)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    found: list[Visit | str] = []

    def hear(line: str) -> None:
        event = json.loads(line)
        if "step" in event:
            step(str(event["step"]))
        elif "failure" in event:
            found.append(str(event["failure"]))
        else:
            found.append(from_json(Visit, event["visit"]))

    with tempfile.TemporaryDirectory(prefix="lowmem-latency-") as folder:
        log = Path(folder) / "log"
        code = converse(WORKER, json.dumps(asdict(job)), hear, log, environment)
        if found and (code == 0 or isinstance(found[-1], str)):
            return found[-1]
        return _failure(code, log)


def _failure(code: int, log: Path) -> str:
    """An exit code, negative for a signal, in words, with the last thing that the process said."""
    if code == -signal.SIGKILL:
        return f"{_NO_MEMORY} (exit code {128 + signal.SIGKILL})"
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = "".join(c if c.isprintable() else "?" for c in said[-1][:300]) if said else "it said nothing"
    return f"failed with exit code {code if code >= 0 else 128 - code}: {last}"


def run_rounds(
    entries: Sequence[Entry],
    rounds: int,
    work: WorkFile,
    measure: Callable[[Entry, Tell], Visit | str],
    watcher: Watcher,
    found: Found,
    *,
    fresh: bool = False,
) -> None:
    """Visit every form that fits `rounds` times, filling `found`; what the work file has is not repeated.

    An exception, KeyboardInterrupt among them, leaves in `found` and in the file what is done. A form that
    fails once is not tried again, and what it did before does not count.
    """
    kept = {} if fresh else work.read()
    work.begin(kept)
    fitting = [entry for entry in entries if not entry.reason]
    found.visits.update({entry.label: [] for entry in fitting})
    total = rounds * len(fitting)
    if use := sum((r, entry.label) in kept for r in range(rounds) for entry in fitting):
        watcher.line(f"going on after an interruption: {use} of {total} are measured (--fresh begins anew)")
    seconds: dict[str, float] = {}
    for done in range(total):
        round_number, place = divmod(done, len(fitting))
        entry = fitting[order(len(fitting), round_number)[place]]
        if entry.label in found.failures:
            continue
        known = kept.get((round_number, entry.label))
        if known is not None:
            found.visits[entry.label].append(known)
            continue
        title = f"round {round_number + 1}/{rounds}  {entry.label}"
        waiting = [
            fitting[order(len(fitting), at // len(fitting))[at % len(fitting)]] for at in range(done, total)
        ]
        labels = [e.label for e in waiting if e.label not in found.failures]
        watcher.began(title, done, total, _left(labels, seconds))
        before = time.monotonic()
        visit = measure(entry, watcher.step)
        seconds[entry.label] = time.monotonic() - before
        watcher.ended(title, visit)
        if isinstance(visit, str):
            found.failures[entry.label] = visit
            del found.visits[entry.label]
        else:
            found.visits[entry.label].append(visit)
            work.add(round_number, entry.label, visit)


def _left(labels: Sequence[str], seconds: dict[str, float]) -> float | None:
    """Seconds that these will take, each as long as it took before, or as all did in the mean."""
    if not seconds:
        return None
    mean = sum(seconds.values()) / len(seconds)
    return sum(seconds.get(label, mean) for label in labels)
