"""One model in a process of its own: prints its memory and pace as JSON.

python -m lowmem.benchmarks.experiments.gpu_day.model FOLDER DEVICE CONTEXT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowmem.cards.find import cards_of, is_card
from lowmem.config import SamplingParams
from lowmem.loading.loader import LoadOptions, load
from lowmem.plan.request import ModelRequest, plan_for
from lowmem.session import Session

_NEW_TOKENS = 32


def measure(folder: str, device: str, context: int) -> dict[str, Any]:
    """The fields of record.ModelRun, without layers and context."""
    place = torch.device(device)
    on_card = is_card(place)
    plan = plan_for(ModelRequest(folder, device=device, context=context))
    option = next(o for o in plan.options if o.device == ("card" if on_card else "cpu"))
    need = option.need
    if on_card:
        torch.zeros(1, device=place)
        cards_of(place).reset_peak(place)
    form = option.candidate.form
    loaded = load(
        folder, LoadOptions(device, getattr(torch, form.dtype), context=context, head_bits=form.head_bits)
    )
    engine = Session(loaded, context=context).engine
    new = min(_NEW_TOKENS, context // 4)
    ids = [1 + number * 7919 % 4000 for number in range(context - new)]
    times = []
    for _ in engine.generate(ids, SamplingParams(max_new_tokens=new, temperature=0)):
        times.append(time.perf_counter())
    start = time.perf_counter()
    engine.reset()
    for _ in engine.generate(ids, SamplingParams(max_new_tokens=1, temperature=0)):
        pass
    prefill = time.perf_counter() - start
    peak = cards_of(place).peak(place) if on_card else loaded.weight_bytes
    steps = times[len(times) // 2 :]  # the first ones compile and capture
    decode = (len(steps) - 1) / (steps[-1] - steps[0]) if len(steps) > 1 else 0.0
    return {
        "version": Path(folder).name.replace("packed-", "") + "-bit",
        "kernel": loaded.kernel,
        "planned": need.weights + need.kv_cache + need.workspace,
        "peak": peak,
        "decode": decode,
        "prefill": len(ids) / prefill,
    }


def main(argv: Sequence[str]) -> int:
    """The command; the exit code."""
    folder, device, context = argv
    print(json.dumps(measure(folder, device, int(context))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
