"""The room on disk that a conversion needs, computed from headers before anything is written.

As the memory's (convert/memory.py), the plan follows what lies on the disk at one time: the hidden states
of two layers, what a layer's linears should put out, their outputs that are replayed, the staged layers, and
at the end the result beside all of these.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from lowmem.convert.job import Job
from lowmem.convert.memory import MemoryPlan, packed_bytes

from lowmem.checkpoint.files.whole import DiskFullError, free_bytes, require_room
from lowmem.config import QuantConfig
from lowmem.models.architecture import Architecture, LayerSpec, LinearSpec
from lowmem.text.units import format_bytes

STORED = 2
"""Bytes of a value that is not quantized."""
_TENSOR = 256
"""Of a tensor's entries in headers and indexes, its name included."""
_FILE = 4096
"""What a file takes beyond its bytes."""
_REPORT = 1024
"""Of a linear's lines in job.json, the report and the card, while one is being replaced."""
_SETTINGS = 256 << 10
"""config.json and the like."""
_TOKENIZER = 16 << 20
"""Of a source that keeps its tokenizer inside, and gets files."""


@dataclass(frozen=True)
class DiskPlan:
    """Bytes on disk beyond what there is when the work begins, or goes on.

    layers: the most while the last layer is worked on. result: while the checkpoint is put together.
    """

    layers: int
    result: int

    @property
    def needed(self) -> int:
        """The peak."""
        return max(self.layers, self.result)


def plan(
    arch: Architecture,
    config: QuantConfig,
    memory: MemoryPlan,
    *,
    replays: bool,
    side_bytes: int = 0,
    store_head: bool = False,
    finished: int = 0,
) -> DiskPlan:
    """What is to come after `finished` layers.

    replays: finished linears' outputs lie in files (convert/stages/replay.py). side_bytes: of the source's tokenizer
    and licence files, 0 where it has none. store_head: as in Options.
    """
    hidden = arch.shapes[arch.embedding][1]
    value = memory.hidden_bytes // hidden  # one value of every calibration token
    streams = 2 if config.follows_unquantized else 1
    begun = 0 if finished else streams * memory.hidden_bytes
    packed = [_staged(arch, layer, config) for layer in arch.layers]
    waiting = sum(packed[finished:])
    work = max((_at_work(arch, layer, config, value, replays) for layer in arch.layers[finished:]), default=0)
    outside = [math.prod(arch.shapes[name]) for name in arch.outside()]
    if store_head and arch.tied:
        outside.append(math.prod(arch.shapes[arch.embedding]))
    around = sum(outside) * STORED + len(outside) * _TENSOR + _FILE
    linears = sum(len(layer.linears) for layer in arch.layers)
    notes = linears * _REPORT + _SETTINGS
    result = sum(packed) + around + (side_bytes or _TOKENIZER)
    return DiskPlan(begun + waiting + work + notes, begun + waiting + around + result + notes)


def _staged(arch: Architecture, layer: LayerSpec, config: QuantConfig) -> int:
    """A finished layer's file."""
    weights = {f"{linear.name}.weight" for linear in layer.linears}
    rest = [math.prod(arch.shapes[f"{layer.name}.{n}"]) for n in arch.inside(layer) if n not in weights]
    tensors = 4 * len(layer.linears) + len(rest)
    packed = sum(packed_bytes(linear, config) for linear in layer.linears)
    return packed + sum(rest) * STORED + tensors * _TENSOR + _FILE


def _at_work(arch: Architecture, layer: LayerSpec, config: QuantConfig, value: int, replays: bool) -> int:
    """The most that lies beside a layer's own hidden states and the staged layers, its own among these.

    value: bytes of one value of every calibration token.
    """
    hidden = value * arch.shapes[arch.embedding][1]
    following = hidden if config.follows_unquantized else 0  # the unquantized states of the next layer
    targets = [_target_values(group, layer) * value * config.corrects for group in layer.groups]
    outputs = [sum(linear.out_features for linear in group) * value for group in layer.groups]
    moments = [following + hidden + (0 if config.tune_steps else sum(outputs[:-1])) * replays]
    replayed = 0
    for index, group in enumerate(layer.groups):
        last = index + 1 == len(layer.groups)
        caught = 0 if last else (group[0].in_features * value + outputs[index])
        # Its targets go when the group is quantized, after its inputs were caught.
        moments.append(following + sum(targets[index:]) + replays * (replayed + caught))
        replayed += outputs[index]
    files = len(layer.linears) * 2 + 4
    return max(moments) + files * _FILE


def _target_values(group: tuple[LinearSpec, ...], layer: LayerSpec) -> int:
    """Values a token of what a group should put out: its input where that says as much (see targets.py).

    What linears are added to is found by trying; here the larger of what may be found is counted.
    """
    inputs, outputs = group[0].in_features, sum(linear.out_features for linear in group)
    added = len(group) == 1 and (group is layer.groups[-1] or outputs == layer.linears[0].in_features)
    return outputs if added or inputs > outputs else inputs


def check(job: Job, needed: int) -> None:
    """Refuse before hours of work when the disk cannot hold what they write. Raises DiskFullError."""
    require_room(job.folder.parent, needed, "the conversion", "choose another folder")


@contextlib.contextmanager
def told(job: Job, plan_after: dict[int, DiskPlan]) -> Iterator[None]:
    """Where the disk is full meanwhile, say how much room what is left of the work lacks.

    plan_after: by the number of finished layers. Raises DiskFullError.
    """
    try:
        yield
    except DiskFullError as error:
        # Of job.json, which may be what could not be written.
        finished = state.finished_layers if (state := job.load()) else 0
        with contextlib.suppress(OSError):
            job.sweep(finished)
        needed, free = plan_after[finished].needed, free_bytes(job.folder)
        if needed <= free:  # a quota, or a limit on the size of files: it cannot be said how much is lacking
            raise
        raise DiskFullError(
            f"{error.message}; what is left of the conversion needs {format_bytes(needed)}",
            f"Free {format_bytes(needed - free)} more and give the same command again: "
            f"{finished} layers are finished and kept",
        ) from error
