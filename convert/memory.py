"""The conversion's peak memory, computed from headers before anything is read.

Everything that lives at the same time is written down here, stage by stage, in bytes. `--memory` is a
promise: the plan picks what fits it (hidden states in memory or in their file, rows at a time), or
refuses and names the least budget that would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from lowmem.convert.math import gptq, hessian, rounding

from lowmem.checkpoint.packing import stored_shapes
from lowmem.config import QuantConfig
from lowmem.errors import MemoryBudgetError
from lowmem.models.architecture import Architecture, LayerSpec, LinearSpec
from lowmem.text.units import format_bytes

LIBRARIES = 192 << 20
"""What torch's and the BLAS's own buffers and the allocator's slack add while computing (measured)."""
TOKENS_AT_A_TIME = 1024
"""More tokens in one forward pass make it no faster, and take memory beside the Hessian."""
TOKENS_A_STEP = 2048
"""In a step of tuning. With 512 no layer of the embedded model came out better: all kept what they had."""
FLOAT32 = 4


@dataclass(frozen=True)
class Stage:
    """One moment of the conversion, and the bytes that it holds beside the hidden states."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """How the conversion will use memory; all sizes in bytes."""

    rows_at_a_time: int
    rows_a_step: int
    """Of tuning."""
    keep_hidden: bool
    hidden_bytes: int
    base: int
    """What the process holds before the work begins, on the host."""
    stages: tuple[Stage, ...]
    host_peak: int
    device_peak: int
    """On a card; 0 on the CPU."""

    @property
    def largest(self) -> Stage:
        """The stage that sets the peak."""
        return max(self.stages, key=lambda stage: stage.nbytes)


def _numel(shape: Iterable[int]) -> int:
    return math.prod(shape)


def packed_bytes(spec: LinearSpec, config: QuantConfig) -> int:
    """Bytes of qweight, qzeros, scales and g_idx of one linear."""
    shapes = stored_shapes(spec.in_features, spec.out_features, config.bits, config.group_size)
    words = _numel(shapes.qweight) + _numel(shapes.qzeros) + spec.in_features
    return 4 * words + 2 * _numel(shapes.scales)


def _forward_bytes(layer: LayerSpec, tokens: int, itemsize: int) -> int:
    """The residual stream, norms and attention's heads; the widest linear's output and its activation."""
    hidden = layer.linears[0].in_features
    widest = max(max(s.in_features, s.out_features) for s in layer.linears)
    return tokens * (8 * hidden + 4 * widest) * max(itemsize, 2)


def _lacking_values(group: Sequence[LinearSpec], hidden: int) -> int:
    """Values of what tells a group's linears what they lack (targets.read_by_input): one matrix of their
    input's width, or one of each weight's size where that is smaller, or a linear may be added to the
    residual stream."""
    n, width = group[0].in_features, sum(linear.out_features for linear in group)
    each = n * width
    if n > width:
        return each
    return max(n * n, each) if len(group) == 1 and width == hidden else n * n


def _compared_width(group: Sequence[LinearSpec]) -> int:
    """Of what is subtracted to know what a group's linears lack: inputs, or outputs."""
    n, outputs = group[0].in_features, [linear.out_features for linear in group]
    return max(outputs) if n > sum(outputs) or (len(group) == 1 and outputs[0] == n) else n


def _layer_stages(
    layer: LayerSpec,
    arch: Architecture,
    config: QuantConfig,
    tokens: int,
    tokens_a_step: int,
    dtype: torch.dtype,
    read_overhead: Callable[[int], int],
    replays: bool,
) -> list[Stage]:
    """The moments of one decoder layer, on the compute device. replays: finished linears' outputs lie in
    files, and their dense weights are dropped (convert/stages/replay.py)."""
    itemsize = dtype.itemsize
    whole = sum(_numel(arch.shapes[f"{layer.name}.{n}"]) for n in arch.inside(layer)) * itemsize
    dense = whole  # what there is of it
    hidden = layer.linears[0].in_features
    largest = max(s.in_features * s.out_features for s in layer.linears)
    forward = _forward_bytes(layer, tokens, itemsize)
    wide_input = FLOAT32 if dtype == torch.float16 else 0  # they become float32
    done = 0
    stages = [Stage("read", whole + read_overhead(largest)), Stage("unquantized outputs", whole + forward)]
    groups = [[g] for g in layer.groups] if config.true_sequential else [list(layer.groups)]
    for together in groups:
        matrices = sum(g[0].in_features ** 2 for g in together) * FLOAT32
        lacking = {g[0].name: _lacking_values(g, hidden) * FLOAT32 * config.corrects for g in together}
        names = ", ".join(s.name for g in together for s in g)
        inputs = max(tokens * g[0].in_features for g in together) * wide_input
        compared = 2 * tokens * max(_compared_width(g) for g in together) * FLOAT32
        compared *= config.corrects
        held = matrices + sum(lacking.values()) + forward + max(inputs, compared)
        stages.append(Stage(f"Hessian of {names}", dense + done + held))
        for group in together:
            n = group[0].in_features
            panel = 3 * min(n, hessian.COLUMN_BLOCK) * n * FLOAT32
            others = dense + done + matrices + sum(lacking.values())
            stages.append(Stage(f"factor of {group[0].name}", others + panel))
            for spec in group:
                size = spec.in_features * spec.out_features
                # The transposed copy is made while the weight still lies beside it, which then goes.
                copy = FLOAT32 if dtype != torch.bfloat16 else itemsize
                copied = dense + done + matrices + sum(lacking.values()) + size * copy
                # What is wanted beside: made of what is lacking, or what is lacking itself, put to this use.
                wanted = size * FLOAT32 * config.corrects
                if lacking[group[0].name] == wanted and len(group) == 1:
                    wanted = 0
                width = gptq.group_width(config, n)
                columns = (
                    3 * gptq.FAR_BLOCK + 2 * (min(width, n) if width > rounding.WIDEST else 0)
                ) * spec.out_features
                rounds = copied - size * itemsize + wanted + size + (columns + 512 * n) * FLOAT32
                stages.append(Stage(f"rounding of {spec.name}", max(copied, rounds)))
                dense -= size * itemsize
                if config.tune_steps:
                    done += size  # the integers, as bytes, until the layer is tuned
                done += packed_bytes(spec, config)
            lacking[group[0].name] = 0
            restored = sum(s.in_features * s.out_features for s in group) * itemsize
            chunk = 3 * tokens * (n + max(s.out_features for s in group)) * itemsize
            left = matrices - n * n * FLOAT32 + sum(lacking.values())
            stages.append(Stage(f"outputs of {group[0].name}", dense + done + left + restored + chunk))
            if not replays or group is layer.groups[-1]:
                dense += restored
            matrices -= n * n * FLOAT32
    if config.tune_steps:
        # The integers are signed now (asymmetric ones of 8 bits take two bytes); one linear's weight and its
        # gradient are there, and what a step's forward pass has saved for the backward one.
        wide = config.bits == 8 and not config.sym
        signed = wide * sum(s.in_features * s.out_features for s in layer.linears)
        step = largest * (2 + 3 * itemsize) + 3 * _forward_bytes(layer, tokens_a_step, itemsize) // 2
        stages.append(Stage("tuning", (0 if replays else dense) + done + signed + step))
    stages.append(Stage("next hidden states", whole + done + forward))
    return stages


def plan(
    arch: Architecture,
    config: QuantConfig,
    *,
    rows: int,
    row_length: int,
    dtype: torch.dtype,
    device: torch.device,
    base: int,
    host_budget: int,
    device_budget: int = 0,
    fixed_rows: int | None = None,
    read_overhead: Callable[[int], int] = lambda numel: FLOAT32 * numel,
) -> MemoryPlan:
    """The fastest way that stays inside the budgets.

    base: bytes that this process holds already. host_budget counts them too. fixed_rows: rows at a time
    of an interrupted job, since another choice would not give the same bytes. read_overhead: bytes that
    reading a tensor of so many values takes, as the source says.
    Raises MemoryBudgetError naming the least budget that would do.
    """
    hidden = arch.shapes[arch.embedding][1]
    hidden_bytes = rows * row_length * hidden * dtype.itemsize
    divisors = [d for d in range(rows, 0, -1) if rows % d == 0]
    sensible = [d for d in divisors if d * row_length <= TOKENS_AT_A_TIME] or [1]
    a_step = next((d for d in divisors if d * row_length <= TOKENS_A_STEP), 1)
    if fixed_rows is not None:
        sensible = [fixed_rows]
    choices = [(d, keep) for keep in (True, False) for d in sensible]
    plans = [
        _measure(
            arch,
            config,
            (d, min(a_step, d)),
            row_length,
            dtype,
            device,
            base,
            hidden_bytes,
            keep,
            read_overhead,
        )
        for d, keep in choices
    ]
    for candidate in plans:
        if candidate.host_peak <= host_budget and candidate.device_peak <= (device_budget or math.inf):
            return candidate
    least = min(plans, key=lambda p: (p.device_peak, p.host_peak))
    if device.type == "cuda" and least.device_peak > device_budget:
        raise MemoryBudgetError(
            f"{device} has {format_bytes(device_budget)} free, and {least.largest.name} needs "
            f"{format_bytes(least.device_peak)} of it",
            "Free some of it, or use --device cpu",
        )
    least = min(plans, key=lambda p: p.host_peak)
    raise MemoryBudgetError(
        f"the conversion needs {format_bytes(least.host_peak)} at {least.largest.name}, "
        f"and may use {format_bytes(host_budget)}",
        f"The least that would do is --memory {math.ceil(least.host_peak / (1 << 20))}MiB",
    )


def _measure(
    arch: Architecture,
    config: QuantConfig,
    rows: tuple[int, int],
    row_length: int,
    dtype: torch.dtype,
    device: torch.device,
    base: int,
    hidden_bytes: int,
    keep: bool,
    read_overhead: Callable[[int], int],
) -> MemoryPlan:
    rows_at_a_time, rows_a_step = rows
    tokens = rows_at_a_time * row_length
    item = dtype.itemsize
    hidden = arch.shapes[arch.embedding][1]
    outside = [_numel(arch.shapes[n]) for n in arch.outside()]
    chunk = 3 * tokens * hidden * item
    # Embeddings are read whole, one after the other, each in its stored and its compute dtype.
    stages = [Stage("embedding", sum(outside) * item + read_overhead(max(outside)) + chunk)]
    seen: set[tuple[object, ...]] = set()
    for layer in arch.layers:
        kind = (layer.groups, tuple(arch.shapes[f"{layer.name}.{n}"] for n in arch.inside(layer)))
        if kind not in seen:
            seen.add(kind)
            stages += _layer_stages(
                layer,
                arch,
                config,
                tokens,
                rows_a_step * row_length,
                dtype,
                read_overhead,
                config.true_sequential and device.type == "cpu",
            )
    stages.append(Stage("storing the embedding", max(outside) * FLOAT32 + read_overhead(max(outside))))
    held = (hidden_bytes if keep else 2 * chunk) * (2 if config.follows_unquantized else 1)
    peak = max(stage.nbytes for stage in stages)
    if device.type == "cpu":
        host, card = base + LIBRARIES + held + peak, 0
    else:
        # The host holds a layer as it is read and as it is stored; the card does the rest.
        largest = max(_numel(shape) for shape in arch.shapes.values())
        packed = max(sum(packed_bytes(s, config) for s in layer.linears) for layer in arch.layers)
        host, card = (
            base + LIBRARIES + held + largest * FLOAT32 + read_overhead(largest) + packed,
            LIBRARIES + chunk + peak,
        )
    return MemoryPlan(rows_at_a_time, rows_a_step, keep, hidden_bytes, base, tuple(stages), host, card)
