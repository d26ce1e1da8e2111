"""What a pass of the calibration rows through a layer catches on the way into and out of its linears."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from lowmem.convert.math.hessian import Hessian
from lowmem.convert.math.products import add_product
from lowmem.convert.stages.replay import Replay
from lowmem.convert.stages.targets import Targets
from torch import nn

from lowmem.models.architecture import LinearSpec
from lowmem.streaming.layer_calls import LayerCall

ENERGY_SAMPLE = 8
"""One token of so many tells how large a linear's output is: the error is reported as a share of that."""


class _Stop(Exception):
    """The last linear that is being watched has its input: the rest of the layer need not run."""


class Capture:
    """Hooks on some linears: one Hessian for each distinct input, the energy of each output, and with
    targets what is lacking, with x the input and T the number of tokens: T E[x d^T] of a linear, d what its
    output lacks; or T E[x (x' - x)^T] of linears that share an input, x' that of the unquantized model.

    energy: by a linear's name, the sum of squares of what it puts out (without bias) for `sampled` tokens.
    seconds: that the hooks took. replay: by which finished linears are run; kept: where inputs go.
    """

    def __init__(
        self,
        layer: nn.Module,
        groups: Sequence[Sequence[LinearSpec]],
        device: torch.device,
        targets: Targets | None,
        replay: Replay | None,
        kept: Replay | None,
    ) -> None:
        self.hessians = [Hessian(group[0].in_features, device) for group in groups]
        self.energy = {spec.name: 0.0 for group in groups for spec in group}
        self.sampled = {spec.name: 0 for group in groups for spec in group}
        self.lacking: dict[str, torch.Tensor] = {}
        self.seconds = 0.0
        self.tokens = 0
        self._targets = targets
        self._replay, self._kept = replay, kept
        self._last_input: torch.Tensor | None = None
        self._left = self._events = 0
        self._start = 0
        self._hidden = torch.empty(0)
        self._handles = []
        for group, hessian in zip(groups, self.hessians, strict=True):
            first = layer.get_submodule(group[0].name)
            self._handles.append(first.register_forward_pre_hook(self._on_input(layer, group, hessian)))
            self._events += 1
            for spec in group if targets is not None else ():
                key = targets.inputs.get(spec.name) if targets is not None else None
                if key is not None:
                    self.lacking.setdefault(key, _zeros(spec.in_features, device))
                    continue
                self.lacking[spec.name] = _zeros(spec.in_features, device, spec.out_features)
                module = layer.get_submodule(spec.name)
                self._handles.append(module.register_forward_hook(self._on_output(spec.name)))
                self._events += 1

    def run(self, layer: nn.Module, call: LayerCall, start: int, hidden: torch.Tensor) -> None:
        """Rows from `start` on: hidden [some rows, row_length, hidden]."""
        self._start, self._hidden, self._left = start, hidden, self._events
        self.tokens += hidden.shape[0] * hidden.shape[1]
        try:
            if self._replay is None:
                output = call.run(layer, hidden)
            else:
                output = self._replay.run(layer, call, start, hidden)
        except _Stop:
            return
        started = time.perf_counter()
        if self._last_input is not None:  # of the linear whose target is the layer's output
            name = next(name for name in self.lacking if self._added(name) == "last")
            self._add_lacking(name, self._last_input, output)
            self._last_input = None
        self.seconds += time.perf_counter() - started

    def _added(self, name: str) -> str:
        return "to nothing" if self._targets is None else self._targets.added[name]

    def _add_lacking(self, name: str, x: torch.Tensor, found: torch.Tensor) -> None:
        """found: the output, or the input of a linear whose target is that."""
        assert self._targets is not None
        wanted = self._targets.read(name, self._start, self._start + self._hidden.shape[0])
        lack = wanted.to(found.device, torch.float32).view_as(found) - found
        add_product(self.lacking[name], _tokens(x).T, _tokens(lack), rounded=x.dtype == torch.bfloat16)

    def _done(self) -> None:
        self._left -= 1
        if self._left == 0 and self._last_input is None:
            raise _Stop

    def _on_input(
        self, layer: nn.Module, group: Sequence[LinearSpec], hessian: Hessian
    ) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            started = time.perf_counter()
            x = args[0]
            hessian.add(_tokens(x))
            sample = _tokens(x)[::ENERGY_SAMPLE]
            for spec in group:
                weight = layer.get_submodule(spec.name).get_parameter("weight")
                self.energy[spec.name] += (
                    float(torch.linalg.vector_norm(sample @ weight.T, dtype=torch.float32)) ** 2
                )
                self.sampled[spec.name] += sample.shape[0]
            if group[0].name in self.lacking and self._targets and group[0].name in self._targets.inputs:
                self._add_lacking(group[0].name, x, x)
            if self._kept is not None:
                self._kept.keep_input(group[0].name, x)
            self.seconds += time.perf_counter() - started
            self._done()

        return hook

    def _on_output(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            started = time.perf_counter()
            added = self._added(name)
            if added == "last":
                self._last_input = args[0]
            else:
                whole = output + self._hidden if added == "to the layer's input" else output
                self._add_lacking(name, args[0], whole)
            self.seconds += time.perf_counter() - started
            self._done()

        return hook

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _zeros(rows: int, device: torch.device, columns: int | None = None) -> torch.Tensor:
    return torch.zeros(rows, columns or rows, dtype=torch.float32, device=device)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
