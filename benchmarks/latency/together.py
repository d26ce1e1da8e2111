"""Decode steps of several answers at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lowmem.config import SamplingParams

if TYPE_CHECKING:
    from lowmem.generate.engine import Engine


def step_seconds(
    engine: Engine, prompts: Sequence[Sequence[int]], steps: int, finish: Callable[[], None] = lambda: None
) -> list[float]:
    """Seconds of each of `steps` steps, in which every prompt's sequence gets one greedy token.

    The prompts, which are read before, must be at most as many as the engine has slots, and no stop token may
    end an answer. finish: waits for the device. Raises RuntimeError where a sequence did not get its token.
    """
    greedy = SamplingParams(temperature=0, max_new_tokens=steps + 2)
    running = [engine.start(ids, greedy) for ids in prompts]
    seconds: list[float] = []
    try:
        while any(sequence.reads for sequence in running):
            engine.advance()
        while len(seconds) < steps:
            for sequence in running:
                while sequence.take() is not None:  # raises the error of a sequence that has failed
                    pass
            before = [sequence.new_tokens for sequence in running]
            finish()
            start = time.perf_counter()
            engine.advance()
            finish()
            seconds.append(time.perf_counter() - start)
            if [sequence.new_tokens for sequence in running] != [count + 1 for count in before]:
                raise RuntimeError("not every sequence has got a token in a step")
    finally:
        for sequence in running:
            engine.end(sequence)
    return seconds
