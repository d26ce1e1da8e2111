"""The conversation between an experiment and a worker, a process that holds one runtime.

The worker opens its runtime, reports it in a line of JSON, then answers requests. A request is a JSON object
on one line of standard input: "what" names a method of the runtime, the other fields are its arguments. The
answer, what that method returns, is a line of JSON on a pipe of its own: libraries print to standard output.

Only the standard library is imported here: peers' interpreters, which have no lowmem, run the scripts beside
this module by path and import it as `protocol`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

ANSWERS = "LOWMEM_WORKER_ANSWERS"
"""The environment variable with the file descriptor of the pipe for answers."""


class Runtime(Protocol):
    """What a worker holds: one loaded model. Its other public methods answer requests."""

    kernel: str
    load_seconds: float


def serve(open_runtime: Callable[[], Runtime]) -> int:
    """The worker's end: open the runtime, then answer requests until standard input ends; exit code 0."""
    answers = os.fdopen(int(os.environ[ANSWERS]), "w")

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    runtime = open_runtime()
    answer({"kernel": runtime.kernel, "load_seconds": runtime.load_seconds})
    for line in sys.stdin:
        request = json.loads(line)
        answer(getattr(runtime, request.pop("what"))(**request))
    return 0


def prompt_of(tokens: int, vocabulary: int) -> list[int]:
    """A prompt of `tokens` ids, the same for every runtime; no two neighbours are equal."""
    return [1 + i * 7919 % (min(vocabulary, 4000) - 1) for i in range(tokens)]


def prompts_of(count: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Prompts of `tokens` ids each that begin with different ones."""
    ids = prompt_of(tokens + count, vocabulary)
    return [ids[start : start + tokens] for start in range(count)]


def gaps(tokens: Iterator[object], most_seconds: float) -> list[float]:
    """Seconds from each token to the next; stops once they add up to `most_seconds`."""
    next(tokens)
    found: list[float] = []
    last = time.perf_counter()
    for _ in tokens:
        found.append(time.perf_counter() - last)
        if sum(found) >= most_seconds:
            break
        last = time.perf_counter()
    return found
