"""llama.cpp's worker of `lowmem.benchmarks.experiments.pace.command`, run by an interpreter that has llama-cpp-python and numpy."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowmem.benchmarks.experiments.peers.llama import Model, kernel_name
from lowmem.benchmarks.experiments.peers.worker import Started, answer_requests, prompt_of

CHUNK = 512
"""Tokens of a prompt in a forward: llama.cpp's own default."""


class Runtime:
    """One GGUF file, asked again and again; what the cache holds stays between two requests."""

    def __init__(self, file: Path, context: int, threads: int) -> None:
        self.model = Model(file, context, threads, chunk=CHUNK)
        self._held = 0

    def answer(self, line: str) -> dict[str, Any]:
        """See pace_worker.Runtime.answer: `prefill`, `decode` and `rows`."""
        request = json.loads(line)
        found: dict[str, Any] = getattr(self, f"do_{request.pop('what')}")(**request)
        return found

    def do_prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds to the first token of a prompt of so many, from an empty cache."""
        self.model.clear()
        self._held = 0
        start = time.perf_counter()
        int(self._feed(prompt_of(tokens, self.model.vocabulary))[0].argmax())
        return {"seconds": time.perf_counter() - start}

    def do_decode(self, context: int, tokens: int) -> dict[str, Any]:
        """Seconds of each of so many tokens after a context."""
        self._hold(context)
        token, seconds = 1, []
        for _ in range(tokens):
            start = time.perf_counter()
            token = int(self._feed([token])[0].argmax())
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def do_rows(self, context: int, rows: int, steps: int) -> dict[str, Any]:
        """Seconds of steps of one row and of several, in turns."""
        self._hold(context)
        one: list[float] = []
        many: list[float] = []
        for _ in range(steps):
            for count, kept in ((1, one), (rows, many)):
                start = time.perf_counter()
                self._feed(prompt_of(count, self.model.vocabulary), every=True)
                kept.append(time.perf_counter() - start)
                self._cut(context)
        return {"one": one, "many": many}

    def _hold(self, context: int) -> None:
        if self._held < context:
            self.model.clear()
            self._held = 0
            self._feed(prompt_of(context, self.model.vocabulary))
        self._cut(context)

    def _cut(self, length: int) -> None:
        self.model.cut(length)
        self._held = length

    def _feed(self, tokens: Sequence[int], *, every: bool = False) -> Any:
        logits = self.model.feed(tokens, self._held, every=every)
        self._held += len(tokens)
        return logits


def opened(file: Path, context: int, threads: int) -> tuple[Started, Callable[[str], dict[str, Any]]]:
    """For `answer_requests`."""
    start = time.perf_counter()
    runtime = Runtime(file, context, threads)
    return Started(kernel_name(), time.perf_counter() - start), runtime.answer


def main(argv: Sequence[str]) -> int:
    """The worker: FILE CONTEXT THREADS."""
    file, context, threads = argv
    return answer_requests(lambda: opened(Path(file), int(context), int(threads)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
