"""Workers of several runtimes, measured in turns, so that all of them see the same machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.processes import ROOT
from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.processes import resident
from lowmem.benchmarks.experiments.workers import protocol

LLAMA = Path(__file__).with_name("llama_worker.py")
AUTOROUND = Path(__file__).with_name("autoround_worker.py")
PAUSE_SECONDS = 0.3
"""Before each turn: threads of the previous runtime still spin for a moment."""
Request = Mapping[str, Any]
"""See `protocol`."""


class WorkerError(Exception):
    """A worker ended before it answered; the message is the end of its log."""


class Worker:
    """The parent's end of a worker. All methods raise WorkerError once the process has ended."""

    def __init__(self, command: Sequence[str], log: Path, threads: int = 1) -> None:
        self._log = log
        answers, theirs = os.pipe()
        self._answers = os.fdopen(answers)
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(threads),
            "GPTQMODEL_CPU_WORKERS": str(max(2, threads)),  # GPTQModel cannot load with one
            protocol.ANSWERS: str(theirs),
        }
        try:
            with log.open("wb") as stream:
                self._process = subprocess.Popen(
                    command,
                    cwd=log.parent,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs,),
                    text=True,
                )
        except BaseException:
            self._answers.close()
            raise
        finally:
            os.close(theirs)  # otherwise the pipe never ends
        try:
            started = self._answer()
            self.kernel: str = started["kernel"]
            self.load_seconds: float = started["load_seconds"]
        except BaseException:
            self.close()
            raise

    def ask(self, request: Request) -> dict[str, Any]:
        """The worker's answer to a request."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the log says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def peak_bytes(self) -> int:
        """Peak resident memory so far."""
        return resident(self._process.pid).get("VmHWM", 0)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._answers.close()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            raise WorkerError(last_lines(self._log))
        return dict(json.loads(line))


def last_lines(log: Path, count: int = 3) -> str:
    """The last non-empty lines of a log, on one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-count:])[-500:] or "it printed nothing"


def lowmem_command(method: str, path: Path, context: int, threads: int, sequences: int = 1) -> list[str]:
    """The command of `lowmem_worker`. sequences: that it answers at once, `context` tokens each."""
    module = "lowmem.benchmarks.experiments.workers.lowmem_worker"
    sizes = map(str, (context, threads, sequences))
    return [sys.executable, "-m", module, method, str(path.resolve()), *sizes]


def llama_command(python: str, path: Path, context: int, threads: int, sequences: int = 1) -> list[str]:
    """The command of `llama_worker` as a worker; see `lowmem_command`.

    python: an interpreter that has llama-cpp-python.
    """
    sizes = ["--context", str(context), "--threads", str(threads), "--sequences", str(sequences)]
    return [python, str(LLAMA), "serve", str(path.resolve()), *sizes]


@dataclass(frozen=True)
class RuntimeFacts:
    """One runtime of a measurement."""

    label: str
    """Unique in its record."""
    kernel: str = ""
    load_seconds: float = 0.0
    peak_bytes: int = 0
    """Peak resident memory of its worker."""
    load_averages: tuple[float, ...] = ()
    """Of the machine, before each turn."""
    bytes: tuple[tuple[str, int], ...] = ()
    """What a decode step reads, by part ("packed", "scales", "head" …); empty where it is not counted."""
    failure: str = ""
    """Why figures are missing, else empty."""


@dataclass
class Turns:
    """Workers of the same requests, all open at once, asked one after another.

    Used as a context manager. A worker that fails is left out from then on, and its facts say why.
    """

    openers: Mapping[str, Callable[[], Worker]]
    """By label: starts the worker."""
    warm_up: Sequence[Request] = ()
    """Sent to each worker when it has started."""
    facts: dict[str, RuntimeFacts] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)

    def __enter__(self) -> Turns:
        self.facts = {label: RuntimeFacts(label) for label in self.openers}
        for label in self.openers:
            self._guarded(label, self._start)
        return self

    def __exit__(self, *_: object) -> None:
        while self.workers:
            self.workers.popitem()[1].close()

    def ask(
        self, title: str, rounds: int, *requests: Request, labels: Collection[str] | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        """Send the requests to every worker (or to `labels`) once a round, in rotating order.

        Returns, by label, a dictionary for each round: the answer by the request's "what".
        """
        wanted = [label for label in self.openers if labels is None or label in labels]
        found: dict[str, list[dict[str, Any]]] = {label: [] for label in wanted}

        def turn(label: str) -> None:
            worker = self.workers[label]
            time.sleep(PAUSE_SECONDS)
            load = round(os.getloadavg()[0], 2)
            found[label].append({request["what"]: worker.ask(request) for request in requests})
            facts = self.facts[label]
            peak = max(facts.peak_bytes, worker.peak_bytes())
            self.facts[label] = replace(facts, peak_bytes=peak, load_averages=(*facts.load_averages, load))

        for number in range(rounds):
            say(f"{title}: round {number + 1} of {rounds} …")
            first = number % max(1, len(wanted))
            for label in wanted[first:] + wanted[:first]:
                if label in self.workers:
                    self._guarded(label, turn)
        return {label: answers for label, answers in found.items() if answers}

    def _start(self, label: str) -> None:
        say(f"{label} …")
        worker = self.workers[label] = self.openers[label]()
        for request in self.warm_up:
            worker.ask(request)
        self.facts[label] = replace(
            self.facts[label], kernel=worker.kernel, load_seconds=round(worker.load_seconds, 3)
        )

    def _guarded(self, label: str, use: Callable[[str], None]) -> None:
        """Use the worker; one that fails is ended, and its facts say why."""
        try:
            use(label)
        except WorkerError as error:
            self.facts[label] = replace(self.facts[label], failure=str(error))
            say(f"    failed: {error}")
            if label in self.workers:
                self.workers.pop(label).close()
