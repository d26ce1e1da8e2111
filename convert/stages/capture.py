"""The stage that runs the calibration rows through a layer and measures what its linears see."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from lowmem.convert.math.hessian import Hessian
from lowmem.convert.math.products import add_product
from lowmem.convert.stages.context import Captured, LayerContext, Stage
from lowmem.convert.stages.sizes import FLOAT32, LayerSizes
from lowmem.convert.stages.targets import Targets

from lowmem.models.architecture import LinearSpec

ENERGY_SAMPLE = 8
"""One token in this many is used to estimate the energy of a linear's output."""

Group = tuple[LinearSpec, ...]
"""Linears that share an input."""


class CaptureInputs(Stage):
    """Accumulate the Hessians of some groups of linears, and how far the linears' outputs are from their
    targets.

    keep_inputs: write the groups' inputs to files, from which their outputs are computed once they are
    quantized (replay.py).
    """

    def __init__(self, groups: Sequence[Group], keep_inputs: bool) -> None:
        self.groups = groups
        self.keep_inputs = keep_inputs
        self.name = "Hessian of " + ", ".join(linear.name for group in groups for linear in group)

    def run(self, context: LayerContext) -> None:
        context.captured = Captured()
        started = time.perf_counter()
        hooks = _Hooks(context, self.groups, self.keep_inputs)
        start = 0
        try:
            for chunk in context.states.chunks(context.batch.rows):
                hooks.run(start, chunk.to(context.device))
                start += chunk.shape[0]
        finally:
            hooks.remove()
        context.seconds.hessian += hooks.seconds
        context.seconds.forward += time.perf_counter() - started - hooks.seconds

    def _hessians(self) -> int:
        return sum(group[0].in_features ** 2 for group in self.groups) * FLOAT32

    def _lacking(self, sizes: LayerSizes) -> dict[str, int]:
        if not sizes.work.recipe.config.corrects:
            return {}
        return {group[0].name: _lacking_values(group, sizes) * FLOAT32 for group in self.groups}

    def peak(self, sizes: LayerSizes) -> int:
        tokens = sizes.tokens
        inputs = compared = 0
        if sizes.work.dtype == torch.float16:  # inputs become float32
            inputs = max(tokens * group[0].in_features for group in self.groups) * FLOAT32
        if sizes.work.recipe.config.corrects:
            compared = 2 * tokens * max(_compared_width(group) for group in self.groups) * FLOAT32
        added = self._hessians() + sum(self._lacking(sizes).values())
        return sizes.held + added + sizes.forward(tokens) + max(inputs, compared)

    def leave(self, sizes: LayerSizes) -> None:
        sizes.hessians += self._hessians()
        sizes.lacking = self._lacking(sizes)


def _lacking_values(group: Group, sizes: LayerSizes) -> int:
    """Values of the matrices that say what a group lacks: one of [in, in] where the target is the input,
    or one of each weight's size. The larger one is counted where only a trial can tell (targets.py)."""
    n, width = group[0].in_features, sum(linear.out_features for linear in group)
    if n > width:
        return n * width
    may_be_added = len(group) == 1 and width == sizes.layer.linears[0].in_features
    return max(n * n, n * width) if may_be_added else n * n


def _compared_width(group: Group) -> int:
    """Width of what is compared with the target: a group's input, or its widest output."""
    n, outputs = group[0].in_features, [linear.out_features for linear in group]
    return max(outputs) if n > sum(outputs) or (len(group) == 1 and outputs[0] == n) else n


class _Stop(Exception):
    """Every hook has fired: the rest of the layer need not run."""


class _Hooks:
    """Hooks on the linears of some groups, which fill `context.captured`."""

    def __init__(self, context: LayerContext, groups: Sequence[Group], keep_inputs: bool) -> None:
        self.seconds = 0.0
        """Spent in the hooks."""
        self._context, self._captured = context, context.captured
        self._targets = context.targets if context.recipe.config.corrects else None
        self._keep_inputs = keep_inputs
        self._last_input: torch.Tensor | None = None
        self._left = self._events = 0
        self._start = 0
        self._hidden = torch.empty(0)
        self._handles = []
        for group in groups:
            first = group[0]
            self._captured.hessians[first.name] = Hessian(first.in_features, context.device)
            for linear in group:
                self._captured.energy[linear.name] = torch.zeros(
                    (), dtype=torch.float64, device=context.device
                )
                self._captured.sampled[linear.name] = 0
            module = context.linear(first.name)
            self._handles.append(module.register_forward_pre_hook(self._on_input(group)))
            self._events += 1
            if self._targets is not None:
                self._watch_targets(group, self._targets)

    def _watch_targets(self, group: Group, targets: Targets) -> None:
        for linear in group:
            key = targets.inputs.get(linear.name)
            if key is not None:
                if key not in self._captured.lacking:
                    self._captured.lacking[key] = self._zeros(linear.in_features, linear.in_features)
                continue
            self._captured.lacking[linear.name] = self._zeros(linear.in_features, linear.out_features)
            module = self._context.linear(linear.name)
            self._handles.append(module.register_forward_hook(self._on_output(linear.name)))
            self._events += 1

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self._context.device)

    def run(self, start: int, hidden: torch.Tensor) -> None:
        """Run rows from `start` on; hidden: [rows, row_length, hidden]."""
        context = self._context
        self._start, self._hidden, self._left = start, hidden, self._events
        self._captured.tokens += hidden.shape[0] * hidden.shape[1]
        try:
            if context.replay is None:
                output = context.batch.call.run(context.layer, hidden)
            else:
                output = context.replay.run(context.layer, context.batch.call, start, hidden)
        except _Stop:
            return
        started = time.perf_counter()
        if self._last_input is not None:  # the linear whose target is the layer's output
            name = next(name for name in self._captured.lacking if self._added(name) == "last")
            self._add_lacking(name, self._last_input, output)
            self._last_input = None
        self.seconds += time.perf_counter() - started

    def _added(self, name: str) -> str:
        return "to nothing" if self._targets is None else self._targets.added[name]

    def _add_lacking(self, name: str, x: torch.Tensor, found: torch.Tensor) -> None:
        """found: the linear's output, or its input where that is the target."""
        assert self._targets is not None
        wanted = self._targets.read(name, self._start, self._start + self._hidden.shape[0])
        lack = wanted.to(found.device, torch.float32).view_as(found) - found
        into = self._captured.lacking[name]
        add_product(into, _tokens(x).T, _tokens(lack), rounded=x.dtype == torch.bfloat16)

    def _fired(self) -> None:
        self._left -= 1
        if self._left == 0 and self._last_input is None:
            raise _Stop

    def _on_input(self, group: Group) -> Callable[..., None]:
        first, captured = group[0].name, self._captured

        def hook(_module: object, args: tuple[torch.Tensor, ...]) -> None:
            started = time.perf_counter()
            x = args[0]
            captured.hessians[first].add(_tokens(x))
            sample = _tokens(x)[::ENERGY_SAMPLE]
            for linear in group:
                captured.energy[linear.name] += _energy(sample, self._context.linear(linear.name).weight)
                captured.sampled[linear.name] += sample.shape[0]
            if first in captured.lacking and self._targets and first in self._targets.inputs:
                self._add_lacking(first, x, x)
            if self._keep_inputs:
                assert self._context.replay is not None
                self._context.replay.keep_input(first, x)
            self.seconds += time.perf_counter() - started
            self._fired()

        return hook

    def _on_output(self, name: str) -> Callable[..., None]:
        def hook(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            started = time.perf_counter()
            added = self._added(name)
            if added == "last":
                self._last_input = args[0]
            else:
                whole = output + self._hidden if added == "to the layer's input" else output
                self._add_lacking(name, args[0], whole)
            self.seconds += time.perf_counter() - started
            self._fired()

        return hook

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _energy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float64, on the device: the host does not wait for it."""
    norm: torch.Tensor = torch.linalg.vector_norm(x @ weight.T, dtype=torch.float32)
    return norm.double().square()


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
