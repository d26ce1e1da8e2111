"""What `lowmem convert --fit` makes of StarChat Alpha for consumer cards.

    python -m lowmem.benchmarks.experiments.starchat.fit            the table in docs/convert.md
    python -m lowmem.benchmarks.experiments.starchat.fit --write    and the golden file of a test

A card has half a GiB less free than its name says, and the process's own CUDA context comes out of that. The
sensitivities are made up, since the weights are not here: sizes are those of the real layout, and which
linear gets how many bits means nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.benchmarks.experiments.common import RESULTS, table
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions
from lowmem.benchmarks.experiments.starchat.replicas import starchat_header_replica

from lowmem.errors import MemoryBudgetError
from lowmem.plan.fit.allocation import best_allocation, best_of_heads
from lowmem.plan.fit.budget import SizeBudget, left_for_linears, resized
from lowmem.plan.fit.sensitivities import OPTIONS, Sensitivities
from lowmem.plan.memory import CUDA_CONTEXT, Form, need_on_device
from lowmem.plan.shape import ModelShape, read_shape

GIB = 1 << 30
CARDS = (6, 8, 10, 12, 16, 24)
"""GB in a card's name."""
TAKEN = GIB // 2
"""Bytes of a card that the system and its screen take."""
CONTEXTS = (8192, 2048)
"""Tried in this order: cards of 6 GB have no room for a long context."""
RESULT = RESULTS / "starchat_fit.json"


def starchat_linears() -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear of StarChat Alpha, by full name."""
    return {
        f"transformer.h.{layer}.{name}": sizes
        for layer in range(Dimensions().layers)
        for name, sizes in Dimensions().linears.items()
    }


def made_up_sensitivities(linears: Mapping[str, tuple[int, int]]) -> Sensitivities:
    """Errors that fall by 4 a bit, and matter more in some linears than in others."""

    def rise(name: str, inputs: int, outputs: int, index: int) -> float:
        option = OPTIONS[index]
        if inputs % option.group_size:
            return math.inf
        matter = 1 + (sum(map(ord, name)) % 7)
        return float(1e-9 * matter * inputs * outputs * 4.0**-option.bits * option.group_size**0.2)

    rises = {
        name: tuple(rise(name, inputs, outputs, index) for index in range(len(OPTIONS)))
        for name, (inputs, outputs) in linears.items()
    }
    return Sensitivities("source", "tokens", rises, linears)


def made_to_fit() -> dict[str, dict[str, Any]]:
    """What each card gets, by the card's name."""
    with tempfile.TemporaryDirectory(prefix="lowmem-starchat-") as temporary:
        shape = read_shape(starchat_header_replica(Path(temporary) / "starchat-alpha"))
    found = made_up_sensitivities(starchat_linears())
    return {f"{size} GB": _of_card(shape, found, size * GIB - TAKEN) for size in CARDS}


def _of_card(shape: ModelShape, found: Sensitivities, free: int) -> dict[str, Any]:
    for context in CONTEXTS:
        try:
            budget = SizeBudget(card=free, context=context)
            left = left_for_linears(budget, shape)
            allocation = best_of_heads(left, lambda nbytes: best_allocation(found, nbytes))
        except MemoryBudgetError as error:
            refusal = error.message
            continue
        made = resized(shape, allocation.nbytes)
        need = need_on_device(
            made, Form("gptq", "float16", allocation.head_bits), context, cuda=True, own_context=CUDA_CONTEXT
        )
        return {
            "free": free,
            "context": context,
            "head_bits": allocation.head_bits,
            "bits_per_weight": round(allocation.bits_per_weight, 4),
            "weights": need.weights,
            "kv_cache": need.kv_cache,
            "workspace": need.workspace,
            "need": need.total,
            "linears": dict(sorted(Counter(f.label for f in allocation.linears.values()).items())),
        }
    return {"free": free, "refused": refusal}


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each card."""
    lines: list[tuple[str, ...]] = []
    for name, one in found.items():
        free = f"{one['free'] / GIB:.1f}"
        if "refused" in one:
            lines.append((name, free, "nothing fits", "", "", "", "", ""))
            continue
        sizes = (one["weights"], one["kv_cache"], one["need"])
        bits = f"{one['bits_per_weight']:.2f}"
        cells = (f"{size / GIB:.2f}" for size in sizes)
        lines.append((name, free, bits, str(one["head_bits"]), *cells, f"{one['context']:,}"))
    heads = ("card", "free GiB", "bits per weight", "head bits", "weights", "KV cache", "total", "context")
    return table(heads, lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    found = made_to_fit()
    print(markdown(found))
    if args.write:
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
