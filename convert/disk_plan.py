"""The disk space of a conversion, computed from headers before anything is written.

Counted is what exists at the same time: the hidden states of two layers, the targets of a layer's linears,
their replayed outputs, the staged layers, and at the end the result beside all of these.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from lowmem.convert.job import ConversionJob
from lowmem.convert.stages.sizes import Workload

from lowmem.checkpoint.files.whole import DiskFullError, free_bytes, require_room
from lowmem.models.architecture import LayerSpec, LinearSpec
from lowmem.text.units import format_bytes

STORED = 2
"""Bytes of a stored value that is not quantized."""
_TENSOR = 256
"""Bytes of a tensor's entries in headers and indexes, its name included."""
_FILE = 4096
"""Bytes that a file takes beyond its contents."""
_REPORT = 1024
"""Bytes of a linear's lines in job.json, the report and the card, during a replacement."""
_SETTINGS = 256 << 10
"""Bytes of config.json and similar files."""
_TOKENIZER = 16 << 20
"""Bytes of the tokenizer files written for a source that contains its tokenizer (GGUF)."""


@dataclass(frozen=True)
class DiskPlan:
    """Bytes on disk beyond those that exist when the work begins or resumes."""

    layers: int
    """Peak while layers are converted."""
    result: int
    """While the checkpoint is assembled."""

    @property
    def needed(self) -> int:
        """The peak."""
        return max(self.layers, self.result)


def plan_disk(
    work: Workload, finished: int = 0, *, side_bytes: int = 0, store_head: bool = False
) -> DiskPlan:
    """Plan the disk space for the work that remains after `finished` layers.

    side_bytes: of the source's tokenizer and licence files, 0 if it has none. store_head: as in
    ConvertOptions.
    """
    arch = work.arch
    streams = 2 if work.recipe.config.follows_unquantized else 1
    begun = 0 if finished else streams * work.hidden_bytes
    packed = [_staged(work, layer) for layer in arch.layers]
    waiting = sum(packed[finished:])
    layers = max((_layer_files(work, layer) for layer in arch.layers[finished:]), default=0)
    outside = [math.prod(arch.shapes[name]) for name in arch.outside()]
    if store_head and arch.tied:
        outside.append(math.prod(arch.shapes[arch.embedding]))
    around = sum(outside) * STORED + len(outside) * _TENSOR + _FILE
    linears = sum(len(layer.linears) for layer in arch.layers)
    notes = linears * _REPORT + _SETTINGS
    result = sum(packed) + around + (side_bytes or _TOKENIZER)
    return DiskPlan(begun + waiting + layers + notes, begun + waiting + around + result + notes)


def _staged(work: Workload, layer: LayerSpec) -> int:
    """The file of a finished layer."""
    arch, weights = work.arch, {f"{one.name}.weight" for one in work.recipe.quantized(layer)}
    rest = [math.prod(arch.shapes[f"{layer.name}.{n}"]) for n in arch.inside(layer) if n not in weights]
    tensors = 4 * len(weights) + len(rest)
    return work.packed_bytes(layer) + sum(rest) * STORED + tensors * _TENSOR + _FILE


def _layer_files(work: Workload, layer: LayerSpec) -> int:
    """Peak of what a layer needs beside its own hidden states and the staged layers, itself included."""
    config = work.recipe.config
    value = work.hidden_bytes // work.hidden  # one value of every calibration token
    following = work.hidden_bytes if config.follows_unquantized else 0  # the next unquantized states
    groups = work.recipe.groups(layer)
    targets = [_target_values(group, layer) * value * config.corrects for group in groups]
    outputs = [sum(linear.out_features for linear in group) * value for group in groups]
    replayed = 0 if config.tune_steps else sum(outputs[:-1])
    moments = [following + work.hidden_bytes + replayed * work.replays]
    replayed = 0
    for index, group in enumerate(groups):
        last = index + 1 == len(groups)
        captured = 0 if last else (group[0].in_features * value + outputs[index])
        # A group's targets are removed once it is quantized, after its inputs were captured.
        moments.append(following + sum(targets[index:]) + work.replays * (replayed + captured))
        replayed += outputs[index]
    files = len(layer.linears) * 2 + 4
    return max(moments) + files * _FILE


def _target_values(group: tuple[LinearSpec, ...], layer: LayerSpec) -> int:
    """Values per token of a group's targets: its outputs, or its input where that is enough (targets.py).

    Only a trial tells which linears are added to the residual stream; the larger case is counted.
    """
    inputs, outputs = group[0].in_features, sum(linear.out_features for linear in group)
    added = len(group) == 1 and (group[-1] is layer.groups[-1][-1] or outputs == layer.linears[0].in_features)
    return outputs if added or inputs > outputs else inputs


def check(job: ConversionJob, needed: int) -> None:
    """Raise DiskFullError before the work begins if the disk cannot hold what it writes."""
    require_room(job.folder.parent, needed, "the conversion", "choose another folder")


@contextlib.contextmanager
def explain_full_disk(job: ConversionJob, plan_after: dict[int, DiskPlan]) -> Iterator[None]:
    """If the disk becomes full in the context, say in the DiskFullError how much space is missing.

    plan_after: by the number of finished layers.
    """
    try:
        yield
    except DiskFullError as error:
        # Read from disk: job.json may be the file that could not be written.
        finished = state.finished_layers if (state := job.load()) else 0
        with contextlib.suppress(OSError):
            job.sweep(finished)
        needed, free = plan_after[finished].needed, free_bytes(job.folder)
        if needed <= free:  # a quota or a file size limit: how much is missing is unknown
            raise
        raise DiskFullError(
            f"{error.message}; the rest of the conversion needs {format_bytes(needed)}",
            f"Free {format_bytes(needed - free)} more and repeat the command: "
            f"{finished} layers are finished and kept",
        ) from error
