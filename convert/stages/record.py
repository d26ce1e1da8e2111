"""The stage that runs the unquantized layer over the unquantized stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lowmem.convert.stages.context import LayerContext, Stage
from lowmem.convert.stages.sizes import LayerSizes
from lowmem.convert.stages.targets import Targets, additions, read_by_input

from lowmem.streaming.hidden_states import HiddenStates


class RecordTargets(Stage):
    """Record the targets of a layer's linears, and advance the unquantized stream to the next layer.

    Without a correction only the layer's own output is recorded, for tuning. That output is the next hidden
    states, so the target of the "last" linear needs no file of its own.
    """

    name = "unquantized outputs"

    def run(self, context: LayerContext) -> None:
        states = context.unquantized
        assert states is not None
        with context.seconds.of("forward"):
            context.targets = targets = Targets(context.files.folder, states.shape[1])
            targets.clear()
            if context.recipe.config.corrects:
                trial = context.tuning_batch
                hidden = states.read(0, trial.rows).to(context.device)
                added = additions(context.layer, context.spec, trial.call, hidden)
                quantized = context.recipe.quantized(context.spec)
                targets.added = {linear.name: added[linear.name] for linear in quantized}
                for group in context.recipe.groups(context.spec):
                    if read_by_input(group, targets.added):
                        targets.inputs |= {linear.name: group[0].name for linear in group}
            targets.output = context.unquantized = self._advance(context, states)

    def _advance(self, context: LayerContext, states: HiddenStates) -> HiddenStates:
        layer, targets, hidden = context.layer, context.targets, torch.empty(0)
        assert targets is not None

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                if name in targets.inputs:
                    output = args[0]
                elif targets.added[name] == "to the layer's input":
                    output = output + hidden
                targets.append(name, output)

            return hook

        def run(chunk: torch.Tensor) -> torch.Tensor:
            nonlocal hidden
            hidden = chunk.to(context.device)
            return context.batch.call.run(layer, hidden).cpu()

        handles = [context.linear(name).register_forward_hook(keep(name)) for name in targets.recorded]
        try:
            return states.advance(
                context.files.next_unquantized,
                context.batch.rows,
                run,
                where=f"after {context.spec.name}, unquantized",
            )
        finally:
            for handle in handles:
                handle.remove()

    def peak(self, sizes: LayerSizes) -> int:
        return sizes.held + sizes.forward(sizes.tokens)
