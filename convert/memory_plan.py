"""The peak memory of a conversion, computed from headers before anything is read.

`--memory` is a promise. The plan walks over the stages that the converter runs (stages/layer.py), each of
which states its own peak. It chooses how many rows run at a time and whether hidden states stay in memory, or
refuses and names the smallest budget that is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

from lowmem.convert.stages.layer import layer_stages
from lowmem.convert.stages.sizes import FLOAT32, Workload

from lowmem.cards.find import is_card
from lowmem.errors import MemoryBudgetError
from lowmem.streaming.prefetch import PINNED_BYTES
from lowmem.text.units import format_bytes

LIBRARIES = 192 << 20
"""Buffers of torch and the BLAS, and the allocator's slack, while computing (measured)."""
TOKENS_AT_A_TIME = 1024
"""Larger forward passes are not faster, and need more memory beside the Hessian."""
SPREAD_MIB = 32
"""MiB by which the memory of the process itself, which a plan includes, differs between runs."""
TOKENS_A_STEP = 512
"""In one step of tuning. For the same number of tokens, more and smaller steps give better integers."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage of the conversion, and the most bytes it holds beside the hidden states."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that the conversion may use."""

    base: int
    """What the process holds before the work begins."""
    host: int
    """Host memory, `base` included."""
    device: int = 0
    """GPU memory; 0 on the CPU."""


@dataclass(frozen=True)
class MemoryPlan:
    """How the conversion will use memory; sizes in bytes."""

    rows_at_a_time: int
    rows_a_step: int
    """Rows in one step of tuning."""
    keep_hidden: bool
    """Whether hidden states stay in memory; they are always in a file too."""
    hidden_bytes: int
    base: int
    """What the process holds before the work begins."""
    stages: tuple[PlannedStage, ...]
    host_peak: int
    device_peak: int
    """On a GPU; 0 on the CPU."""
    prefetch: bool = False
    """Whether a layer is copied to the GPU while the one before is computed (streaming/prefetch.py)."""

    @property
    def largest(self) -> PlannedStage:
        """The stage with the highest peak."""
        return max(self.stages, key=lambda stage: stage.nbytes)


def plan_memory(work: Workload, budget: MemoryBudget, fixed_rows: int | None = None) -> MemoryPlan:
    """Choose the fastest plan that fits the budget.

    fixed_rows: the rows at a time of an interrupted job, since another number would give other bytes.
    Raises MemoryBudgetError, which names the smallest budget that is enough.
    """
    divisors = [n for n in range(work.rows, 0, -1) if work.rows % n == 0]
    sensible = [n for n in divisors if n * work.row_length <= TOKENS_AT_A_TIME] or [1]
    a_step = next((n for n in divisors if n * work.row_length <= TOKENS_A_STEP), 1)
    if fixed_rows is not None:
        sensible = [fixed_rows]
    plans = [
        measure(work, budget.base, (rows, min(a_step, rows)), keep)
        for keep, rows in product((True, False), sensible)
    ]
    for plan in plans:
        if plan.host_peak <= budget.host and plan.device_peak <= (budget.device or math.inf):
            return _with_prefetch(plan, work, budget)
    least = min(plans, key=lambda plan: (plan.device_peak, plan.host_peak))
    if is_card(work.device) and least.device_peak > budget.device:
        raise MemoryBudgetError(
            f"{work.device} has {format_bytes(budget.device)} free, and {least.largest.name} needs "
            f"{format_bytes(least.device_peak)}",
            "Free GPU memory, or use --device cpu",
        )
    least = min(plans, key=lambda plan: plan.host_peak)
    raise MemoryBudgetError(
        f"the conversion needs {format_bytes(least.host_peak)} at {least.largest.name}, "
        f"and may use {format_bytes(budget.host)}",
        f"Use at least --memory {math.ceil(least.host_peak / (1 << 20)) + SPREAD_MIB}MiB",
    )


def measure(work: Workload, base: int, rows: tuple[int, int], keep: bool) -> MemoryPlan:
    """Compute the peak with `rows` (at a time, in a step of tuning); keep: whether hidden states stay in
    memory.
    """
    arch, item = work.arch, work.dtype.itemsize
    outside = [math.prod(arch.shapes[name]) for name in arch.outside()]
    chunk = 3 * rows[0] * work.row_length * work.hidden * item
    # Embeddings are read one by one, each in its stored and its compute dtype.
    embedding = sum(outside) * item + work.read_overhead(max(outside)) + chunk
    stages = [PlannedStage("embedding", embedding), *_layers(work, rows)]
    stored = max(outside) * FLOAT32 + work.read_overhead(max(outside))
    stages.append(PlannedStage("storing the embedding", stored))
    held = (work.hidden_bytes if keep else 2 * chunk) * (2 if work.recipe.config.follows_unquantized else 1)
    peak = max(stage.nbytes for stage in stages)
    if work.device.type == "cpu":
        host, device = base + LIBRARIES + held + peak, 0
    else:
        # The host holds a tensor as it is read and a layer as it is stored; the GPU holds the rest.
        largest = max(math.prod(shape) for shape in arch.shapes.values())
        packed = max(work.packed_bytes(layer) for layer in arch.layers)
        host = base + LIBRARIES + held + largest * FLOAT32 + work.read_overhead(largest) + packed
        device = LIBRARIES + chunk + peak
    return MemoryPlan(*rows, keep, work.hidden_bytes, base, tuple(stages), host, device)


def _with_prefetch(plan: MemoryPlan, work: Workload, budget: MemoryBudget) -> MemoryPlan:
    """The plan with a layer read ahead, if the card and the host have room for it beside everything else.

    The host holds one more tensor as it is read and cast, and the pinned buffer; the card a second layer.
    """
    if work.device.type == "cpu" or len(work.arch.layers) == 1:
        return plan
    largest = max(math.prod(shape) for shape in work.arch.shapes.values())
    reading = largest * (FLOAT32 + work.dtype.itemsize) + work.read_overhead(largest) + PINNED_BYTES
    layer = max(work.sizes(layer, 1, 1).whole for layer in work.arch.layers)
    ahead = replace(
        plan, host_peak=plan.host_peak + reading, device_peak=plan.device_peak + layer, prefetch=True
    )
    fits = ahead.host_peak <= budget.host and ahead.device_peak <= budget.device
    return ahead if fits else plan


def _layers(work: Workload, rows: tuple[int, int]) -> list[PlannedStage]:
    """The stages of every kind of layer that the model has."""
    planned: list[PlannedStage] = []
    seen: set[tuple[object, ...]] = set()
    for layer in work.arch.layers:
        shapes = tuple(work.arch.shapes[f"{layer.name}.{name}"] for name in work.arch.inside(layer))
        configs = tuple(work.recipe.of(f"{layer.name}.{linear.name}") for linear in layer.linears)
        kind: tuple[object, ...] = (layer.groups, shapes, configs)
        if kind in seen:
            continue
        seen.add(kind)
        sizes = work.sizes(layer, *rows)
        for stage in layer_stages(layer, work.recipe, replays=work.replays):
            planned.append(PlannedStage(stage.name, stage.peak(sizes)))
            stage.leave(sizes)
    return planned
