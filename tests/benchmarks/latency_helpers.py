"""Models, tasks and results for tests of the timing process of `lowmem bench latency`."""

from __future__ import annotations

from pathlib import Path

import torch
from lowmem.benchmarks.latency.roofline import Rates
from lowmem.benchmarks.latency.tasks import DecodeTime, Lengths, PromptTime, Timings, TimingTask

from tests.helpers import save_source, tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

LENGTHS = Lengths((4, 8), (6, 20), 3)
TASK = TimingTask("cpu", "bfloat16", 1, path="m", lengths=Lengths((10, 20), (5, 30), 4))


def write_model(folder: Path) -> Path:
    """A random model in `folder`/tiny, with a 4-bit version beside it."""
    path = folder / "tiny"
    save_source(tiny_model("gpt_bigcode_mqa"), path, dtype=torch.bfloat16)
    write_rtn_checkpoint(tiny_model("gpt_bigcode_mqa"), path.with_name("tiny-4bit"), bits=4)
    return path


def timings(
    speed: float = 1.0, read: float = 1e9, new_tokens: int = 3, joules: float | None = None
) -> Timings:
    """Results with 10 ms per prompt token and gaps of 100 and 300 ms, all divided by `speed`."""
    gaps = tuple((0.1, 0.3)[i % 2] / speed for i in range(new_tokens - 1))
    return Timings(
        threads=2,
        rates=(Rates(read, 4 * read, 1e10), Rates(read, 4 * read, 1e10)),
        free_bytes=1 << 30,
        kernel="torch",
        load_seconds=1.0,
        prompts=tuple(PromptTime(n, n / 100 / speed) for n in LENGTHS.prompts),
        decodes=tuple(DecodeTime(c, gaps, joules) for c in LENGTHS.contexts),
        peak_host_bytes=1 << 29,
        peak_device_bytes=0,
    )
