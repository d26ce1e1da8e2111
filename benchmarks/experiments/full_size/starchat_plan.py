"""What StarChat Alpha needs on consumer cards: the planner over headers of its real layout.

    python -m lowmem.benchmarks.experiments.full_size.starchat_plan          # the table of the README
    python -m lowmem.benchmarks.experiments.full_size.starchat_plan --write  # and the golden file that a test compares with

The published checkpoint and its converted forms are header-only replicas: real names, shapes and sizes over
holes on the disk. Nothing here depends on this machine. `lowmem plan MODEL --vram 12GiB` prints the same for
a model that is here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lowmem.benchmarks.experiments.full_size.replicas import gptq_header_replica, starchat_header_replica

from lowmem.commands.plan import record
from lowmem.plan.candidates import find_candidates
from lowmem.plan.memory import CUDA_CONTEXT
from lowmem.plan.planner import Budget, Plan, make_plan

GIB = 1 << 30
CARDS = (6, 8, 10, 12, 16, 24)
"""GiB of memory that are free on a card."""
HOSTS = (8, 16, 24, 48)
"""GiB of memory that are free on a machine without one."""
HOST_OF_A_CARD = 16
CONVERTED = ((8, 128), (4, 128), (3, 128), (2, 128))
CONTEXT = 8192
RESULT = Path(__file__).resolve().parents[2] / "results" / "starchat_plan.json"


def plans() -> dict[str, Plan]:
    """A plan for every card and host, by name, with all forms converted."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="lowmem-starchat-") as temporary:
        source = starchat_header_replica(Path(temporary) / "starchat-alpha")
        for bits, group_size in CONVERTED:
            gptq_header_replica(source.with_name(f"starchat-alpha-{bits}bit"), bits, group_size)
        on_card = find_candidates(str(source), cuda=True)
        for size in CARDS:
            budget = Budget(f"{size} GiB card", HOST_OF_A_CARD * GIB, size * GIB, CUDA_CONTEXT)
            found[f"{size} GiB card"] = make_plan(on_card, budget, CONTEXT)
        on_cpu = find_candidates(str(source), cuda=False)
        for size in HOSTS:
            found[f"CPU, {size} GiB"] = make_plan(on_cpu, Budget("cpu", size * GIB, packs_nf4=True), CONTEXT)
    return found


def golden(found: dict[str, Plan]) -> dict[str, Any]:
    """All of every plan, without the temporary folders' paths."""
    records = {name: record(plan) for name, plan in found.items()}
    text = json.dumps(records)
    for option in (o for plan in found.values() for o in plan.options):
        text = text.replace(str(option.candidate.path), option.candidate.path.name)
    data: dict[str, Any] = json.loads(text)
    return data


def markdown(found: dict[str, Plan]) -> str:
    """One row a device: what is chosen, what it needs, and what the next better form would need more."""
    lines = [
        f"| free memory | runs | weights | KV cache, {CONTEXT} tokens | workspace | own context | in all "
        "| longest context |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, plan in found.items():
        need = plan.chosen.need
        sizes = (need.weights, need.kv_cache, need.workspace, need.context, need.total)
        cells = " | ".join(f"{size / GIB:.2f}" for size in sizes)
        lines.append(f"| {name} | {plan.chosen.candidate.label} | {cells} | {plan.chosen.longest:,} |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    found = plans()
    print(markdown(found))
    if args.write:
        RESULT.write_text(json.dumps(golden(found), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
