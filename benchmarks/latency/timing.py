"""One version of a model, loaded and timed in a process of its own.

`python -m lowmem.benchmarks.latency.timing` reads a TimingTask as JSON from standard input. It answers with
JSON lines on standard output: {"step": text} for progress, then {"timings": …} or {"failure": text}. Whatever
libraries print goes to standard error. Load time and peak memory are those of this version alone, because the
process does nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowmem.benchmarks.common.record_file import from_json, to_json
from lowmem.benchmarks.latency.energy import Meter
from lowmem.benchmarks.latency.roofline import look
from lowmem.benchmarks.latency.tasks import BatchTime, DecodeTime, Lengths, PromptTime, Timings, TimingTask

from lowmem.cards.find import cards_of, is_card, synchronize
from lowmem.platform import system

if TYPE_CHECKING:
    import torch

    from lowmem.config import SamplingParams
    from lowmem.loading.loader import LoadedModel

WARM_UP_TOKENS = 3
Tell = Callable[[str], None]
"""Called with the name of what is measured next."""


def measure(task: TimingTask, tell: Tell) -> Timings:
    """Run the task. Errors of loading and generating are passed on."""
    import torch

    from lowmem.plan.device import card_memory_free, host_memory_available, memory_use, return_freed_memory

    return_freed_memory()
    device, dtype = torch.device(task.device), getattr(torch, task.dtype)
    rates = []

    def measure_machine() -> None:
        tell("the machine")
        rates.append(look(task.own_bytes, dtype, device, task.seconds))

    free = host_memory_available() if device.type == "cpu" else card_memory_free(device)
    # Where the peak cannot be reset, buffers before the load would count as the model's.
    if reset_peak(device) or not task.path:
        measure_machine()
        reset_peak(device)
    found = Timings(torch.get_num_threads(), (), free)
    if task.path:
        found = _time_version(task, found, tell)
        use = memory_use(device)
        found = replace(found, peak_host_bytes=use.host_peak, peak_device_bytes=use.card_peak)
        measure_machine()
    return replace(found, rates=tuple(rates))


def _time_version(task: TimingTask, found: Timings, tell: Tell) -> Timings:
    """`found` with kernel, load time, prompts and decodes. The model is freed when this returns."""
    import torch
    from lowmem.benchmarks.latency.energy import find_meter

    from lowmem.loading.loader import LoadOptions, load
    from lowmem.models.embedding import token_table
    from lowmem.session import Session

    device, context = torch.device(task.device), task.lengths.context
    tell("load")
    on_the_fly: Any = task.method if task.method in ("int8", "nf4") else None
    dtype = getattr(torch, task.dtype)
    loaded = load(task.path, LoadOptions(device=device, dtype=dtype, on_the_fly=on_the_fly, context=context))
    synchronize(device)
    # Without stop tokens, an answer always has the asked number of tokens.
    session = Session(replace(loaded, stop_ids=()), context=context, speculate=False)
    session.engine.repacking.finish()  # else repacking would slow the first answers down
    vocabulary = token_table(loaded.model).vocabulary
    timer = EngineTimer(session.engine, finish=lambda: synchronize(device), meter=find_meter(device))
    prompts, decodes = timer.time(task.lengths, token_ids(context, vocabulary), tell)
    del session, timer  # and their KV cache
    return replace(
        found,
        kernel=loaded.kernel,
        load_seconds=loaded.load_seconds,
        prompts=prompts,
        decodes=decodes,
        batch=_time_batch(loaded, task.lengths, vocabulary, tell),
    )


def _time_batch(loaded: LoadedModel, lengths: Lengths, vocabulary: int, tell: Tell) -> BatchTime | None:
    """Several answers at once behind the shortest context; None if they are not asked for."""
    from lowmem.benchmarks.latency.together import step_seconds

    from lowmem.session import Session

    count = lengths.together
    if count == 1:
        return None
    context = lengths.contexts[0]
    tell(f"{count} answers at once")
    ids = token_ids(context + count, vocabulary)
    session = Session(
        replace(loaded, stop_ids=()), context=min(lengths.context, lengths.each), slots=count, speculate=False
    )
    prompts = [ids[start : start + context] for start in range(count)]
    # The first steps make what a batch needs: graphs of a card, workspaces.
    step_seconds(session.engine, prompts, WARM_UP_TOKENS)
    seconds = step_seconds(
        session.engine, prompts, lengths.new_tokens - 1, lambda: synchronize(loaded.device)
    )
    return BatchTime(count, context, tuple(seconds))


class _Engine(Protocol):
    """The methods that are timed, as lowmem.generate.engine.Engine has them."""

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Any]:
        """Yield tokens."""

    def reset(self) -> None:
        """Empty the KV cache."""


@dataclass(frozen=True)
class EngineTimer:
    """Times prefill and decode of an engine."""

    engine: _Engine
    finish: Callable[[], None] = lambda: None
    """Waits for the device."""
    meter: Meter | None = None
    """Counts energy."""
    clock: Callable[[], float] = time.perf_counter

    def time(
        self, lengths: Lengths, ids: Sequence[int], tell: Tell
    ) -> tuple[tuple[PromptTime, ...], tuple[DecodeTime, ...]]:
        """Warm up, then time every prompt from an empty cache and decode after every context.

        ids: lengths.context token ids. A context is prefilled by the warm-up before it is timed, so the timed
        run begins with a step of one token.
        """
        from lowmem.config import PREFILL_CHUNK

        tell("warm-up")
        # Kernels are repacked, compiled or chosen at the first product of each shape.
        for tokens in sorted({min(tokens, PREFILL_CHUNK) for tokens in lengths.prompts}):
            self.engine.reset()
            # A prompt as long as the context leaves room for one token.
            self.stamps(ids[:tokens], min(WARM_UP_TOKENS, lengths.context - tokens + 1))
        prompts, decodes = [], []
        for tokens in lengths.prompts:
            tell(f"prefill of {tokens}")
            self.engine.reset()
            start, first = self.stamps(ids[:tokens], 1)
            prompts.append(PromptTime(tokens, first - start))
        for context in lengths.contexts:
            tell(f"decode at {context}")
            self.stamps(ids[:context], min(WARM_UP_TOKENS, lengths.new_tokens))
            before = self.meter.read() if self.meter else ()
            times = self.stamps(ids[:context], lengths.new_tokens)
            # Energy is of all new tokens: the first one is a step of one token, too.
            joules = self.meter.joules(before, self.meter.read()) if self.meter else None
            gaps = tuple(end - start for start, end in pairwise(times[1:]))
            decodes.append(DecodeTime(context, gaps, joules))
        return tuple(prompts), tuple(decodes)

    def stamps(self, prompt: Sequence[int], new_tokens: int) -> list[float]:
        """Return the time of the request, then of each token. Raises RuntimeError for too few tokens."""
        from lowmem.config import SamplingParams

        self.finish()
        times = [self.clock()]
        for _ in self.engine.generate(prompt, SamplingParams(max_new_tokens=new_tokens, temperature=0)):
            self.finish()
            times.append(self.clock())
        if len(times) != new_tokens + 1:
            raise RuntimeError(f"the engine generated {len(times) - 1} of {new_tokens} tokens")
        return times


def token_ids(count: int, vocabulary: int) -> list[int]:
    """Return `count` scattered ids, the same in every run, none of them 0."""
    return [1 + i * 7919 % (vocabulary - 1) for i in range(count)]


def reset_peak(device: torch.device) -> bool:
    """Reset the peak-memory counters; False if Linux refuses for the host."""
    if is_card(device):
        cards_of(device).empty_cache()
        cards_of(device).reset_peak(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def main() -> int:
    """Read a task from standard input, run it and print the result. Exit code 0, or 1 after a failure."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    # If memory runs out, Linux ends this process before the user's others; it also ends with its parent.
    system.die_with_parent()

    def answer(kind: str, value: object) -> None:
        print(json.dumps({kind: value}), file=out)

    task: TimingTask = from_json(TimingTask, json.loads(sys.stdin.read()))
    try:
        found = measure(task, lambda text: answer("step", text))
    except Exception as error:
        from lowmem.checkpoint.files.reading import one_line
        from lowmem.errors import LowmemError
        from lowmem.plan.device import is_out_of_memory

        if is_out_of_memory(error):
            answer("failure", f"out of memory: {one_line(error)}")
        elif isinstance(error, LowmemError):
            answer("failure", str(error))
        else:
            raise
        return 1
    answer("timings", to_json(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
