"""What the linears of a layer put out in the unquantized model, and so what they should put out still.

Beside the hidden states of the model as it is converted runs a second stream, that of the model as it was.
Each layer takes it once, unquantized, and what its linears put out is kept in files until the same linears
are quantized. There the difference says what the layers before have damaged; see `gptq.quantize`. Of a linear
that is added to nothing the input is enough: W (x' - x) is what its output lacks.

Where a linear is added to the residual stream, the sum counts and not the linear's own part: then it makes
up for what the stream itself has lost. Which linears are is found by trying, for any family of models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from lowmem.convert.stages.replay import RowsFile
from torch import nn

from lowmem.models.architecture import LayerSpec, LinearSpec
from lowmem.streaming.hidden_states import HiddenStates
from lowmem.streaming.layer_calls import LayerCall, replaced_forwards

Added = Literal["to nothing", "to the layer's input", "last"]
"""To what a linear's output is added: "last" means that the layer's output is the sum."""

_TOLERANCE = 1 / 64
"""Of the largest value: what 16-bit rounding may do to a sum."""


def additions(layer: nn.Module, spec: LayerSpec, call: LayerCall, hidden: torch.Tensor) -> dict[str, Added]:
    """By a linear's name, to what its output is added; hidden: [some rows, row_length, hidden].

    When a linear gives zeros and the layer's output changes by just what the linear put out, it is the last
    one. When all that run after it give zeros and the layer puts out its input and what the linear put out,
    it is added to the input.
    """
    order = [linear for group in spec.groups for linear in group]
    found: dict[str, Added] = {linear.name: "to nothing" for linear in order}
    *earlier, last = spec.groups
    if len(last) == 1:
        whole, own = _output_and_own(layer, last[0].name, call, hidden)
        with _silenced(layer, [last[0].name]):
            without = call.run(layer, hidden)
        if own.shape == whole.shape and _alike(whole - without, own, whole):
            found[last[0].name] = "last"
    for index, group in enumerate(earlier):
        if len(group) != 1 or group[0].out_features != hidden.shape[-1]:
            continue
        after = [linear.name for later in spec.groups[index + 1 :] for linear in later]
        with _silenced(layer, after):
            output, own = _output_and_own(layer, group[0].name, call, hidden)
        if output.shape == hidden.shape == own.shape and _alike(output - hidden, own, output):
            found[group[0].name] = "to the layer's input"
    return found


def _output_and_own(
    layer: nn.Module, name: str, call: LayerCall, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output, and that of one of its linears."""
    seen: list[torch.Tensor] = []
    handle = layer.get_submodule(name).register_forward_hook(lambda _module, _args, own: seen.append(own))
    try:
        output = call.run(layer, hidden)
    finally:
        handle.remove()
    return output, seen[0]


def _silenced(layer: nn.Module, names: list[str]) -> contextlib.AbstractContextManager[None]:
    """The linears of these names give zeros, and compute nothing."""

    def zeros(width: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x.new_zeros(*x.shape[:-1], width)

    pairs = []
    for name in names:
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        pairs.append((linear, zeros(linear.out_features)))
    return replaced_forwards(pairs)


def _alike(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> bool:
    limit = _TOLERANCE * float(scale.abs().max())
    return bool((found.float() - expected.float()).abs().max() <= limit)


def read_by_input(group: Sequence[LinearSpec], added: Mapping[str, Added]) -> bool:
    """Whether the unquantized input of these linears, which share it, says what they lack, and in fewer
    values than their outputs."""
    width = sum(linear.out_features for linear in group)
    return group[0].in_features <= width and all(added[linear.name] == "to nothing" for linear in group)


class Targets:
    """Of the linears of one layer on the unquantized stream: their outputs, or their inputs where these say
    all (`read_by_input`). A file each, [rows, row_length, width]."""

    def __init__(self, folder: Path, row_length: int) -> None:
        self.folder = folder
        self.row_length = row_length
        self.added: dict[str, Added] = {}
        self.inputs: dict[str, str] = {}
        """Linears that are known by their input: whose file it is, the first of their group."""
        self.output: HiddenStates | None = None
        """The layer's own output: what its "last" linear should end in."""
        self._files: dict[str, RowsFile] = {}

    def append(self, name: str, chunk: torch.Tensor) -> None:
        """The next rows of a linear's outputs or inputs. Raises OutputError when the disk is full."""
        if name not in self._files:
            self._files[name] = RowsFile(self.folder / f"target-{name}", self.row_length)
        self._files[name].append(chunk)

    def read(self, name: str, start: int, end: int) -> torch.Tensor:
        """Rows start..end of a linear's target, or of its input, [end - start, row_length, width]."""
        if self.added[name] == "last":
            assert self.output is not None
            return self.output.read(start, end)
        return self._files[self.inputs.get(name, name)].read(start, end)

    def drop(self, group: Sequence[LinearSpec]) -> None:
        """Remove the files of linears that are quantized."""
        for linear in group:
            if linear.name in self._files:
                self._files.pop(linear.name).delete()

    def clear(self) -> None:
        """Remove whatever is there, of this run or of one that was killed."""
        for path in self.folder.glob("target-*"):
            path.unlink(missing_ok=True)


def record(
    layer: nn.Module,
    spec: LayerSpec,
    call: LayerCall,
    states: HiddenStates,
    *,
    folder: Path,
    next_states: Path,
    rows: int,
    device: torch.device,
    linears: bool = True,
    trial: tuple[LayerCall, int] | None = None,
) -> tuple[Targets, HiddenStates]:
    """Run the unquantized `layer` over the unquantized stream: its linears' targets, and the next states.

    linears: False where only the layer's own output is wanted. trial: a call with fewer rows, and how many,
    by which is found what linears are added to.

    The target of the "last" linear is the layer's output: the next states are that already, and it has no
    file of its own.
    """
    targets = Targets(folder, states.shape[1])
    targets.clear()
    hidden = torch.empty(0)
    if linears:
        trial_call, trial_rows = trial or (call, rows)
        targets.added = additions(layer, spec, trial_call, states.read(0, trial_rows).to(device))
        for group in spec.groups:
            if read_by_input(group, targets.added):
                targets.inputs |= {linear.name: group[0].name for linear in group}

    def keep(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        if name in targets.inputs:
            output = x
        elif targets.added[name] == "to the layer's input":
            output = output + hidden
        targets.append(name, output)

    kept = [
        linear.name
        for linear in spec.linears
        if linears
        and targets.added[linear.name] != "last"
        # Of linears that share an input the first keeps it.
        and targets.inputs.get(linear.name, linear.name) == linear.name
    ]
    handles = [
        layer.get_submodule(name).register_forward_hook(
            lambda _module, args, output, name=name: keep(name, args[0], output)
        )
        for name in kept
    ]

    def run(chunk: torch.Tensor) -> torch.Tensor:
        nonlocal hidden
        hidden = chunk.to(device)
        return call.run(layer, hidden).cpu()

    try:
        states = states.advance(next_states, rows, run, where=f"after {spec.name}, unquantized")
    finally:
        for handle in handles:
            handle.remove()
    targets.output = states
    return targets, states
