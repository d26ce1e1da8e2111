"""What the linears of a layer put out in the unquantized model, and so what they should put out still.

Beside the hidden states of the model as it is converted runs a second stream, that of the model as it was.
Each layer takes it once, unquantized, and what its linears put out is kept in files until the same linears
are quantized. There the difference says what the layers before have damaged; see `gptq.quantize`.

Where a linear is added to the residual stream, the sum counts and not the linear's own part: then it makes
up for what the stream itself has lost. Which linears are is found by trying, for any family of models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from convert.activations import HiddenStates, read_rows
from convert.calls import LayerCall, replaced_forwards
from lowmem.checkpoint.writer import as_output_error, tensor_bytes
from lowmem.models.architecture import LayerSpec

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


class Targets:
    """Outputs of the linears of one layer on the unquantized stream: a file each, [rows, row_length, out]."""

    def __init__(self, folder: Path, row_length: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.row_length = row_length
        self.dtype = dtype
        self.added: dict[str, Added] = {}
        self.output: HiddenStates | None = None
        """The layer's own output: what its "last" linear should end in."""
        self._widths: dict[str, int] = {}

    def _path(self, name: str) -> Path:
        return self.folder / f"target-{name}"

    def append(self, name: str, chunk: torch.Tensor) -> None:
        """The next rows of a linear's outputs. Raises OutputError when the disk is full."""
        width = self._widths.setdefault(name, chunk.shape[-1])
        chunk = chunk.reshape(-1, self.row_length, width).to("cpu", self.dtype).contiguous()
        try:
            with self._path(name).open("ab") as stream:
                stream.write(tensor_bytes(chunk))
        except OSError as error:
            raise as_output_error(error, self._path(name)) from error

    def read(self, name: str, start: int, end: int) -> torch.Tensor:
        """Rows start..end of a linear's target, [end - start, row_length, out]."""
        if self.added[name] == "last":
            assert self.output is not None
            return self.output.read(start, end)
        return read_rows(self._path(name), start, end, (self.row_length, self._widths[name]), self.dtype)

    def drop(self, name: str) -> None:
        """Remove a linear's file: it is quantized."""
        self._path(name).unlink(missing_ok=True)

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
) -> tuple[Targets, HiddenStates]:
    """Run the unquantized `layer` over the unquantized stream: its linears' targets, and the next states.

    linears: False where only the layer's own output is wanted.

    The target of the "last" linear is the layer's output: the next states are that already, and it has no
    file of its own.
    """
    targets = Targets(folder, states.shape[1], states.dtype)
    targets.clear()
    hidden = next(states.chunks(rows)).to(device)
    if linears:
        targets.added = additions(layer, spec, call, hidden)

    def keep(name: str, output: torch.Tensor) -> None:
        if targets.added[name] == "to the layer's input":
            output = output + hidden
        targets.append(name, output)

    handles = [
        layer.get_submodule(linear.name).register_forward_hook(
            lambda _module, _args, output, name=linear.name: keep(name, output)
        )
        for linear in spec.linears
        if linears and targets.added[linear.name] != "last"
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
