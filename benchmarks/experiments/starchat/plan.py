"""What StarChat Alpha needs on consumer cards and on CPUs.

    python -m lowmem.benchmarks.experiments.starchat.plan            the table in docs/run.md
    python -m lowmem.benchmarks.experiments.starchat.plan --write    and the golden file of a test

The published checkpoint and its converted versions are header-only replicas: real names, shapes and sizes
over holes in sparse files. Nothing depends on this machine. `lowmem plan MODEL --vram 12GiB` prints the same
for a model on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lowmem.benchmarks.experiments.common import RESULTS, rows, table
from lowmem.benchmarks.experiments.starchat.replicas import gptq_header_replica, starchat_header_replica

from lowmem.commands.plan import record
from lowmem.kernels.registry import KernelSupport
from lowmem.plan.candidates import find_candidates, with_spare_heads
from lowmem.plan.memory import CUDA_CONTEXT
from lowmem.plan.planner import Budget, Plan, make_plan

GIB = 1 << 30
CARDS = (6, 8, 10, 12, 16, 24)
"""Free GiB of a card."""
HOSTS = (8, 16, 24, 48)
"""Free GiB of a machine without one."""
HOST_OF_A_CARD = 16
CONVERTED = ((8, 128), (4, 128), (3, 128), (2, 128))
CONTEXT = 8192
RESULT = RESULTS / "starchat_plan.json"


def plans() -> dict[str, Plan]:
    """A plan for every card and host, by name, with every version converted."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="lowmem-starchat-") as temporary:
        source = starchat_header_replica(Path(temporary) / "starchat-alpha")
        for bits, group_size in CONVERTED:
            gptq_header_replica(source.with_name(f"starchat-alpha-{bits}bit"), bits, group_size)
        on_card = with_spare_heads(find_candidates(str(source), cuda=True))
        for size in CARDS:
            budget = Budget(f"{size} GiB card", HOST_OF_A_CARD * GIB, size * GIB, CUDA_CONTEXT)
            found[f"{size} GiB card"] = make_plan(on_card, budget, CONTEXT)
        on_cpu = find_candidates(str(source), cuda=False)
        for size in HOSTS:
            found[f"CPU, {size} GiB"] = make_plan(
                on_cpu, Budget("cpu", size * GIB, support=KernelSupport(packs_nf4=True)), CONTEXT
            )
    return found


def golden(found: dict[str, Plan]) -> dict[str, Any]:
    """Everything in every plan, without the temporary folders' paths."""
    records = {name: record(plan) for name, plan in found.items()}
    text = json.dumps(records)
    for option in (o for plan in found.values() for o in plan.options):
        text = text.replace(str(option.candidate.path), option.candidate.path.name)
    data: dict[str, Any] = json.loads(text)
    return data


def markdown(found: dict[str, Plan]) -> str:
    """One row for each device: the chosen version, and the memory that it needs."""
    lines = []
    for name, plan in found.items():
        need = plan.chosen.need
        sizes = (need.weights, need.kv_cache, need.workspace, need.context, need.total)
        cells = (f"{size / GIB:.2f}" for size in sizes)
        lines.append((name, plan.chosen.candidate.label, *cells, f"{plan.chosen.longest:,}"))
    heads = ("free memory", "runs", "weights", f"KV cache, {CONTEXT} tokens", "workspace", "own context",
             "total", "longest context")  # fmt: skip
    return table(heads, lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    found = plans()
    print(markdown(found))
    if args.write:
        RESULT.write_text(rows(golden(found)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
