"""One form, loaded and timed in a process of its own: `python -m lowmem.benchmarks.latency.worker`.

A job comes as JSON on standard input. What is told goes out as JSON lines on standard output: steps, then a
visit or a failure. Whatever libraries print goes to standard error. The process of its own makes the load
time and the peak of memory those of this form alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowmem.benchmarks.common.record_file import from_json, to_json
from lowmem.benchmarks.latency.energy import Meter
from lowmem.benchmarks.latency.roofline import Rates, look, wait

if TYPE_CHECKING:
    import torch

    from lowmem.config import SamplingParams

WARM_UP_TOKENS = 3
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl.h
Tell = Callable[[str], None]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Job:
    """What to measure. path: of the form; empty: only the machine. method, dtype: of its plan.Form. device:
    as torch names it. context: tokens that the KV cache is made for. prompts, contexts: token counts, rising.
    own_bytes: that a token reads. seconds: for one figure of the roofline."""

    path: str
    method: str
    dtype: str
    device: str
    context: int
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    own_bytes: int
    seconds: float


@dataclass(frozen=True)
class PromptTime:
    """Request to first token, seconds, of a prompt of so many tokens."""

    tokens: int
    ttft: float


@dataclass(frozen=True)
class DecodeTime:
    """Seconds between tokens, one fewer than there are. joules: of all of them, where the machine tells."""

    context: int
    gaps: tuple[float, ...]
    joules: float | None

    @property
    def tpot(self) -> float:
        """(end - first token) / (n - 1)."""
        return sum(self.gaps) / len(self.gaps)


@dataclass(frozen=True)
class Visit:
    """What a process found. threads: that torch used. rates: of the machine, before the load and after it
    all. free_bytes: of memory, on the device, before the load. The times are empty where the job named no
    form."""

    threads: int
    rates: tuple[Rates, ...]
    free_bytes: int
    kernel: str
    load_seconds: float
    prompts: tuple[PromptTime, ...]
    decodes: tuple[DecodeTime, ...]
    peak_host_bytes: int
    peak_device_bytes: int


class _Engine(Protocol):
    """What is timed: lowmem.generate.engine.Engine, or a test's own."""

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Any]:
        """Tokens, as Engine.generate."""

    def reset(self) -> None:
        """Forget the KV cache."""


def measure(job: Job, tell: Tell) -> Visit:
    """Do the job. tell: hears what is measured next. Raises what loading and generating raise."""
    import torch

    from lowmem.plan.device import card_memory_free, host_memory_available, memory_use, return_freed_memory

    return_freed_memory()
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    cpu = device.type == "cpu"
    rates = []
    free = host_memory_available() if cpu else card_memory_free(device)
    # Where the high-water mark cannot be set back, buffers before the load would count as the model's.
    if reset_peak(device) or not job.path:
        tell("the machine")
        rates.append(look(job.own_bytes, dtype, device, job.seconds))
        reset_peak(device)
    empty = Visit(torch.get_num_threads(), tuple(rates), free, "", 0.0, (), (), 0, 0)
    if not job.path:
        return empty
    kernel, load_seconds, prompts, decodes = _time_form(job, device, dtype, tell)
    use = memory_use(device)
    tell("the machine")
    rates.append(look(job.own_bytes, dtype, device, job.seconds))
    return replace(
        empty,
        rates=tuple(rates),
        kernel=kernel,
        load_seconds=load_seconds,
        prompts=prompts,
        decodes=decodes,
        peak_host_bytes=use.host_peak,
        peak_device_bytes=use.card_peak,
    )


def _time_form(
    job: Job, device: torch.device, dtype: torch.dtype, tell: Tell
) -> tuple[str, float, tuple[PromptTime, ...], tuple[DecodeTime, ...]]:
    """(kernel, load seconds, prompts, decodes); the model is gone when this returns."""
    from lowmem.benchmarks.latency.energy import find_meter

    from lowmem.loading.loader import load
    from lowmem.session import Session

    tell("load")
    on_the_fly: Any = job.method if job.method in ("int8", "nf4") else None
    loaded = load(job.path, device=device, dtype=dtype, on_the_fly=on_the_fly, context=job.context)
    wait(device)
    # No token ends an answer: all are wanted, whatever the model says.
    session = Session(replace(loaded, stop_ids=()), context=job.context, speculate=False)
    session.engine.settle()  # else the first answers are spent on that too
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    prompts, decodes = time_engine(
        session.engine,
        job,
        token_ids(job.context, vocabulary),
        tell,
        finish=lambda: wait(device),
        meter=find_meter(device),
    )
    return loaded.kernel, loaded.load_seconds, prompts, decodes


def time_engine(
    engine: _Engine,
    job: Job,
    ids: Sequence[int],
    tell: Tell,
    *,
    finish: Callable[[], None] = lambda: None,
    meter: Meter | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[tuple[PromptTime, ...], tuple[DecodeTime, ...]]:
    """Warm up, then time every prompt from an empty cache, and decode at every context.

    A context's keys and values are computed before its clock starts, by a warm-up of the same prompt: what is
    timed begins with a step of one token. finish: waits for the device.
    """
    from lowmem.config import PREFILL_CHUNK

    tell("warm-up")
    # Kernels are repacked, compiled or chosen at the first product of each shape.
    for tokens in sorted({min(tokens, PREFILL_CHUNK) for tokens in job.prompts}):
        engine.reset()
        # A prompt as long as the context leaves room for one token.
        stamps(engine, ids[:tokens], min(WARM_UP_TOKENS, job.context - tokens + 1), finish, clock)
    prompts = []
    for tokens in job.prompts:
        tell(f"prefill of {tokens}")
        engine.reset()
        start, first = stamps(engine, ids[:tokens], 1, finish, clock)
        prompts.append(PromptTime(tokens, first - start))
    decodes = []
    for context in job.contexts:
        tell(f"decode at {context}")
        stamps(engine, ids[:context], min(WARM_UP_TOKENS, job.new_tokens), finish, clock)
        before = meter.read() if meter else ()
        times = stamps(engine, ids[:context], job.new_tokens, finish, clock)
        # All new tokens count: the first one's step is one token's, too.
        joules = meter.joules(before, meter.read()) if meter else None
        gaps = tuple(end - start for start, end in pairwise(times[1:]))
        decodes.append(DecodeTime(context, gaps, joules))
    return tuple(prompts), tuple(decodes)


def stamps(
    engine: _Engine, prompt: Sequence[int], new_tokens: int, finish: Callable[[], None], clock: Clock
) -> list[float]:
    """When the request was made, and when each token was there. Raises RuntimeError for too few tokens."""
    from lowmem.config import SamplingParams

    finish()
    times = [clock()]
    for _ in engine.generate(prompt, SamplingParams(max_new_tokens=new_tokens, temperature=0)):
        finish()
        times.append(clock())
    if len(times) != new_tokens + 1:
        raise RuntimeError(f"{len(times) - 1} tokens came, and {new_tokens} were asked for")
    return times


def token_ids(count: int, vocabulary: int) -> list[int]:
    """The same scattered ids every time, none of them 0."""
    return [1 + i * 7919 % (vocabulary - 1) for i in range(count)]


def reset_peak(device: torch.device) -> bool:
    """Have the high-water marks of memory forgotten; whether Linux could."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def main() -> int:
    """Read a job, do it, tell: 0, or 1 after a failure that was told."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    # Where memory runs out this process goes before the user's others, and it ends when its parent does.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)

    def event(kind: str, value: object) -> None:
        print(json.dumps({kind: value}), file=out)

    job: Job = from_json(Job, json.loads(sys.stdin.read()))
    try:
        visit = measure(job, lambda text: event("step", text))
    except Exception as error:
        from lowmem.checkpoint.files.reading import one_line
        from lowmem.errors import LowmemError
        from lowmem.plan.device import is_out_of_memory

        if is_out_of_memory(error):
            event("failure", f"memory ran out: {one_line(error)}")
        elif isinstance(error, LowmemError):
            event("failure", str(error))
        else:
            raise
        return 1
    event("visit", to_json(visit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
