"""The targets of a layer's linears: their outputs in the unquantized model.

A second stream of hidden states, that of the unquantized model, runs beside the stream of the model as it is
converted. Each layer runs over it once before it is quantized (record.py), and the outputs of its linears are
kept in files until the same linears are quantized. The difference tells what the quantized layers before have
changed; see `gptq.quantize`. For a linear whose output is not added to the residual stream the input is
enough: its output lacks W (x' - x).

For a linear whose output is added to the residual stream, the target is the sum, so that the linear also
corrects the error of the stream itself. Trial runs find these linears, for any family of models.
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
"""What a linear's output is added to; "last": the sum is the layer's output."""

_TOLERANCE = 1 / 64
"""Relative to the largest value: the error that 16-bit rounding may cause in a sum."""


def additions(layer: nn.Module, spec: LayerSpec, call: LayerCall, hidden: torch.Tensor) -> dict[str, Added]:
    """Find the tensor that each linear's output is added to, by the linear's name; hidden: [rows,
    row_length, hidden].

    A linear is the last one if silencing it changes the layer's output by the linear's own output. It is
    added to the layer's input if the layer outputs the sum of both while all later linears are silenced.
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
    """The outputs of the layer and of one of its linears."""
    seen: list[torch.Tensor] = []
    handle = layer.get_submodule(name).register_forward_hook(lambda _module, _args, own: seen.append(own))
    try:
        output = call.run(layer, hidden)
    finally:
        handle.remove()
    return output, seen[0]


def _silenced(layer: nn.Module, names: list[str]) -> contextlib.AbstractContextManager[None]:
    """Let these linears return zeros without computing anything."""

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
    """Whether the target of a group is its input in the unquantized model: it must tell what the outputs
    lack, in no more values than the outputs."""
    width = sum(linear.out_features for linear in group)
    return group[0].in_features <= width and all(added[linear.name] == "to nothing" for linear in group)


class Targets:
    """Outputs of one layer's linears on the unquantized stream, or their inputs (`read_by_input`).

    Each target is a file, [rows, row_length, width].
    """

    def __init__(self, folder: Path, row_length: int) -> None:
        self.folder = folder
        self.row_length = row_length
        self.added: dict[str, Added] = {}
        self.inputs: dict[str, str] = {}
        """Linears whose target is their input: the first linear of their group, which names the file."""
        self.output: HiddenStates | None = None
        """The layer's own output, which is also the target of its "last" linear."""
        self._files: dict[str, RowsFile] = {}

    @property
    def recorded(self) -> list[str]:
        """The linears whose outputs or inputs are kept in a file."""
        return [n for n, added in self.added.items() if added != "last" and self.inputs.get(n, n) == n]

    def append(self, name: str, chunk: torch.Tensor) -> None:
        """Append rows of a linear's outputs or inputs. Raises OutputError when the disk is full."""
        if name not in self._files:
            self._files[name] = RowsFile(self.folder / f"target-{name}", self.row_length)
        self._files[name].append(chunk)

    def read(self, name: str, start: int, end: int) -> torch.Tensor:
        """Read rows start..end of a linear's target, [end - start, row_length, width]."""
        if self.added[name] == "last":
            assert self.output is not None
            return self.output.read(start, end)
        return self._files[self.inputs.get(name, name)].read(start, end)

    def drop(self, group: Sequence[LinearSpec]) -> None:
        """Remove the files of quantized linears."""
        for linear in group:
            if linear.name in self._files:
                self._files.pop(linear.name).delete()

    def clear(self) -> None:
        """Remove all files, including those of a killed process."""
        for path in self.folder.glob("target-*"):
            path.unlink(missing_ok=True)
