"""A process that holds one runtime and measures it whenever it is told to: both ends of the conversation.

The parent sends a line, the worker runs one round and answers with a line of JSON. So several runtimes, each
in its own interpreter, take turns. Answers have a pipe of their own: libraries print to standard output.
Nothing here imports more than the standard library: every peer's interpreter runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.benchmarks.common.processes import ROOT, resident

ANSWERS = "LOWMEM_PEER_ANSWERS"
"""The variable that tells a worker the number of its pipe."""


@dataclass(frozen=True)
class Started:
    """What a worker says of itself when it is ready. kernel: what multiplies."""

    kernel: str
    load_seconds: float


@dataclass(frozen=True)
class Round:
    """One round. prefill_seconds: request to first token. decode_seconds: one for each token after it."""

    prefill_seconds: float
    decode_seconds: tuple[float, ...]


class WorkerError(Exception):
    """A worker ended before it answered; the message is the end of its log."""


def prompt_of(tokens: int, vocabulary: int) -> list[int]:
    """Token ids that no two neighbours share: the same for every runtime."""
    return [1 + i * 7919 % (min(vocabulary, 4000) - 1) for i in range(tokens)]


def timed(tokens: Iterator[object], most_seconds: float) -> Round:
    """Draw tokens one by one: the first is the prefill. Stops when decoding has taken `most_seconds`."""
    start = last = time.perf_counter()
    steps: list[float] = []
    for count, _ in enumerate(tokens):
        now = time.perf_counter()
        if count == 0:
            start, last = now - start, now
            continue
        steps.append(now - last)
        last = now
        if sum(steps) >= most_seconds:
            break
    return Round(start, tuple(steps))


def serve(open_runtime: Callable[[], tuple[Started, Callable[[], Round]]]) -> int:
    """The worker: open the runtime, then a round for each line on standard input, until it ends."""

    def opened() -> tuple[Started, Callable[[str], dict[str, Any]]]:
        started, run_round = open_runtime()
        return started, lambda _line: asdict(run_round())

    return answer_requests(opened)


def answer_requests(open_runtime: Callable[[], tuple[Started, Callable[[str], dict[str, Any]]]]) -> int:
    """The same with requests: each line on standard input gets the answer that belongs to it."""
    answers = os.fdopen(int(os.environ[ANSWERS]), "w")
    started, answer = open_runtime()
    print(json.dumps(asdict(started)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line)), file=answers, flush=True)
    return 0


class Worker:
    """The parent's end. Raises WorkerError whenever the process has ended."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        answers, theirs = os.pipe()
        self._answers = os.fdopen(answers)
        own = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), ANSWERS: str(theirs)}
        try:
            with log.open("wb") as stream:
                self._process = subprocess.Popen(
                    command,
                    cwd=log.parent,
                    env={**os.environ, **own, **environment},
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
            os.close(theirs)  # or its end would never show
        try:
            self.started = Started(**self._answer())
        except BaseException:
            self.close()
            raise

    def round(self) -> Round:
        """Have it measure once."""
        found = self.ask("round")
        return Round(found["prefill_seconds"], tuple(found["decode_seconds"]))

    def ask(self, request: str) -> dict[str, Any]:
        """Its answer to a request of one line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last tells why
        return self._answer()

    def peak_bytes(self) -> int:
        """The most memory that it has held."""
        return resident(self._process.pid).get("VmHWM", 0)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._answers.close()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            raise WorkerError(last_lines(self._log))
        found: dict[str, Any] = json.loads(line)
        return found


def last_lines(log: Path, count: int = 3) -> str:
    """The last lines of a log that say anything, in one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-count:])[-500:] or "it ended without a word"
